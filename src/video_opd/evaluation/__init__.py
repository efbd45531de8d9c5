"""Metrics, prediction, the answer for one video."""
