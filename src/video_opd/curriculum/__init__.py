"""What to train on: scores, the gate, samplers, TVDF."""
