"""How a command starts: alone or as one of several processes, on which mesh, with which cache."""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from swaa_jax.cli.parser import fold

if TYPE_CHECKING:
    from jax.sharding import Mesh

DTYPES = ("bfloat16", "float32", "float16")

_MESH_HELP = (
    "how the devices split the model: 'auto' (all along fsdp), or sizes such as fsdp=4,tensor=2 "
    "that multiply to the number of devices. Default: one device; auto with several processes"
)


def add_process_arguments(parser: argparse.ArgumentParser, *, mesh: bool) -> None:
    """Add the flags of process start, folded, and `--mesh` where the command can use one."""
    group = fold(
        parser.add_argument_group(
            "devices, processes, log",
            "Alone on this machine by default. Several processes run the same command, each with "
            "its own --process-id; process 0 prints and writes. The environment's "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID stand in for flags that "
            "are left out.",
        )
    )
    if mesh:
        group.add_argument("--mesh", metavar="SIZES", help=_MESH_HELP)
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is reached")
    group.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=int, metavar="I", help="this one's number, from 0")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="ask the cluster for all this: a TPU pod slice, SLURM, Open MPI, Kubernetes",
    )
    group.add_argument(
        "--distributed-timeout",
        type=int,
        default=300,
        metavar="SECONDS",
        help="how long to wait for the other processes, default 300",
    )
    group.add_argument(
        "--no-compilation-cache",
        action="store_true",
        help="compile everything anew; by default compiled programs are kept in "
        "JAX_COMPILATION_CACHE_DIR, else ~/.cache/swaa_jax/compiled",
    )
    group.add_argument("--verbose", action="store_true", help="log what is chosen and why")


def add_loading_arguments(
    parser: argparse.ArgumentParser,
    *,
    dtype_help: str = "of weights and activations, default float32 on a CPU, bfloat16 elsewhere",
    backend: str | None = "auto",
) -> None:
    """Add the flags that say how a model is loaded, folded.

    Args:
        parser: the command's.
        dtype_help: the help of `--dtype`.
        backend: the default.
    """
    group = fold(parser.add_argument_group("loading the model"))
    group.add_argument("--dtype", choices=DTYPES, help=dtype_help)
    group.add_argument("--revision", metavar="REV", help="of a hub id: a branch, a tag or a commit")
    add_config_override(group)
    group.add_argument(
        "--backend",
        metavar="NAME",
        default=backend,
        help="what computes attention and experts: auto (default; the environment's SWAA_BACKEND "
        "if set), xla, pallas_tpu, reference, or by op: swa_prefill=pallas_tpu,swa_decode=xla",
    )


def add_config_override(parser: "argparse._ActionsContainer") -> None:
    """Add `--config-override`, for every command that reads a model's config."""
    parser.add_argument(
        "--config-override",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a value of config.json in place of the model's, as JSON or plain text; repeatable; "
        "one that other fields make idle is refused",
    )


def dtype_from_args(args: argparse.Namespace) -> str:
    """What `load_model` takes as `dtype`; call `start` before."""
    from swaa_jax.models import default_dtype

    return args.dtype or default_dtype()


def config_overrides_from_args(args: argparse.Namespace) -> dict[str, object]:
    """What `load_model` takes as `config_overrides`.

    Raises:
        ValueError: malformed, or one key twice.
    """
    from swaa_jax.documents import key_value
    from swaa_jax.fields import show

    found: dict[str, object] = {}
    for setting in args.config_override:
        key, value = key_value("--config-override", setting)
        if key in found:
            raise ValueError(
                f"--config-override: expected each key once, got {show(key)} twice; leave one out"
            )
        found[key] = value
    return found


def start(args: argparse.Namespace) -> None:
    """Set up logging, join the other processes if any, and set the compilation cache.

    To be called before anything that starts JAX's backend. What other processes than 0 print from
    here on is dropped; their errors, on stderr, are not.

    Raises:
        ValueError: settings that are malformed or half given, or processes that do not meet.
    """
    from swaa_jax import runtime

    runtime.setup_logging("INFO" if args.verbose else "WARNING")
    runtime.initialize_distributed(
        args.coordinator,
        args.num_processes,
        args.process_id,
        detect=args.distributed,
        timeout_s=args.distributed_timeout,
    )
    if args.no_compilation_cache:
        runtime.disable_compilation_cache()
    else:
        runtime.enable_compilation_cache()
    if not runtime.is_main_process():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def mesh_from_args(args: argparse.Namespace) -> "Mesh | str | None":
    """What `load_model` takes as `mesh`; call `start` before.

    Raises:
        ValueError: a malformed `--mesh`, or sizes that do not fit the devices.
    """
    import jax

    if args.mesh is None:
        return "auto" if jax.process_count() > 1 else None
    return args.mesh if args.mesh == "auto" else parse_mesh(args.mesh)


def parse_mesh(text: str) -> "Mesh":
    """A mesh over all devices from its axes' sizes.

    >>> import jax
    >>> parse_mesh(f"fsdp={jax.device_count()}").shape["fsdp"] == jax.device_count()
    True

    Raises:
        ValueError: malformed, an unknown axis, or sizes that do not fit the devices.
    """
    import jax

    from swaa_jax.sharding import make_mesh, mesh_sizes

    return make_mesh(jax.devices(), **mesh_sizes("--mesh", text))
