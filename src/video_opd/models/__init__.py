"""Policies and teachers: prefill, sample, log-probabilities."""
