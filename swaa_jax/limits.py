"""Limits on what is read from outside, each with its reason."""

PATTERN_SECONDS = 3.0
"""Of matching a regular expression from a config, an adapter or a task, which takes microseconds.
Nested repeats, as in `(a+)+$`, would take years."""

PATTERN_BYTES = 1 << 29
"""Of the process that matches, itself 10 MB: backtracking may keep a state for each character."""

PATTERN_CHARACTERS = 4096
"""Of a regular expression. Those that adapters have for many modules are some hundreds long."""

JUDGE_BYTES = 4 << 20
"""Of a judging server's reply: a word, after thinking of some thousands of tokens at most."""
