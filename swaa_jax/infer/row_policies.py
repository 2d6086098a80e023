"""Every row of a batch under a policy of its own, in one program: its windows are traced."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Int

from swaa_jax.attention import LayerKind, RowWindows
from swaa_jax.models import CausalLM
from swaa_jax.policy import LayerAttention

__all__ = ["row_kinds", "row_windows", "run_kinds"]


def row_windows(layers: Sequence[LayerAttention], width: int) -> Int[np.ndarray, " L"]:
    """Each layer's window, for rows of `width` tokens: those see everything in a full layer."""
    return np.minimum(np.array([layer.window or width for layer in layers], np.int32), width)


def row_kinds(layers: Sequence[LayerAttention], windows_LB: Int[Array, "L B"]) -> list[RowWindows]:
    """The layers with the rows' windows; sinks, decoding and tail are what all rows share."""
    return [
        RowWindows(
            window=windows_LB[number],
            num_sink_tokens=layer.num_sink_tokens,
            full_decode=layer.full_decode,
            full_attention_tail=layer.full_attention_tail,
        )
        for number, layer in enumerate(layers)
    ]


def run_kinds(
    model: CausalLM, kinds: Sequence[LayerKind]
) -> Callable[[Any, Any], tuple[Any, list[Any]]]:
    """What `CausalLM.hidden_states` takes as `run_layers`: the layers, as those kinds say."""

    def run(x: Any, rows: Any) -> tuple[Any, list[Any]]:
        routers = []
        for block, kind in zip(model.layers, kinds, strict=True):
            output = block(x, rows, layer=kind)
            x = output.x
            routers.append(output.router)
        return x, routers

    return run
