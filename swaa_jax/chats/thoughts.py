"""How texts mark a model's thoughts: one table, for all that reads prompts and answers."""

import re

__all__ = ["CLOSING", "LONGEST_MARKER", "OPENING", "THOUGHT_MARKERS", "ends_in_thought"]

THOUGHT_MARKERS = (
    ("<think>", "</think>"),  # Qwen3, DeepSeek-R1 and most others, in their chat templates
    ("[THINK]", "[/THINK]"),  # Magistral: control tokens, mistral-common's `SpecialTokens`
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # Sky-T1 and OpenThinker: their system prompts
)
"""What opens a thought and what closes it. A family of other markers adds a line.

>>> THOUGHT_MARKERS[0]
('<think>', '</think>')
"""

_opening, _closing = zip(*THOUGHT_MARKERS, strict=True)
OPENING = re.compile("|".join(map(re.escape, _opening)))
"""Finds what opens a thought.

>>> bool(OPENING.search("<think>Two and two."))
True
"""
CLOSING = re.compile("|".join(map(re.escape, _closing)))
"""Finds what closes one.

>>> CLOSING.split("Two and two.</think>4")[-1]
'4'
"""
LONGEST_MARKER = max(map(len, (*_opening, *_closing)))
"""Characters of the longest of them: how much of a stream is held back to see one whole.

>>> LONGEST_MARKER == len("<|begin_of_thought|>")
True
"""


def ends_in_thought(text: str) -> bool:
    r"""Whether the last thought in a text is still open at its end.

    >>> ends_in_thought("[INST]Q[/INST][THINK]Hm"), ends_in_thought("<think>\n\n</think>\n\n")
    (True, False)
    """
    opened, closed = (
        max((found.start() for found in pattern.finditer(text)), default=-1)
        for pattern in (OPENING, CLOSING)
    )
    return opened > closed
