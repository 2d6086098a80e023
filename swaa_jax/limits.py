"""Limits on what is read from outside, each with its reason."""

DEEPEST_NESTING = 50
"""Levels of lists and mappings in YAML and JSON. Configs and records need about ten; Python's
recursion, which walks over what was read, ends at a thousand."""

PARQUET_BYTES = 1 << 30
"""Of a row group in memory: those that libraries write by themselves have some hundred MB, however
small repetitive texts become on the disk."""

CONFIG_BYTES = 64 << 20
"""Of a checkpoint's JSON files: tokenizers and indices of the largest models have some 30 MB."""

TOKENIZER_GROWTH = 1000
"""What a tokenizer's normalizer may make of one character, and the steps that it may have. Known
ones make a few (a prefix, Unicode's compatibility forms), in about ten steps."""

PARQUET_TIMES = 100
"""A row group in memory against its file, where it is larger than that: text is compressed to a
tenth, a third of that where records share their contexts."""

LONGEST_MODEL_TYPE = 200
"""Characters of a config's `model_type`, which messages of Transformers show whole."""

MAX_MESSAGES = 20_000
"""Of a chat: some tokens each, they fill the longest contexts; each is checked and rendered."""

TEMPLATE_SECONDS = 2.0
"""Of rendering a chat by its template, which takes milliseconds; for each 10 MB of chat as much
again."""

TEMPLATE_BYTES = 640 << 20
"""Of the process that renders, itself 30 MB. A chat may take 24 times its own size in addition."""

TEMPLATE_CHARACTERS = 1 << 20
"""Of a rendered chat beyond four times the chat's own: what templates say themselves is at most
some thousands."""

PATTERN_SECONDS = 3.0
"""Of matching a regular expression from a config, an adapter or a task, which takes microseconds.
Nested repeats, as in `(a+)+$`, would take years."""

PATTERN_BYTES = 1 << 29
"""Of the process that matches, itself 10 MB: backtracking may keep a state for each character."""

PATTERN_CHARACTERS = 4096
"""Of a regular expression. Those that adapters have for many modules are some hundreds long."""

MAX_PATTERNS = 20_000
"""Of an adapter's ranks and scales by pattern: one for each module of the largest models."""

REPLY_BYTES = 4 << 20
"""Of another server's reply: an answer, after thinking of some thousands of tokens at most."""

MAX_HEADER_BYTES = 100_000_000
"""Of a safetensors header: the format's own limit."""

MAX_AXES = 16
"""Of a tensor: no weight has more than four, and numpy holds 64 at most."""

MAX_LAYERS = 10_000
"""Of a model: ten times the deepest known; more would be built before anything could be checked."""

MAX_POSITIONS = 2**24
"""Of a row: beyond, float32 has no number of its own for every position, and positions would share
rotary angles."""

MAX_TOKEN_ID = 2**31 - 1
"""Of a vocabulary: tokens are int32."""

MAX_RANK = 2**16
"""Of an adapter: twice the width of the widest known models, at which it saves nothing."""

MAX_KEYS = 2**30
"""Of a window, sinks or a tail: positions are int32, and so is one with any of these added."""
