"""Generated videos with exact labels, and the tiny models that watch them."""

DEFAULT_VIDEOS = {"train": 1500, "short": 48, "long": 30, "subtle": 48}  # videos of each split
