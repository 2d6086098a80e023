"""Stages: whether a token is given or produced, which the policy's masks depend on."""

import enum

__all__ = ["Stage"]


class Stage(enum.IntEnum):
    """What a token is to the model: given (PROMPT) or produced (ANSWER)."""

    PROMPT = 0
    ANSWER = 1
