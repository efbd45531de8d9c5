"""How the shipped tiny models were made: pretraining from random weights, then GRPO for the teachers."""
