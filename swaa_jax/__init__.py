"""Sliding-window attention adaptation (SWAA, arXiv 2512.10411) in JAX.

The public names are loaded on first use, so that ``import swaa_jax`` stays cheap:

Examples:
    >>> import swaa_jax as swaa
    >>> policy = swaa.AttentionPolicy(window=2048, num_sink_tokens=10, decode="full")
    >>> str(policy)
    'window=2048,sinks=10,decode=full'
"""

import importlib
import importlib.metadata
import re
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swaa_jax.bench.run import bench
    from swaa_jax.checkpoint.tokenizer import load_tokenizer
    from swaa_jax.distill.run import DistillConfig, distill
    from swaa_jax.eval.evaluation import evaluate
    from swaa_jax.eval.run import EvalConfig
    from swaa_jax.eval.search import recipes, search_policy
    from swaa_jax.infer import GenerateOptions, generate, stream
    from swaa_jax.lora import LoraConfig, add_lora, load_adapter, merge_lora, save_adapter
    from swaa_jax.models.auto import load_model, save_model
    from swaa_jax.plan.api import plan
    from swaa_jax.policy import AttentionPolicy, Stage, load_policy
    from swaa_jax.selection import select_layers
    from swaa_jax.train.run import train
    from swaa_jax.train.run_config import TrainConfig

__version__ = "0.1.0"

_LAZY = {
    "AttentionPolicy": "swaa_jax.policy",
    "DistillConfig": "swaa_jax.distill",
    "EvalConfig": "swaa_jax.eval.run",
    "GenerateOptions": "swaa_jax.infer",
    "LoraConfig": "swaa_jax.lora",
    "Stage": "swaa_jax.policy",
    "TrainConfig": "swaa_jax.train",
    "add_lora": "swaa_jax.lora",
    "evaluate": "swaa_jax.eval.evaluation",
    "generate": "swaa_jax.infer",
    "load_adapter": "swaa_jax.lora",
    "load_model": "swaa_jax.models.auto",
    "load_policy": "swaa_jax.policy",
    "load_tokenizer": "swaa_jax.checkpoint.tokenizer",
    "merge_lora": "swaa_jax.lora",
    "recipes": "swaa_jax.eval.search",
    "save_adapter": "swaa_jax.lora",
    "save_model": "swaa_jax.models.auto",
    "search_policy": "swaa_jax.eval.search",
    "select_layers": "swaa_jax.selection",
    "stream": "swaa_jax.infer",
}

_CALLABLE = ("bench", "distill", "plan", "train")
"""Rooms that are also functions; see `callable_package`."""

__all__ = [
    "AttentionPolicy",
    "DistillConfig",
    "EvalConfig",
    "GenerateOptions",
    "LoraConfig",
    "Stage",
    "TrainConfig",
    "__version__",
    "add_lora",
    "bench",
    "distill",
    "evaluate",
    "generate",
    "load_adapter",
    "load_model",
    "load_policy",
    "load_tokenizer",
    "merge_lora",
    "plan",
    "recipes",
    "save_adapter",
    "save_model",
    "search_policy",
    "select_layers",
    "stream",
    "train",
]

_OLDEST_JAX = (0, 10)


def _release(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: ``"0.10.2.dev1"`` gives ``(0, 10, 2)``."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _check_jax(installed: str, imported: str | None) -> None:
    """Refuses an old JAX, installed or already imported (in a notebook, before an upgrade).

    Args:
        installed: version of the installed distribution.
        imported: version of the module in this process, None where it is not imported yet.

    Raises:
        ImportError: either is older than ``_OLDEST_JAX``.
    """
    oldest = ".".join(map(str, _OLDEST_JAX))
    if _release(installed) < _OLDEST_JAX:
        raise ImportError(
            f"swaa_jax needs jax >= {oldest}, but jax {installed} is installed. "
            f'Upgrade it, pip install -U "jax>={oldest}", and restart the Python process.'
        )
    if imported is not None and _release(imported) < _OLDEST_JAX:
        raise ImportError(
            f"swaa_jax needs jax >= {oldest}. jax {installed} is installed, but this process "
            f"imported jax {imported} before the upgrade: restart the runtime and import again."
        )


_check_jax(
    importlib.metadata.version("jax"),
    getattr(sys.modules.get("jax"), "__version__", None),
)


def __getattr__(name: str) -> Any:
    if name in _CALLABLE:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
