"""Selects what to train on: scores, the gate, samplers, TVDF."""
