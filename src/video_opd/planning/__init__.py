"""What a recipe will need before it is started: memory by part, time by stage, and what to change. No
torch."""
