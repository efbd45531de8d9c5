"""Makes the shipped tiny models: pretraining from random weights, then GRPO for the teachers."""
