"""Annotations, decoding, budgets, prompts, encoding, loading."""
