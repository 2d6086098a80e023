"""The registry of backends, and what ``backend="auto"`` means on each platform.

An op (``swa_prefill``, ``swa_decode``, ``grouped_matmul``) registers a function per backend name.
The function takes the op's validated arguments and either computes or raises
``NotImplementedError``; nothing here falls back on its own, so a backend that the caller named is
the one that runs.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax

logger = logging.getLogger(__name__)

# platform -> names in order of preference; the first one that the op has registered is taken.
_AUTO_ORDER = {
    "cpu": ("xla",),
    "gpu": ("pallas_gpu", "xla"),
    "tpu": ("pallas_tpu", "xla"),
}
_REGISTRY: dict[str, dict[str, Callable[..., Any]]] = {}
_LIMITS: dict[tuple[str, str], Callable[[Any], tuple[str, ...]]] = {}


def register_backend(
    op: str, name: str, *, limits: Callable[[Any], tuple[str, ...]] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: make the function the backend ``name`` of ``op``.

    Args:
      op: the operation.
      name: of the backend.
      limits: why the backend cannot compute given arguments, empty when it can; ``"auto"`` then
        takes the next one. None: it takes whatever the op does.

    Raises:
      ValueError: the op already has a backend of that name.
    """

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        backends = _REGISTRY.setdefault(op, {})
        if name in backends:
            raise ValueError(
                f"backend: expected a new name for {op}, got {name!r}, which is taken; "
                "register under another name"
            )
        backends[name] = function
        if limits is not None:
            _LIMITS[op, name] = limits
        return function

    return add


def available_backends(op: str = "swa_prefill") -> tuple[str, ...]:
    """Names that ``backend=`` takes for ``op``, sorted, without ``"auto"``.

    >>> available_backends("swa_decode")
    ('pallas_tpu', 'reference', 'xla')
    """
    return tuple(sorted(_REGISTRY.get(op, {})))


def resolve_backend(
    name: str = "auto", *, op: str = "swa_prefill", platform: str | None = None
) -> str:
    """The backend that ``name`` stands for.

    Args:
      name: ``"auto"`` or one of :func:`available_backends`.
      op: ``"swa_prefill"``, ``"swa_decode"`` or ``"grouped_matmul"``.
      platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``; None: this process's default.

    Returns:
      A registered name. What ``"auto"`` chose is logged once (logger ``kernels_pallas.backends``,
      INFO).

    Raises:
      ValueError: ``name`` is not registered; the message lists the names that are.
    """
    if name == "auto":
        return _resolve_auto(op, platform or jax.default_backend(), available_backends(op))
    if name not in _REGISTRY.get(op, {}):
        known = ", ".join(repr(known) for known in ("auto", *available_backends(op)))
        raise ValueError(f"backend: expected one of {known} for {op}, got {name!r}")
    return name


def get_backend(
    op: str, name: str, *, platform: str | None = None, arguments: Any = None
) -> Callable[..., Any]:
    """The function registered for what ``name`` resolves to.

    With ``arguments``, ``"auto"`` passes over backends that cannot compute them.
    """
    if name != "auto" or arguments is None:
        return _REGISTRY[op][resolve_backend(name, op=op, platform=platform)]
    registered = available_backends(op)
    while True:
        chosen = _resolve_auto(op, platform or jax.default_backend(), registered)
        limits = _LIMITS.get((op, chosen), lambda _: ())(arguments)
        if not limits:
            return _REGISTRY[op][chosen]
        _log_limits(op, chosen, limits)
        registered = tuple(name for name in registered if name != chosen)


@functools.cache
def _log_limits(op: str, name: str, limits: tuple[str, ...]) -> None:
    logger.info("%s: backend 'auto' leaves out %r: %s", op, name, "; ".join(limits))


@functools.cache
def _resolve_auto(op: str, platform: str, registered: tuple[str, ...]) -> str:
    """Cached, so that each choice is logged once a process."""
    order = _AUTO_ORDER.get(platform, ("xla",))
    chosen = next(name for name in order if name in registered)
    logger.info("%s: backend 'auto' is %r on platform %r", op, chosen, platform)
    return chosen
