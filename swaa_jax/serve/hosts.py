"""A server in several processes of one mesh: process 0 takes requests and tells the others.

    process 0   submit, cancel -> engine    round: tell what is new | engine.round()
    the others  ...................         round: hear it, do it   | engine.round()

All engines see the same requests in the same order, and hence run the same programs together.
"""

import dataclasses
import json
import signal
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from swaa_jax.engine import Engine, Request, SamplingParams, Update

__all__ = ["LeadingEngine", "follow"]

_MESSAGE_BYTES = 4096
"""Of the first message of a round; what is longer follows in a second one."""

_END = ["end"]


class LeadingEngine(Engine):
    """Process 0's engine: the others do what it does.

    Its arguments are `Engine`'s; the others make an `Engine` with the same ones and `follow`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._news: list[list[Any]] = []

    def submit(self, request: Request) -> int:
        """As `Engine.submit`; what is refused is not told."""
        number = super().submit(request)
        self._news.append(["submit", _to_plain(request)])
        return number

    def cancel(self, request: int) -> None:
        """As `Engine.cancel`."""
        super().cancel(request)
        self._news.append(["cancel", request])

    def round(self, *, meanwhile: Callable[[], None] = lambda: None) -> list[Update]:
        """Tells the others what is new, and runs a round with them."""
        news, self._news = self._news, []
        _tell(news)
        return super().round(meanwhile=meanwhile)

    def end(self) -> None:
        """Lets the others go."""
        _tell([_END])


def follow(engine: Engine) -> None:
    """Does what process 0 does, until it ends; for all other processes.

    Signals that end a server are process 0's to obey: it would wait for the others for ever.
    """
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, signal.SIG_IGN)
    while True:
        for what, *about in _hear():
            if what == "end":
                return
            if what == "submit":
                engine.submit(_from_plain(about[0]))
            else:
                engine.cancel(about[0])
        engine.round()


def _to_plain(request: Request) -> dict[str, Any]:
    return dataclasses.asdict(request)


def _from_plain(fields: Mapping[str, Any]) -> Request:
    return Request(**{**fields, "params": SamplingParams(**fields["params"])})


def _tell(news: list[list[Any]]) -> None:
    _shared(json.dumps(news).encode())


def _hear() -> list[list[Any]]:
    return json.loads(_shared(b""))


def _shared(message: bytes) -> bytes:
    """Process 0's message, on all of them."""
    from jax.experimental import multihost_utils

    leads = jax.process_index() == 0
    first = np.zeros((_MESSAGE_BYTES,), np.uint8)
    size = np.frombuffer(len(message).to_bytes(8, "little"), np.uint8)
    fits = len(message) <= _MESSAGE_BYTES - 8
    if leads:
        first[:8] = size
        if fits:
            first[8 : 8 + len(message)] = np.frombuffer(message, np.uint8)
    first = np.asarray(multihost_utils.broadcast_one_to_all(first), np.uint8)
    length = int.from_bytes(first[:8].tobytes(), "little")
    if length <= _MESSAGE_BYTES - 8:
        return first[8 : 8 + length].tobytes()
    # A power of two, so that few programs are compiled.
    rest = np.zeros((1 << (length - 1).bit_length(),), np.uint8)
    if leads:
        rest[:length] = np.frombuffer(message, np.uint8)
    rest = np.asarray(multihost_utils.broadcast_one_to_all(rest), np.uint8)
    return rest[:length].tobytes()
