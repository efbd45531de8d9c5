"""``video-opd bench``: what the engines cost, always as ratios of ways that took turns in one run."""
