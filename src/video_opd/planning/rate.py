"""The rate at which operations count as time, for a plan that is given no other.

It has a module of its own, so that ``video-opd plan --help`` can name it without loading a plan.
"""

DEFAULT_RATE = 200.0  # TFLOP/s that steps of Qwen3-VL-8B's shape attained on an H200 (docs/performance.md)
