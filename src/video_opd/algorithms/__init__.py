"""Training methods: one small file for each, and the signals and losses they use as pure functions."""
