"""Video-OPD: post-training of video MLLMs for temporal grounding by on-policy distillation."""

__version__ = "0.1.0"
