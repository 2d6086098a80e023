"""Which code computes an operation: the table of backends, and what ``backend="auto"`` means.

Nothing here falls back on its own: a backend that the caller named is the one that runs, or
``NotImplementedError`` says what it cannot do.

A choice is a name for all operations, or names for some of them; those not named are left to
``auto``::

    "auto"    "xla"    "swa_prefill=pallas_tpu,swa_decode=xla"

The environment's ``SWAA_BACKEND`` is such a choice, and stands in for ``auto`` wherever that is
asked for. It is read when a program is traced.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax

from kernels_pallas.checks import echo

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """A line of the table.

    Attributes:
      platform: the only one that it runs on; None: it runs on all.
      by_name_only: ``auto`` never takes it.
    """

    platform: str | None = None
    by_name_only: bool = False


BACKENDS: dict[str, dict[str, Backend]] = {
    "swa_prefill": {
        "pallas_tpu": Backend(platform="tpu"),
        "pallas_gpu": Backend(platform="gpu"),
        "pallas_triton": Backend(platform="gpu"),
        "cudnn": Backend(platform="gpu"),
        "xla": Backend(),
        "reference": Backend(by_name_only=True),
    },
    "swa_decode": {
        "pallas_tpu": Backend(platform="tpu"),
        "pallas_gpu": Backend(platform="gpu"),
        "pallas_triton": Backend(platform="gpu"),
        "xla": Backend(),
        "reference": Backend(by_name_only=True),
    },
    "grouped_matmul": {
        "pallas_tpu": Backend(platform="tpu"),
        "pallas_gpu": Backend(platform="gpu"),
        "xla": Backend(),
        "ragged_dot": Backend(by_name_only=True),
        "reference": Backend(by_name_only=True),
    },
}
"""By operation, in the order in which ``auto`` tries them where they run.

The backend NAME of OP is the module ``kernels_pallas.OP.NAME``, imported when it is first asked
for; :class:`BackendModule` says what is in it. A new backend is a module and a line here.
"""

_VARIABLE = "SWAA_BACKEND"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What a program is compiled for, which need not be a device of this process.

    Attributes:
      platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
      device_kind: the chip, as ``jax.Device.device_kind`` names it; block sizes depend on it.

    Examples:
      >>> import jax
      >>> Target.of(jax.devices("cpu")[0]).platform
      'cpu'
      >>> Target(platform="tpu", device_kind="TPU v5 lite").device_kind  # that is not attached
      'TPU v5 lite'
    """

    platform: str
    device_kind: str

    @classmethod
    def of(cls, device: Any) -> "Target":
        """The target of a device; one of a topology, which is not attached, will do."""
        return cls(platform=device.platform, device_kind=device.device_kind)

    @classmethod
    def here(cls) -> "Target":
        """This process's first device."""
        return cls.of(jax.devices()[0])


