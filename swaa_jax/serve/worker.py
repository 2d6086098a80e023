"""`EngineWorker`: an engine on a thread of its own, for callers on an event loop.

    event loop   submit, cancel  --commands-->  thread: round, round, round ...
                 Feed  <--updates, a message a round--'

The engine belongs to the thread: nothing else touches it. Commands wait for the end of a round.
"""

import asyncio
import collections
import contextlib
import dataclasses
import functools
import logging
import math
import queue
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

from swaa_jax.engine import Engine, EngineClock, Request, Update

__all__ = ["BusyError", "EngineFailedError", "EngineWorker", "Feed"]

log = logging.getLogger(__name__)

_SWITCH_S = 1e-4
_BEAT_S = 1.0
"""Between two rounds of an engine that has nothing to do."""
_LOOK_S = 0.2
"""Between two looks at what there is to do."""


class BusyError(Exception):
    """As many requests wait as may."""


class EngineFailedError(Exception):
    """The engine answers no more: a step failed, or the server ends."""


class Feed(AsyncIterator[Update]):
    """A request's updates, up to the one with a reason.

    Raises:
        EngineFailedError: the engine failed before the request ended.
    """

    def __init__(self, number: int, cancel: Callable[[int], None]):
        self.number = number
        self._cancel = cancel
        self._updates: collections.deque[Update] = collections.deque()
        self._arrived = asyncio.Event()
        self._failure: EngineFailedError | None = None
        self._is_over = False

    async def __anext__(self) -> Update:
        while not self._updates:
            if self._failure is not None:
                raise self._failure
            if self._is_over:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        update = self._updates.popleft()
        self._is_over = update.reason is not None
        return update

    def close(self) -> None:
        """Wants no more; the engine lets the request go if it is not over."""
        if not self._is_over:
            self._is_over = True
            self._cancel(self.number)

    def put(self, update: Update) -> None:
        """On the event loop."""
        self._updates.append(update)
        self._arrived.set()

    def fail(self, failure: EngineFailedError) -> None:
        """On the event loop."""
        self._failure = failure
        self._arrived.set()


