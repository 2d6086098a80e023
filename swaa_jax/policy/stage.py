"""Stages: whether a token is given or produced, which the policy's masks depend on."""

import enum

__all__ = ["Stage"]


class Stage(enum.IntEnum):
    """What a token is to the model: given (PROMPT) or produced (ANSWER).

    FA decode (section 3.1 of arXiv 2512.10411) tells the two apart.

    >>> [Stage.PROMPT] * 3 + [Stage.ANSWER] * 2 == [0, 0, 0, 1, 1]  # the stage ids of five tokens
    True
    """

    PROMPT = 0
    ANSWER = 1
