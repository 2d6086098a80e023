"""What is refused by its size alone, in one place, each limit with its reason."""

MAX_HEADER_BYTES = 100_000_000
"""Of a safetensors header: the format's own limit."""

MAX_AXES = 16
"""Of a tensor: no weight has more than four, and numpy holds 64 at most."""

MAX_LAYERS = 10_000
"""Of a model: ten times the deepest known; more would be built before anything could be checked."""

MAX_POSITIONS = 2**24
"""Of a row: beyond, float32 has no number of its own for every position, and positions would share
rotary angles."""

MAX_KEYS = 2**30
"""Of a window, sinks or a tail: positions are int32, and so is one with any of these added."""
