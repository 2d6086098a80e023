"""The registry of backends, and what ``backend="auto"`` means on each platform.

An op (``swa_prefill``, ``swa_decode``, ``grouped_matmul``) registers a function per backend name.
The function takes the op's validated arguments and either computes or raises
``NotImplementedError``; nothing here falls back on its own, so a backend that the caller named is
the one that runs.

A choice is a name for all ops, or names for some of them; ops not named are left to ``auto``::

    "auto"    "xla"    "swa_prefill=pallas_tpu,swa_decode=xla"

The environment's ``SWAA_BACKEND`` is such a choice, and stands in for ``auto`` wherever that is
asked for. It is read when a program is traced.
"""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Mapping
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
# Backends that run on one platform only; the others run on all.
_PLATFORM = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}
_VARIABLE = "SWAA_BACKEND"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What a program is compiled for, which need not be a device of this process.

    Attributes:
      platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
      device_kind: the chip, as ``jax.Device.device_kind`` names it; block sizes depend on it.
    """

    platform: str
    device_kind: str

    @classmethod
    def of(cls, device: Any) -> "Target":
        """Of a device; a topology's will do, attached or not."""
        return cls(platform=device.platform, device_kind=device.device_kind)

    @classmethod
    def here(cls) -> "Target":
        """This process's first device."""
        return cls.of(jax.devices()[0])


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
    """The backend that a choice stands for.

    Args:
      name: ``"auto"``, one of :func:`available_backends`, or names for some ops
        (``"swa_prefill=xla,swa_decode=reference"``; ``auto`` for the others).
      op: ``"swa_prefill"``, ``"swa_decode"`` or ``"grouped_matmul"``.
      platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``; None: this process's default.

    Returns:
      A registered name. What ``"auto"`` chose is logged once (logger ``kernels_pallas.backends``,
      INFO).

    Raises:
      ValueError: the choice, or the environment's ``SWAA_BACKEND``, names a backend or an op that
        is not registered; the message lists the names that are.
    """
    chosen = _named(name, op)
    if chosen is None:
        return _resolve_auto(op, platform or jax.default_backend(), available_backends(op))
    return chosen


def get_backend(
    op: str, name: str, *, platform: str | None = None, arguments: Any = None
) -> Callable[..., Any]:
    """The function registered for what ``name`` resolves to.

    With ``arguments``, ``"auto"`` passes over backends that cannot compute them, and the platform
    is that of their ``target``.

    Raises:
      ValueError: as :func:`resolve_backend`.
      NotImplementedError: with ``arguments``: the named backend does not run on the platform.
    """
    chosen = _named(name, op)
    if arguments is None:
        return _REGISTRY[op][chosen or resolve_backend(op=op, platform=platform)]
    target: Target | None = getattr(arguments, "target", None)
    platform = platform or (jax.default_backend() if target is None else target.platform)
    if chosen is not None:
        _check_platform(op, chosen, platform)
        return _REGISTRY[op][chosen]
    registered = available_backends(op)
    while True:
        chosen = _resolve_auto(op, platform, registered)
        limits = _LIMITS.get((op, chosen), lambda _: ())(arguments)
        if not limits:
            return _REGISTRY[op][chosen]
        _log_limits(op, chosen, limits)
        registered = tuple(name for name in registered if name != chosen)


def check_backend(choice: str, *, platform: str | None = None) -> None:
    """Raise now what some op would raise later, when it is called with this choice.

    Args:
      choice: as in :func:`resolve_backend`.
      platform: where it has to run; None: this process's default.

    Raises:
      ValueError, NotImplementedError: as :func:`get_backend`.
    """
    for op in sorted(_REGISTRY):
        chosen = _named(choice, op)
        if chosen is not None:
            _check_platform(op, chosen, platform or jax.default_backend())


def _named(choice: str, op: str) -> str | None:
    """The backend that the choice, else the environment, names for ``op``; None: it is auto's."""
    chosen = _parse(choice, source="backend").get(op, "auto")
    if chosen != "auto":
        return _check_name(chosen, op, source="backend")
    chosen = _parse(os.environ.get(_VARIABLE) or "auto", source=_VARIABLE).get(op, "auto")
    if chosen == "auto":
        return None
    _log_variable(op, _check_name(chosen, op, source=_VARIABLE))
    return chosen


def _parse(choice: str, *, source: str) -> Mapping[str, str]:
    """Backend by op. Names are not checked: of another op they do not matter here."""
    if "=" not in choice:
        return dict.fromkeys(_REGISTRY, choice.strip())
    named: dict[str, str] = {}
    for part in choice.split(","):
        op, equals, backend = (piece.strip() for piece in part.partition("="))
        if op not in _REGISTRY or not equals or not backend or op in named:
            raise ValueError(
                f"{source}: expected a backend, or one for each of some ops among "
                f"{', '.join(sorted(_REGISTRY))}, as in 'swa_prefill=xla,swa_decode=reference'; "
                f"got {choice!r}"
            )
        named[op] = backend
    return named


def _check_name(name: str, op: str, *, source: str) -> str:
    if name in _REGISTRY.get(op, {}):
        return name
    known = ", ".join(repr(known) for known in ("auto", *available_backends(op)))
    others = [other for other in sorted(_REGISTRY) if name in _REGISTRY[other]]
    hint = f"; for {others[0]} alone write '{others[0]}={name}'" if others else ""
    raise ValueError(f"{source}: expected one of {known} for {op}, got {name!r}{hint}")


def _check_platform(op: str, name: str, platform: str) -> None:
    needed = _PLATFORM.get(name, platform)
    if needed != platform and not (needed == "tpu" and _is_interpreted()):
        raise NotImplementedError(
            f"{op}: backend {name!r} expects platform {needed!r}, got {platform!r}; pass "
            "backend='auto' or 'xla', or, when compiling for a device that is not attached, say "
            "so with target= (a model: with mesh=)"
        )


def _is_interpreted() -> bool:
    """Whether ``pltpu.force_tpu_interpret_mode`` is on, which has no public name to ask by."""
    try:
        from jax._src import config

        return config.pallas_tpu_interpret_mode_context_manager.value is not None
    except (ImportError, AttributeError):
        return True  # cannot tell: JAX refuses by itself what it cannot run


@functools.cache
def _log_variable(op: str, name: str) -> None:
    logger.info("%s: backend %r, from the environment's %s", op, name, _VARIABLE)


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
