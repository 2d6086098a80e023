"""One layer's attention under its policy, on one device or sharded over a mesh."""

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from kernels_pallas import swa_prefill
from swaa_jax.attention.context import attend_shard
from swaa_jax.attention.heads import join_heads, split_heads, take_heads
from swaa_jax.attention.shards import Shards
from swaa_jax.attention.stages import full_rows
from swaa_jax.attention.traced import GatedLayer, LayerChoice, LayerKind, RowWindows
from swaa_jax.policy import LayerAttention
from swaa_jax.sharding import attention_specs, target_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """How attention is computed, whatever a layer sees.

    Attributes:
        scale: factor on the scores, by default H ** -0.5.
        softcap: scores become softcap * tanh(scores / softcap).
        mesh: shard batch over data and fsdp, heads over tensor, where they divide. Its devices say
            what is compiled for.
        backend: a name from `available_backends()`, "auto", or names by op (`resolve_backend`).

    Examples:
        >>> AttentionOptions(scale=0.125, backend="xla").softcap is None
        True
    """

    scale: float | None = None
    softcap: float | None = None
    mesh: Mesh | None = None
    backend: str = "auto"

    def for_kernel(self) -> dict[str, Any]:
        """The keywords that both kernels take."""
        return {
            "scale": self.scale,
            "softcap": self.softcap,
            "backend": self.backend,
            "target": target_of(self.mesh),
        }


DEFAULT_OPTIONS = AttentionOptions()


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    layer: LayerKind,
    lengths: Int[Array, " B"] | None = None,
    stage_ids: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    options: AttentionOptions = DEFAULT_OPTIONS,
) -> Float[Array, "B T N H"]:
    """Attention of whole rows under one layer's policy (arXiv 2512.10411, section 3).

    Args:
        q, k, v: RoPE applied; N query heads share K key/value heads in groups of N // K.
        layer: what this layer sees; its full heads are KV heads, with their groups.
        lengths: real tokens of each row; later ones are padding, never seen, and give zeros.
        stage_ids: `Stage.PROMPT` or `Stage.ANSWER` of each token. None: all prompt.
        segment_ids: which of a packed row's texts each token belongs to. None: one text a row.
        options: how it is computed.

    Returns:
        What each query gathered, in q's dtype.

    Examples:
        >>> import jax.numpy as jnp
        >>> q, k = jnp.zeros((1, 4, 2, 16)), jnp.zeros((1, 4, 1, 16))  # 2 query heads, 1 KV head
        >>> v = jnp.broadcast_to(jnp.arange(4.0)[None, :, None, None], k.shape)
        >>> out = attend(q, k, v, layer=LayerAttention(window=2))
        >>> out[0, :, 0, 0].tolist()  # means over the positions that each token sees
        [0.0, 0.5, 1.5, 2.5]
    """
    again = functools.partial(
        attend,
        lengths=lengths,
        stage_ids=stage_ids,
        segment_ids=segment_ids,
        options=options,
    )
    if isinstance(layer, LayerChoice):
        branches = [functools.partial(again, layer=kind) for kind in layer.kinds]
        return jax.lax.switch(layer.index, branches, q, k, v)
    if isinstance(layer, GatedLayer):
        return layer.mix(
            again(q, k, v, layer=LayerAttention()), again(q, k, v, layer=layer.windowed)
        )
    num_kv_heads = k.shape[2]
    parts = [] if isinstance(layer, RowWindows) else split_heads(layer, num_kv_heads)
    if len(parts) > 1:
        outs = []
        for part in parts:
            take = functools.partial(take_heads, heads=part.heads, num_kv_heads=num_kv_heads)
            outs.append(again(take(q), take(k), take(v), layer=part.layer))
        return join_heads(outs, [part.heads for part in parts])
    layer = parts[0].layer if parts else layer
    q_full = full_rows(
        layer,
        shape=(q.shape[0], q.shape[1]),
        stage_ids=stage_ids,
        lengths=lengths,
        segment_ids=segment_ids,
    )
    kernel: Any = functools.partial(
        swa_prefill,
        window=layer.window,
        num_sink_tokens=layer.num_sink_tokens,
        **options.for_kernel(),
    )
    per_row = {"q_full": q_full, "lengths": lengths, "segment_ids": segment_ids}
    if isinstance(layer, RowWindows):
        per_row["window"] = layer.window  # in place of the kernel's static one
    per_row = {name: value for name, value in per_row.items() if value is not None}

    mesh = options.mesh
    if mesh is None:
        return kernel(q, k, v, **per_row)
    batch, num_tokens = q.shape[:2]
    heads, rows = attention_specs(
        mesh, batch=batch, num_kv_heads=num_kv_heads, num_tokens=num_tokens
    )
    shards = Shards.of(heads, mesh.shape, num_tokens)

    def on_shard(q: Array, k: Array, v: Array, per_row: dict[str, Any]) -> Any:
        if shards is None:
            return kernel(q, k, v, **per_row)
        return attend_shard(
            kernel,
            q,
            k,
            v,
            per_row,
            shards=shards,
            window=layer.window if isinstance(layer, LayerAttention) else None,
            num_sink_tokens=layer.num_sink_tokens,
        )

    tokens = PartitionSpec(*heads[:2])
    specs = {name: rows if array.ndim == 1 else tokens for name, array in per_row.items()}
    mapped = jax.shard_map(
        on_shard,
        mesh=mesh,
        in_specs=(heads, heads, heads, specs),
        out_specs=heads,
        check_vma=False,
    )
    return mapped(q, k, v, per_row)
