"""The blocks that decoder families are made of, and the causal language model that stacks them.

Modules keep Hugging Face's names (`self_attn.q_proj`, ...); matrices are `kernel [in, out]`.
The policy lives on the model alone, so `with_policy` shares every block and parameter.
"""

import copy
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from kernels_pallas.mask import segment_positions
from swaa_jax.attention import Caches, FullCache, RingCache, attend, attend_cached, build_cache
from swaa_jax.models._config import DecoderConfig
from swaa_jax.models._rope import rotate, rotation
from swaa_jax.policy import AttentionPolicy, LayerAttention
from swaa_jax.sharding import constrain_batch

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class Linear(nnx.Module):
    """`x @ kernel + bias`, kernel `[in, out]`."""

    def __init__(
        self,
        shape: tuple[int, int],
        axes: tuple[str, str],
        *,
        use_bias: bool,
        std: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(
            std * jax.random.normal(rngs.params(), shape, jnp.float32).astype(dtype), axes=axes
        )
        self.bias = nnx.Param(jnp.zeros(shape[1:], dtype), axes=axes[1:]) if use_bias else None

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        y = x @ self.kernel[...]
        return y if self.bias is None else y + self.bias[...]


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale` over the last axis; statistics in float32."""

    def __init__(self, size: int, *, eps: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones((size,), dtype), axes=("norm",))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * inverse).astype(x.dtype) * self.scale[...]


class Embedding(nnx.Module):
    """A table of token vectors, `[V, D]`; `attend` is its transpose, for tied heads."""

    def __init__(self, vocab: int, size: int, *, std: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        table = std * jax.random.normal(rngs.params(), (vocab, size), jnp.float32)
        self.embedding = nnx.Param(table.astype(dtype), axes=("vocab", "embed"))

    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
        return self.embedding[...][tokens]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """What the layers need to know of a batch besides its hidden states.

    Attributes:
        cos_sin: rotation of every token's position.
        lengths, stage_ids, segment_ids: as in `swaa_jax.attention.attend`.
        pos_B: with caches, the tokens that each row has seen; None without.
    """

    cos_sin: tuple[Float[Array, "B T H"], Float[Array, "B T H"]]
    lengths: Int[Array, " B"] | None = None
    stage_ids: Int[Array, "B T"] | None = None
    segment_ids: Int[Array, "B T"] | None = None
    pos_B: Int[Array, " B"] | None = None
    mesh: Mesh | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyValues:
    """A layer's keys and values of whole rows, from which a cache is built."""

    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]


class Attention(nnx.Module):
    """Grouped-query attention under a layer's policy, with per-head q/k norms where asked."""

    def __init__(self, config: DecoderConfig, *, std: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, head_dim = config.hidden_size, config.head_dim
        q_width, kv_width = config.num_heads * head_dim, config.num_kv_heads * head_dim
        shared = {"std": std, "dtype": dtype, "rngs": rngs}
        bias = config.attention_bias
        self.q_proj = Linear((width, q_width), ("embed", "heads"), use_bias=bias, **shared)
        self.k_proj = Linear((width, kv_width), ("embed", "kv_heads"), use_bias=bias, **shared)
        self.v_proj = Linear((width, kv_width), ("embed", "kv_heads"), use_bias=bias, **shared)
        self.o_proj = Linear(
            (q_width, width), ("heads", "embed"), use_bias=config.output_bias, **shared
        )
        eps = config.rms_norm_eps
        self.q_norm = RMSNorm(head_dim, eps=eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps=eps, dtype=dtype) if config.qk_norm else None
        self.head_dim = head_dim

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rows: Rows,
        *,
        layer: LayerAttention,
        cache: FullCache | RingCache | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValues | FullCache | RingCache]:
        """The output, and what was kept: without a cache keys and values, with one it, grown."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (proj(x).reshape(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rows.cos_sin), rotate(k, rows.cos_sin)
        if cache is None:
            out = attend(
                q,
                k,
                v,
                layer=layer,
                lengths=rows.lengths,
                stage_ids=rows.stage_ids,
                segment_ids=rows.segment_ids,
                mesh=rows.mesh,
            )
            kept = KeyValues(k=k, v=v)
        else:
            out, kept = attend_cached(
                q,
                k,
                v,
                cache,
                layer=layer,
                pos_B=rows.pos_B,  # pyright: ignore[reportArgumentType]  (set with caches)
                stage_ids=rows.stage_ids,
                mesh=rows.mesh,
            )
        return self.o_proj(out.reshape(*x.shape[:2], -1)), kept


class GatedMLP(nnx.Module):
    """`down(act(gate(x)) * up(x))`."""

    def __init__(self, config: DecoderConfig, *, std: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        shared = {"use_bias": config.mlp_bias, "std": std, "dtype": dtype, "rngs": rngs}
        self.gate_proj = Linear((width, inner), ("embed", "mlp"), **shared)
        self.up_proj = Linear((width, inner), ("embed", "mlp"), **shared)
        self.down_proj = Linear((inner, width), ("mlp", "embed"), **shared)
        self.activation = config.hidden_act

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down_proj(_ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    attention_class: ClassVar[type[Any]] = Attention
    mlp_class: ClassVar[type[Any]] = GatedMLP

    def __init__(self, config: DecoderConfig, *, std: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        norm = {"eps": config.rms_norm_eps, "dtype": dtype}
        self.input_layernorm = RMSNorm(config.hidden_size, **norm)
        self.self_attn = self.attention_class(config, std=std, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, **norm)
        self.mlp = self.mlp_class(config, std=std, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rows: Rows,
        *,
        layer: LayerAttention,
        cache: FullCache | RingCache | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValues | FullCache | RingCache]:
        attended, kept = self.self_attn(self.input_layernorm(x), rows, layer=layer, cache=cache)
        x = x + attended
        x = x + self.mlp(self.post_attention_layernorm(x))
        return constrain_batch(x, rows.mesh), kept


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefill:
    """What a prompt leaves behind: the next token's logits `[B, V]` (float32), and the caches."""

    logits: Any
    caches: Any


class CausalLM(nnx.Module):
    """A decoder with a language-model head, under an attention policy.

    Call it for logits of whole rows (training, scoring); `prefill` and `decode` generate.

    Attributes:
        config: shapes and constants.
        policy: what each token may see; `layer_attention` is it, layer by layer.
        mesh: the device mesh that the parameters lie on, or None.
        source: the directory that the model was loaded from, or None.
    """

    layer_class: ClassVar[type[DecoderLayer]] = DecoderLayer

    def __init__(
        self,
        config: DecoderConfig,
        *,
        policy: AttentionPolicy | None = None,
        dtype: jnp.dtype | str = "float32",
        mesh: Mesh | None = None,
        initializer_range: float = 0.02,
        rngs: nnx.Rngs,
    ):
        policy = config.own if policy is None else policy
        dtype = jnp.dtype(dtype)
        shared = {"std": initializer_range, "dtype": dtype, "rngs": rngs}
        self.config = config
        self.policy = policy
        self.layer_attention = policy.resolve(config.num_layers)
        self.mesh = mesh
        self.source: str | None = None
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, **shared)
        self.layers = nnx.List(
            [self.layer_class(config, **shared) for _ in range(config.num_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(
                (config.hidden_size, config.vocab_size),
                ("embed", "vocab"),
                use_bias=False,
                **shared,
            )
        )

    @property
    def dtype(self) -> jnp.dtype:
        """The parameters' dtype."""
        return self.embed_tokens.embedding.dtype

    def with_policy(self, policy: AttentionPolicy) -> "CausalLM":
        """The same model, with the same Param objects, under another policy.

        Raises:
            ValueError: the policy names a layer that the model does not have.
        """
        other = copy.copy(self)
        other.policy = policy
        other.layer_attention = policy.resolve(self.config.num_layers)
        return other

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        lengths: Int[Array, " B"] | None = None,
        stage_ids: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        logits_at: str | Int[Array, "B n"] | None = None,
        return_hidden: bool = False,
    ) -> Float[Array, "..."]:
        """Logits of whole rows, in float32.

        Args:
            tokens: right-padded rows.
            lengths: real tokens of each row; None: all are.
            stage_ids: `Stage.PROMPT` or `Stage.ANSWER` a token; None: all prompt. Rows of answer
                tokens see everything where the policy decodes with full attention.
            segment_ids: which of a packed row's texts each token belongs to.
            positions: position of each token in its text; by default the index minus the
                segment's start. They move RoPE only: visibility always counts tokens.
            logits_at: None: `[B, T, V]`. "last": of each row's last token, `[B, V]`. Indices
                `[B, n]`: `[B, n, V]`. Prefer the latter two: `[T, V]` is large.
            return_hidden: give the final hidden states `[..., D]` instead, in the model's dtype.
        """
        _check_logits_at(logits_at)
        hidden, _ = self._run_rows(
            tokens,
            lengths=lengths,
            stage_ids=stage_ids,
            segment_ids=segment_ids,
            positions=positions,
        )
        if isinstance(logits_at, str):
            hidden = _last_rows(hidden, lengths)
        elif logits_at is not None:
            hidden = jnp.take_along_axis(hidden, logits_at[:, :, None], axis=1)
        return hidden if return_hidden else self.head(hidden)

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        *,
        lengths: Int[Array, " B"] | None = None,
        cache_size: int | None = None,
    ) -> Prefill:
        """Read prompts: the logits after each row's last real token, and caches to decode from.

        Args:
            tokens: right-padded prompts.
            lengths: real tokens of each row; None: all are.
            cache_size: slots of each full cache, for prompt and answer together. Default: T + 128.
                Windowed layers without full-attention decoding keep a ring of window + sinks.
        """
        batch, width = tokens.shape
        if lengths is None:
            lengths = jnp.full((batch,), width, jnp.int32)
        cache_size = width + 128 if cache_size is None else cache_size
        hidden, kept = self._run_rows(tokens, lengths=lengths)
        layers = tuple(
            build_cache(kv.k, kv.v, lengths=lengths, layer=layer, num_slots=cache_size)
            for kv, layer in zip(kept, self.layer_attention, strict=True)
        )
        return Prefill(
            logits=self.head(_last_rows(hidden, lengths)),
            caches=Caches(layers=layers, pos_B=lengths.astype(jnp.int32)),
        )

    def decode(
        self,
        tokens: Int[Array, "B n"],
        caches: Caches,
        *,
        stage_ids: Int[Array, "B n"] | None = None,
    ) -> tuple[Float[Array, "B n V"], Caches]:
        """Logits after each of n new tokens a row, and the caches with them.

        Args:
            tokens: the next n tokens of every row.
            caches: from `prefill` or an earlier `decode`; donate them under jit.
            stage_ids: stages of the new tokens; None: all `Stage.ANSWER`.
        """
        if len(caches.layers) != self.config.num_layers:
            raise ValueError(
                f"caches: expected {self.config.num_layers} layers, got {len(caches.layers)}"
            )
        positions = caches.pos_B[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        rows = Rows(
            cos_sin=rotation(positions, self.config.rope, self.config.head_dim),
            stage_ids=stage_ids,
            pos_B=caches.pos_B,
            mesh=self.mesh,
        )
        x = constrain_batch(self.embed_tokens(tokens), self.mesh)
        grown = []
        for block, layer, cache in zip(
            self.layers, self.layer_attention, caches.layers, strict=True
        ):
            x, cache = block(x, rows, layer=layer, cache=cache)
            grown.append(cache)
        pos_B = caches.pos_B + tokens.shape[1]
        return self.head(self.norm(x)), Caches(layers=tuple(grown), pos_B=pos_B)

    def head(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Float32 logits of final hidden states."""
        if self.lm_head is None:
            table = self.embed_tokens.embedding[...]
            return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
        kernel = self.lm_head.kernel[...]
        return jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32)

    def _run_rows(
        self,
        tokens: Int[Array, "B T"],
        *,
        lengths: Int[Array, " B"] | None,
        stage_ids: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], list[KeyValues]]:
        """Final hidden states of whole rows, and every layer's keys and values."""
        if positions is None:
            if segment_ids is None:
                positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
                positions = jnp.broadcast_to(positions, tokens.shape)
            else:
                positions = segment_positions(segment_ids)
        rows = Rows(
            cos_sin=rotation(positions, self.config.rope, self.config.head_dim),
            lengths=lengths,
            stage_ids=stage_ids,
            segment_ids=segment_ids,
            mesh=self.mesh,
        )
        x = constrain_batch(self.embed_tokens(tokens), self.mesh)
        kept = []
        for block, layer in zip(self.layers, self.layer_attention, strict=True):
            x, key_values = block(x, rows, layer=layer)
            kept.append(key_values)
        return self.norm(x), kept


def _check_logits_at(logits_at: object) -> None:
    if isinstance(logits_at, str) and logits_at != "last":
        raise ValueError(f'logits_at: expected None, "last" or indices [B, n], got {logits_at!r}')


def _last_rows(
    hidden: Float[Array, "B T D"], lengths: Int[Array, " B"] | None
) -> Float[Array, "B D"]:
    """The hidden state of each row's last real token."""
    if lengths is None:
        return hidden[:, -1]
    return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
