"""Generated videos with exact labels, and the tiny models that watch them."""
