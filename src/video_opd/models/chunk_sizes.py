"""How much is computed or allocated at once: the numbers that bound what a step needs for a moment.

The modules that work in such chunks read them here, and so does the plan of a run, which counts the memory of
a chunk without torch.
"""

TOKENS_A_CHUNK = 512  # response tokens whose logits are held at once: over 152k tokens 0.3 GiB in float32
ROWS_A_CHUNK = 16384  # rows of a 16-bit lm_head that are converted to float32 at once
# Tokens by which the cache of each response grows; a longer one copies the buffers once every so many tokens.
CACHE_ROOM = 64
MOMENTS_A_SCALE = 256  # moments in 8 bits that share a float32 scale
# Weights that the optimiser for weights and moments in fewer bits updates at once. Its temporaries take some
# fifty bytes for each.
WEIGHTS_A_CHUNK = 1 << 24


def repeats_mask(queries: int, keys: int) -> bool:
    """Whether attention repeats its mask for query heads that share keys, and not the keys and values, which
    are fewer numbers only if a row has many new tokens. ``queries`` is their number, ``keys`` the numbers of
    a token's keys."""
    return queries <= keys
