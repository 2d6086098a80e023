"""A server of this process on a port of its own, and clients for it."""

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import jaxtyping
import uvicorn
from starlette.applications import Starlette


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """A running server.

    Attributes:
        url: without a path.
        server: uvicorn's.
    """

    url: str
    server: uvicorn.Server

    def post(self, path: str, body: Any, **kwargs: Any) -> httpx2.Response:
        """A request with a JSON body."""
        return httpx2.post(f"{self.url}{path}", json=body, timeout=120, **kwargs)

    def get(self, path: str, **kwargs: Any) -> httpx2.Response:
        """A request without a body."""
        return httpx2.get(f"{self.url}{path}", timeout=120, **kwargs)


@contextlib.contextmanager
def running(app: Starlette) -> Iterator[Served]:
    """Serves until the block ends, which waits for what is being answered.

    Annotations are not checked meanwhile, as they are not where users serve: what a client sends
    must meet the server's own checks.
    """
    checked = jaxtyping.config.jaxtyping_disable
    config = uvicorn.Config(
        app, port=0, log_config=None, lifespan="on", timeout_graceful_shutdown=20
    )
    server = uvicorn.Server(config)
    socket = config.bind_socket()
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[socket])))
    jaxtyping.config.update("jaxtyping_disable", True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            threading.Event().wait(0.01)
        assert server.started
        yield Served(url=f"http://127.0.0.1:{socket.getsockname()[1]}", server=server)
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        socket.close()
        jaxtyping.config.update("jaxtyping_disable", checked)
        assert not thread.is_alive()
