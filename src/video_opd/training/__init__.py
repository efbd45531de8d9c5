"""The loop, distribution, checkpoints."""
