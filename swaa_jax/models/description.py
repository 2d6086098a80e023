"""What a model is, in a line and in a notebook."""

import html
from typing import Any

import jax
import numpy as np
from flax import nnx

from swaa_jax.policy.drawing import policy_html

__all__ = ["Described", "num_parameters"]


class Described:
    """A model that says what it is; flax's own words, of every array, are `nnx.display(model)`."""

    def __repr__(self) -> str:
        """Family, size, dtype and policy, and what else there is: adapters, a mesh."""
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in _facts(self).items())})"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        """The same as a table, over the policy's drawing."""
        facts = _facts(self)
        if not facts:
            return html.escape(repr(self))
        lines = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for name, value in facts.items()
            if name != "policy"
        )
        model: Any = self
        config = model.config
        return f"<table>{lines}</table>" + policy_html(
            model.policy, config.num_layers, config.num_kv_heads
        )


def num_parameters(model: nnx.Module) -> int:
    """Numbers in a model's parameters, those of its adapters included."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _facts(model: Any) -> dict[str, str]:
    config = getattr(model, "config", None)
    policy = getattr(model, "policy", None)
    if config is None or policy is None:  # half made, or a stand-in
        return {}
    facts = {
        "family": config.model_type,
        "layers": str(config.num_layers),
        "width": str(config.hidden_size),
        "heads": f"{config.num_heads} ({config.num_kv_heads} of keys and values)",
        "vocabulary": f"{config.vocab_size:,}",
        "parameters": _count(num_parameters(model)),
        "dtype": str(model.dtype),
        "policy": str(policy),
    }
    if model.lora_config is not None:
        facts["adapters"] = _adapters(model.lora_config)
    if model.mesh is not None:
        facts["mesh"] = ",".join(f"{axis}={n}" for axis, n in model.mesh.shape.items() if n > 1)
    if model.backend != "auto":
        facts["backend"] = model.backend
    if model.source is not None:
        facts["source"] = str(model.source)
    return facts


def _adapters(config: Any) -> str:
    targets = config.target_modules
    named = targets if isinstance(targets, str) else "+".join(targets)
    return f"LoRA of rank {config.rank} on {named or '+'.join(config.target_parameters)}"


def _count(number: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)
