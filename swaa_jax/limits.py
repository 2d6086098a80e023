"""Limits on what is read from outside, each with its reason."""

DEEPEST_NESTING = 50
"""Levels of lists and mappings in YAML and JSON. Configs and records need about ten; Python's
recursion, which walks over what was read, ends at a thousand."""

TEMPLATE_SECONDS = 2.0
"""Of rendering a chat by its template, which takes milliseconds; for each 10 MB of chat as much
again."""

TEMPLATE_BYTES = 640 << 20
"""Of the process that renders, itself 30 MB. A chat may take 24 times its own size in addition."""

TEMPLATE_CHARACTERS = 1 << 20
"""Of a rendered chat beyond four times the chat's own: what templates say themselves is at most
some thousands."""
