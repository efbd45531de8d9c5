"""Policies and teachers: they prefill prompts, sample responses, and give log-probabilities."""
