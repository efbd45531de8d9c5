"""Metrics, protocols, and the predictions that they evaluate."""