class EngineWorker:
    """Runs an engine as long as there is something to do.

    Args:
        engine: not to be used by anybody else from now on.
        most_requests: that may be left at a time, those that wait for a slot included.
        on_end: called on the thread when it ends.
    """

    def __init__(
        self, engine: Engine, *, most_requests: int, on_end: Callable[[], None] = lambda: None
    ):
        self._engine, self._most, self._on_end = engine, most_requests, on_end
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._feeds: dict[int, Feed] = {}  # of the event loop
        self._pending = 0  # submitted and not known to the engine yet; of the event loop
        self._failure: EngineFailedError | None = None
        self._ends = False
        self._loads: dict[str, dict[str, int]] = {}
        self._looked = -math.inf
        self._look()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def failure(self) -> EngineFailedError | None:
        """Why nothing is answered any more; None: all is well."""
        return self._failure

    @property
    def num_requests(self) -> int:
        """Requests that are left, for the event loop."""
        return len(self._feeds) + self._pending

    @property
    def clock(self) -> EngineClock:
        """What the engine has done; numbers that are read while they change."""
        return dataclasses.replace(self._engine.clock)

    def row_bytes(self, name: str, num_tokens: int) -> int:
        """Of keys and values of a model's row of so many tokens."""
        return self._engine.row_bytes(name, num_tokens)

    @property
    def loads(self) -> dict[str, dict[str, int]]:
        """What each model has to do, for all to look at; it may be a moment old."""
        return self._loads

    def start(self) -> None:
        """Begins, on the event loop that all other calls come from."""
        self._loop = asyncio.get_running_loop()
        # Else the device waits up to 5 ms for the event loop to let the engine's thread go on.
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_S))
        self._thread.start()

    async def submit(self, *requests: Request) -> list[Feed]:
        """Hands requests over, all or none of them.

        Raises:
            BusyError: there are too many already.
            EngineFailedError: nothing is answered any more.
            ValueError: one can never be answered.
        """
        if self._failure is not None:
            raise self._failure
        if self._ends:
            raise EngineFailedError("the server is shutting down")
        if self.num_requests + len(requests) > self._most:
            raise BusyError
        loop = asyncio.get_running_loop()
        accepted: asyncio.Future[list[Feed]] = loop.create_future()
        self._pending += len(requests)

        def hand_over() -> None:
            numbers: list[int] = []
            try:
                for request in requests:
                    numbers.append(self._engine.submit(request))
            except ValueError as error:
                for number in numbers:
                    self._engine.cancel(number)
                loop.call_soon_threadsafe(refuse, error)
            else:
                loop.call_soon_threadsafe(accept, numbers)

        def refuse(error: Exception) -> None:
            self._pending -= len(requests)
            if not accepted.done():
                accepted.set_exception(error)

        def accept(numbers: list[int]) -> None:
            self._pending -= len(requests)
            feeds = [Feed(number, self._let_go) for number in numbers]
            self._feeds |= {feed.number: feed for feed in feeds}
            if self._failure is not None:
                refused_late = self._failure
                for feed in feeds:
                    feed.fail(refused_late)
            if accepted.done():  # the caller is gone
                for feed in feeds:
                    feed.close()
            else:
                accepted.set_result(feeds)

        self._commands.put(hand_over)
        return await accepted

    def _let_go(self, number: int) -> None:
        """On the event loop: a request whose answer nobody wants."""
        self._feeds.pop(number, None)

        def cancel() -> None:
            if number in self._engine.unfinished:
                self._engine.cancel(number)

        self._commands.put(cancel)

    async def warm_up(self, names: Sequence[str]) -> None:
        """Compiles and runs each model's programs once, so that no client waits for that: a chunk
        is read and kept, and reused by the one that asks the same.
        """
        for name in names:
            options = self._engine.options[name]
            count = options.sizes[0] + 1
            tokens = (0,) * count if count + 2 <= options.max_tokens else (0,)
            for _ in range(2):
                (feed,) = await self.submit(Request(tokens=tokens, max_new_tokens=2, model=name))
                async for _ in feed:
                    pass

    async def stop(self, *, within: float) -> int:
        """Takes no more requests, and ends when none is left or the time is over.

        Returns:
            how many were left, which are told that the engine failed.
        """
        self._ends = True
        loop = asyncio.get_running_loop()
        end = loop.time() + within
        while self.num_requests and self._failure is None and loop.time() < end:
            await asyncio.sleep(0.05)
        left = list(self._feeds.values())
        self._fail_all(EngineFailedError("the server is shutting down"))
        self._commands.put(self._end)
        await asyncio.to_thread(self._thread.join, 60)
        return len(left)

    def _end(self) -> None:
        raise _EndError

    def _run(self) -> None:
        updates: list[Update] = []
        try:
            while True:
                self._obey(wait=self._engine.is_idle)
                # Clients are told of a round when the device has the next one, so that the event
                # loop and this thread are not busy at the same time. An idle engine's rounds count,
                # too: other processes wait for them.
                updates = self._engine.round(meanwhile=functools.partial(self._hand_out, updates))
                if self._engine.is_idle:
                    self._hand_out(updates)
                    updates = []
                self._look()
        except _EndError:
            self._on_end()
        except BaseException as error:
            log.exception("engine: a round failed; nothing is answered any more")
            failure = EngineFailedError(f"the engine failed: {type(error).__name__}")
            self._tell(self._fail_all, failure)
            self._refuse_commands()

    def _hand_out(self, updates: list[Update]) -> None:
        if updates:
            self._tell(self._deliver, updates)

    def _look(self) -> None:
        """Now and then, and when there is nothing to do any more."""
        now = time.monotonic()
        if self._engine.is_idle or now > self._looked + _LOOK_S:
            loads = self._engine.loads
            self._loads = {name: dataclasses.asdict(load) for name, load in loads.items()}
            self._looked = now

    def _obey(self, *, wait: bool) -> None:
        """Runs the commands that are there; waits for one, a while, if nothing else is to do."""
        with contextlib.suppress(queue.Empty):
            if wait:
                self._commands.get(timeout=_BEAT_S)()
            while True:
                self._commands.get_nowait()()

    def _refuse_commands(self) -> None:
        """Whoever comes later learns of the failure, and nothing waits for ever."""
        while True:
            try:
                self._commands.get()()
            except _EndError:
                return
            except Exception:
                continue

    def _tell(self, what: Callable[..., None], *args: object) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(what, *args)

    def _deliver(self, updates: list[Update]) -> None:
        for update in updates:
            feed = self._feeds.get(update.request)
            if feed is not None:
                feed.put(update)
                if update.reason is not None:
                    del self._feeds[update.request]

    def _fail_all(self, failure: EngineFailedError) -> None:
        self._failure = failure
        feeds, self._feeds = self._feeds, {}
        for feed in feeds.values():
            feed.fail(failure)


class _EndError(Exception):
    """The thread's last command."""
