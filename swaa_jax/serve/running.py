"""`run_server`: an application on a port, until somebody ends it."""

import asyncio
import contextlib
import ipaddress
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette

from swaa_jax.fields import integer

__all__ = ["bind", "is_local", "run_server"]


def run_server(
    app: Starlette, *, bound: socket.socket, drain_s: float, announce: Callable[[str], None]
) -> None:
    """Serves until SIGTERM or SIGINT; answers that are being made then have `drain_s` seconds.

    Whoever is left gets an error, and so does who comes meanwhile. A second SIGINT ends at once.

    Args:
        app: from `make_app`.
        bound: where, from `bind`.
        drain_s: seconds.
        announce: told the URL, once requests are taken.
    """
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, lifespan="on"
    )
    host, port = bound.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    server = _Server(config, lambda: announce(url), drain=app.state.drain, drain_s=drain_s)
    server.run(sockets=[bound])


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address of this machine, which takes nobody in yet; port 0 is a free one.

    Raises:
        ValueError: no such port, or it is taken, or not ours to take.
    """
    integer(least=0, most=65535)("port", port)
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ValueError(
            f"--host, --port: expected an address of this machine and a free port, got {host} and "
            f"{port} ({error.strerror or error}); choose another port, or 0 for any"
        ) from error
    return bound


class _Server(uvicorn.Server):
    """Says when it is ready, and ends with its own exit code, not by the signal that ended it."""

    def __init__(
        self,
        config: uvicorn.Config,
        announce: Callable[[], None],
        *,
        drain: Callable[[], Awaitable[None]],
        drain_s: float,
    ):
        super().__init__(config)
        self._announce, self._drain, self._drain_s = announce, drain, drain_s

    async def startup(self, sockets: list[Any] | None = None) -> None:
        """Takes requests from here on."""
        await super().startup(sockets)
        if self.started:
            self._announce()

    async def shutdown(self, sockets: list[Any] | None = None) -> None:
        """Ends answers first: uvicorn alone would cut connections, and nobody be told why."""
        end = time.monotonic() + self._drain_s
        draining = asyncio.ensure_future(self._drain())
        while not draining.done() and not self.force_exit:
            await asyncio.wait({draining}, timeout=0.1)
        # What is not sent yet, to slow readers.
        self.config.timeout_graceful_shutdown = max(1, round(end - time.monotonic()))
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Takes both signals, and gives them back afterwards."""
        before = {one: signal.signal(one, self.handle_exit) for one in _SIGNALS}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def is_local(host: str) -> bool:
    """Whether a server there is for this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