@runtime_checkable
class BackendModule(Protocol):
    """What a backend's module holds; besides, ``drawbacks(arguments)`` if it has any."""

    def limits(self, arguments: Any) -> tuple[str, ...]:
        """Why it cannot compute the arguments, ``name: expected X, got Y`` each; empty: it can."""
        ...

    def compute(self, arguments: Any) -> Any:
        """The result, for arguments without limits."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """Which backend computes an operation, and why not another.

    Attributes:
      op: the operation.
      name: the backend.
      platform: that it was chosen for.
      is_named: it was asked for by name; else ``auto`` took it.
      left_out: those before it in the table, each with what speaks against it.

    Examples:
      >>> choice = Choice(op="swa_prefill", name="xla", platform="gpu", left_out=(("cudnn", "q"),))
      >>> str(choice)
      "swa_prefill: backend 'auto' is 'xla' on platform 'gpu'; it leaves out 'cudnn': q"
    """

    op: str
    name: str
    platform: str
    is_named: bool = False
    left_out: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        if self.is_named:
            return f"{self.op}: backend {self.name!r}, as asked for"
        why = "".join(f"; it leaves out {name!r}: {reason}" for name, reason in self.left_out)
        return f"{self.op}: backend 'auto' is {self.name!r} on platform {self.platform!r}{why}"


_RECORDS: list[dict[Choice, None]] = []


@contextlib.contextmanager
def record_choices() -> Iterator[Mapping[Choice, None]]:
    """Collects the choices of programs that are traced within, each once, in their order.

    A program that was traced before makes none.

    Examples:
      >>> import jax.numpy as jnp
      >>> from kernels_pallas import grouped_matmul
      >>> with record_choices() as found:
      ...     x = grouped_matmul(jnp.ones((4, 1)), jnp.ones((1, 1, 1)), jnp.array([4]))
      >>> [choice.name for choice in found]
      ['xla']
    """
    found: dict[Choice, None] = {}
    _RECORDS.append(found)
    try:
        yield found
    finally:
        _RECORDS[:] = [one for one in _RECORDS if one is not found]


def no_limits(arguments: object) -> tuple[str, ...]:
    """The limits of a backend that computes whatever its operation takes."""
    del arguments
    return ()


def available_backends(op: str = "swa_prefill") -> tuple[str, ...]:
    """Names that ``backend=`` takes for ``op``, sorted, without ``"auto"``.

    >>> available_backends("swa_decode")
    ('pallas_gpu', 'pallas_tpu', 'pallas_triton', 'reference', 'xla')
    """
    return tuple(sorted(BACKENDS.get(op, {})))


def resolve_backend(
    name: str = "auto", *, op: str = "swa_prefill", platform: str | None = None
) -> str:
    """The backend that a choice stands for, if the arguments are within its limits.

    Args:
      name: ``"auto"``, one of :func:`available_backends`, or names for some ops
        (``"swa_prefill=xla,swa_decode=reference"``; ``auto`` for the others).
      op: ``"swa_prefill"``, ``"swa_decode"`` or ``"grouped_matmul"``.
      platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``; None: this process's default.

    Returns:
      A name of the table. What ``"auto"`` chose is logged once (logger ``kernels_pallas.backends``,
      INFO).

    Raises:
      ValueError: the choice, or the environment's ``SWAA_BACKEND``, names a backend or an op that
        is not in the table; the message lists the names that are.

    Examples:
      >>> resolve_backend(platform="tpu"), resolve_backend("xla", platform="tpu")
      ('pallas_tpu', 'xla')
      >>> resolve_backend("swa_prefill=reference", op="swa_decode", platform="cpu")
      'xla'
    """
    named, platform = _named(name, op), platform or jax.default_backend()
    if named is not None:
        return named
    found = _candidates(op, platform)[0]
    _log_choice(Choice(op=op, name=found, platform=platform))
    return found


def choose_backend(op: str, choice: str, arguments: Any) -> str:
    """The backend that computes these arguments on the platform of their ``target``.

    ``"auto"`` passes over backends that have limits there, or drawbacks: why another one is the
    better, although this one could compute the arguments.

    Raises:
      ValueError: as :func:`resolve_backend`.
      NotImplementedError: the named backend does not run on the platform, or has limits there.
    """
    platform = (arguments.target or Target.here()).platform
    named = _named(choice, op)
    if named is not None:
        _check_platform(op, named, platform)
        limits = load_backend(op, named).limits(arguments)
        if limits:
            raise NotImplementedError(
                f"{op}: backend {named!r} cannot compute this: {'; '.join(limits)}; change that, "
                "or pass backend='auto' or 'xla'"
            )
        return _chosen(Choice(op=op, name=named, platform=platform, is_named=True))
    left_out: list[tuple[str, str]] = []
    for name in _candidates(op, platform):
        module = load_backend(op, name)
        against = module.limits(arguments) or getattr(module, "drawbacks", no_limits)(arguments)
        if not against:
            return _chosen(Choice(op=op, name=name, platform=platform, left_out=tuple(left_out)))
        left_out.append((name, "; ".join(against)))
    why = "; ".join(f"{name!r}: {reason}" for name, reason in left_out)
    raise NotImplementedError(
        f"{op}: expected a backend without limits on platform {platform!r}, got none ({why})"
    )


def _chosen(choice: Choice) -> str:
    """The name; the choice is logged, and kept for whoever collects them."""
    for found in _RECORDS:
        found[choice] = None
    if not choice.is_named:
        _log_choice(choice)
    return choice.name


def compute(op: str, choice: str, arguments: Any) -> Any:
    """The result of the backend that :func:`choose_backend` gives; it raises what that raises."""
    return load_backend(op, choose_backend(op, choice, arguments)).compute(arguments)


def load_backend(op: str, name: str) -> BackendModule:
    """The module of a backend of the table."""
    module: Any = importlib.import_module(f"kernels_pallas.{op}.{name}")
    return module


def check_backend(choice: str, *, platform: str | None = None) -> None:
    """Raise now what some op would raise later, when it is called with this choice.

    Args:
      choice: as in :func:`resolve_backend`.
      platform: where it has to run; None: this process's default.

    Raises:
      ValueError, NotImplementedError: as :func:`choose_backend`, but for limits.

    Examples:
      >>> check_backend("swa_prefill=pallas_tpu,swa_decode=xla", platform="tpu")
      >>> check_backend("palas_tpu", platform="tpu")
      Traceback (most recent call last):
          ...
      ValueError: backend: expected one of ... (did you mean 'pallas_tpu'?)
    """
    named = {op: _named(choice, op) for op in BACKENDS}
    for op, name in named.items():
        if name is not None:
            _check_platform(op, name, platform or jax.default_backend())


def _named(choice: str, op: str) -> str | None:
    """The backend that the choice, else the environment, names for ``op``; None leaves it to
    ``auto``.
    """
    chosen = _parse(choice, source="backend").get(op, "auto")
    if chosen != "auto":
        return _check_name(chosen, op, source="backend")
    chosen = _parse(os.environ.get(_VARIABLE) or "auto", source=_VARIABLE).get(op, "auto")
    if chosen == "auto":
        return None
    _log_variable(op, _check_name(chosen, op, source=_VARIABLE))
    return chosen


def _parse(choice: str, *, source: str) -> Mapping[str, str]:
    """Reads a backend for each op. Names are not checked: those of other ops do not matter here."""
    if "=" not in choice:
        return dict.fromkeys(BACKENDS, choice.strip())
    named: dict[str, str] = {}
    for part in choice.split(","):
        op, equals, backend = (piece.strip() for piece in part.partition("="))
        if op not in BACKENDS or not equals or not backend or op in named:
            raise ValueError(
                f"{source}: expected a backend, or one for each of some ops among "
                f"{', '.join(BACKENDS)}, as in 'swa_prefill=xla,swa_decode=reference'; "
                f"got {echo(choice)}"
            )
        named[op] = backend
    return named


def _check_name(name: str, op: str, *, source: str) -> str:
    if name in BACKENDS.get(op, {}):
        return name
    known = ("auto", *available_backends(op))
    others = [other for other in BACKENDS if name in BACKENDS[other]]
    near = difflib.get_close_matches(name[:80], known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    hint = f"; for {others[0]} alone write '{others[0]}={name}'" if others else hint
    expected = ", ".join(map(repr, known))
    raise ValueError(f"{source}: expected one of {expected} for {op}, got {echo(name)}{hint}")


def _check_platform(op: str, name: str, platform: str) -> None:
    needed = BACKENDS[op][name].platform or platform
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


def _candidates(op: str, platform: str) -> tuple[str, ...]:
    """What ``auto`` takes on the platform, best first."""
    return tuple(
        name
        for name, backend in BACKENDS[op].items()
        if not backend.by_name_only and backend.platform in (None, platform)
    )


@functools.cache
def _log_choice(choice: Choice) -> None:
    logger.info("%s", choice)


@functools.cache
def _log_variable(op: str, name: str) -> None:
    logger.info("%s: backend %r, from the environment's %s", op, name, _VARIABLE)
