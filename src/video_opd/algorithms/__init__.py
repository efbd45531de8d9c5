"""Signals and losses as pure functions, and one small file a method."""
