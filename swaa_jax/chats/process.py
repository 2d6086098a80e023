"""The process that renders, from the parent's side."""

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from swaa_jax.apart import Worker
from swaa_jax.limits import TEMPLATE_BYTES, TEMPLATE_CHARACTERS, TEMPLATE_SECONDS

__all__ = ["render_apart"]

_WORKER = Worker("swaa_jax.chats.worker")

_LOCK, _REMEMBERED = threading.Lock(), 60.0
_SLOW: dict[str, tuple[int, float]] = {}
"""Of templates that took too long within the last minute: characters of the shortest request, and
when. Longer ones are not tried then: where threads render a file's records, each would wait its
turn to fail."""


def render_apart(
    template: str,
    chats: Sequence[Mapping[str, Any]],
    *,
    variables: Mapping[str, Any],
    date: str,
) -> list[dict[str, Any]]:
    """What a template makes of chats, in the process apart.

    Args:
        template: Jinja.
        chats: variables of each rendering, of JSON's types.
        variables: those that all have.
        date: the template's today, in ISO's form.

    Returns:
        For each chat its ``text`` and ``spans``, or an ``error``, the reason.
    """
    size = len(template) + sum(map(_characters, (*chats, variables)))
    request = {
        "template": template,
        "chats": list(chats),
        "variables": dict(variables),
        "date": date,
        "longest": TEMPLATE_CHARACTERS + 4 * size,
    }
    seconds = TEMPLATE_SECONDS * (1 + size / 10e6)
    with _LOCK:
        shortest, failed = _SLOW.get(template, (size + 1, 0.0))
        if size < shortest or time.monotonic() > failed + _REMEMBERED:
            reply = _WORKER.ask(request, seconds=seconds, memory=TEMPLATE_BYTES)
            if reply is None:
                _SLOW[template] = (size, time.monotonic())
        else:
            reply = None
    if reply is None:
        return [
            {"error": f"it takes more than {seconds:.0f} seconds or too much memory"} for _ in chats
        ]
    return reply.answer


def _characters(value: Any) -> int:
    """Characters of all text in JSON's types, without recursion."""
    total, todo = 0, [value]
    while todo:
        one = todo.pop()
        if isinstance(one, str):
            total += len(one)
        elif isinstance(one, Mapping):
            todo += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple):
            todo += one
    return total
