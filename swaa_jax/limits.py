"""What is refused by its size alone, in one place, each limit with its reason."""

MAX_HEADER_BYTES = 100_000_000
"""Of a safetensors header: the format's own limit."""

MAX_AXES = 16
"""Of a tensor: no weight has more than four, and numpy holds 64 at most."""

MAX_LAYERS = 10_000
"""Of a model: ten times the deepest known; more would be built before anything could be checked."""
