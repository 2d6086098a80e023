"""The causal language model: blocks under a policy, which is the model's alone, not theirs."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from kernels_pallas.layout import pad_end
from kernels_pallas.mask import segment_positions
from swaa_jax.arguments import check_tokens, told_keywords
from swaa_jax.attention import (
    Caches,
    LayerCache,
    LayerKind,
    as_stream,
    build_cache,
    check_stream,
    empty_cache,
)
from swaa_jax.fields import wrong
from swaa_jax.limits import MAX_POSITIONS
from swaa_jax.lora import LoraConfig
from swaa_jax.models.blocks import (
    DecoderLayer,
    Embedding,
    Initial,
    LayerOutput,
    Linear,
    RouterStatistics,
    Rows,
    head_copies,
    make_norm,
)
from swaa_jax.models.config import DecoderConfig
from swaa_jax.models.description import Described
from swaa_jax.models.head import VocabHead
from swaa_jax.models.rope import rotation
from swaa_jax.models.stack import Blocks, Ran, Tap, run_layers
from swaa_jax.policy import LayerAttention, PolicyLike, Stage, load_policy
from swaa_jax.sharding import constrain_batch, lacking_tokens
from swaa_jax.typing import PathLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefill:
    """What a prompt leaves behind: the next token's logits (float32), and the caches.

    >>> import swaa_jax as swaa
    >>> model = swaa.load_model("tiny-retriever", policy="window=64,sinks=4")
    >>> read = jax.eval_shape(model.prefill, jnp.array([[5, 6, 7]]))
    >>> read.logits.shape, read.caches.layers[0].num_slots  # window + sinks
    ((1, 2304), 68)
    """

    logits: Float[Array, "B V"]
    caches: Caches


EMBEDDING = "embed_tokens.embedding"
"""The name of the table of token vectors, among a model's arrays by name."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HiddenStates:
    """What whole rows give.

    Attributes:
        hidden: final hidden states, after the last norm.
        router_loss: the loss that keeps experts in balance; None without experts.
        tapped: what `tap` took out of each layer; None without one.

    Examples:
        >>> import swaa_jax as swaa
        >>> model = swaa.load_model("tiny-retriever")
        >>> jax.eval_shape(model.hidden_states, jnp.array([[5, 6, 7]])).hidden.shape
        (1, 3, 256)
    """

    hidden: Float[Array, "B T D"]
    router_loss: Float[Array, ""] | None = None
    tapped: Any = None


class CausalLM(Described, nnx.Module):
    """A decoder with a language-model head, under an attention policy.

    Its numbers are those of Transformers' class of the same family, which tests compare it with.
    Call it for logits of whole rows (training, scoring); `prefill` and `decode` generate.

    Without `rngs` its parameters are shapes, and nothing is allocated.

    Attributes:
        config: shapes and constants.
        policy: what each token may see; `layer_attention` is it, layer by layer.
        mesh: the device mesh that the parameters lie on, or None.
        backend: of attention and experts: "auto", a name, or names by op (`resolve_backend`).
        source: the directory that the model was loaded from, or None.
        lora_config: the config of its adapters (`swaa_jax.lora`), or None.

    Examples:
        >>> import swaa_jax as swaa
        >>> model = swaa.load_model("tiny-retriever").with_policy("window=64,full_layers=1::2")
        >>> [layer.window for layer in model.layer_attention[:2]]
        [64, None]
        >>> jax.eval_shape(model, jnp.array([[5, 6, 7]])).shape  # logits `[B, T, V]`
        (1, 3, 2304)
    """

    layer_class: ClassVar[type[DecoderLayer]] = DecoderLayer
    fused_projections: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """HF's projections that are several here, by name, with their parts from top to bottom."""

    overflows_float16: ClassVar[bool] = False
    """The family's activations exceed float16's 65,504, so that logits become NaN."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        policy: PolicyLike | None = None,
        dtype: jnp.dtype | str = "float32",
        mesh: Mesh | None = None,
        backend: str = "auto",
        initializer_range: float = 0.02,
        rngs: nnx.Rngs | None,
    ):
        policy = config.own if policy is None else load_policy(policy)
        dtype = jnp.dtype(dtype)
        initial = Initial(dtype=dtype, std=initializer_range, rngs=rngs, mesh=mesh)
        self.config = config
        self.policy = policy
        self.layer_attention = policy.resolve(config.num_layers, num_kv_heads=config.num_kv_heads)
        self.mesh = mesh
        self.backend = backend
        self.source: PathLike | None = None
        self.lora_config: LoraConfig | None = None
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, scale=config.embedding_scale, initial=initial
        )
        self.layers = nnx.List(
            [self.layer_class(config, index=i, initial=initial) for i in range(config.num_layers)]
        )
        self.norm = make_norm(config, config.hidden_size, initial=initial)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(
                (config.hidden_size, config.vocab_size),
                ("embed", "vocab"),
                use_bias=False,
                initial=initial,
            )
        )

    @property
    def dtype(self) -> jnp.dtype:
        """The parameters' dtype."""
        return self.embed_tokens.embedding.dtype

    @property
    def activation_dtype(self) -> jnp.dtype:
        """That of hidden states: the norms'; a table that is trained may be in float32."""
        return self.norm.scale.dtype

    @told_keywords()
    def with_policy(self, policy: PolicyLike) -> "CausalLM":
        """The same model, with the same Param objects, under another policy.

        Args:
            policy: in any form that `load_policy` reads, such as "window=64,sinks=4".

        Raises:
            ValueError: the policy names a layer or a KV head that the model does not have.
        """
        policy = load_policy(policy)
        other = copy.copy(self)
        other.policy = policy
        other.layer_attention = policy.resolve(
            self.config.num_layers, num_kv_heads=self.config.num_kv_heads
        )
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
        hidden = self.hidden_states(
            tokens,
            lengths=lengths,
            stage_ids=stage_ids,
            segment_ids=segment_ids,
            positions=positions,
        ).hidden
        if isinstance(logits_at, str):
            hidden = _last_rows(hidden, lengths)
        elif logits_at is not None:
            hidden = jnp.take_along_axis(hidden, logits_at[:, :, None], axis=1)
        return hidden if return_hidden else self.head(hidden)

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        *,
        lengths: Int[Array, " B"] | None = None,
        stage_ids: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        layers: Sequence[LayerKind] | None = None,
        tap: Tap | None = None,
        remat: str = "none",
        blocks: Blocks | None = None,
    ) -> HiddenStates:
        """What training and analysis need: hidden states for a loss over `vocab_head`, and more.

        Args:
            tokens, lengths, stage_ids, segment_ids, positions: as in `__call__`.
            layers: what each layer sees, in place of the model's policy; kinds may be traced.
            tap: what to take out of each layer.
            remat: what a backward pass computes again, as in `run_layers`.
            blocks: the layers in another form, scanned, in place of the model's.
        """
        _check_positions(tokens, positions)
        width = tokens.shape[1]
        lacking = lacking_tokens(self.mesh, width)
        if lacking and tap is None:  # what is tapped has as many tokens as were given
            if lengths is None:
                lengths = jnp.full(tokens.shape[:1], width, jnp.int32)
            tokens = pad_end(tokens, lacking, axis=1)
            stage_ids, segment_ids, positions = (
                None if x is None else pad_end(x, lacking, axis=1)
                for x in (stage_ids, segment_ids, positions)
            )
        if positions is None:
            if segment_ids is None:
                positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
                positions = jnp.broadcast_to(positions, tokens.shape)
            else:
                positions = segment_positions(segment_ids)
        positions = constrain_batch(positions, self.mesh)
        rows = self._rows(positions, lengths=lengths, stage_ids=stage_ids, segment_ids=segment_ids)
        ran = self._run(tokens, rows, layers=layers, tap=tap, remat=remat, blocks=blocks)
        return HiddenStates(
            hidden=ran.x[:, :width], router_loss=self.router_loss(ran.routers), tapped=ran.tapped
        )

    def router_loss(self, routers: Sequence[RouterStatistics | None]) -> Float[Array, ""] | None:
        """The load-balancing loss of every layer's router statistics; None: no experts."""
        del routers
        return None

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        *,
        lengths: Int[Array, " B"] | None = None,
        cache_size: int | None = None,
        positions: str = "text",
    ) -> Prefill:
        """Read prompts: the logits after each row's last real token, and caches to decode from.

        Args:
            tokens: right-padded prompts.
            lengths: real tokens of each row; None: all are.
            cache_size: tokens that a row can become long, prompt and answer together: the slots of
                each full cache, and the most that a ring gets. Rows must not grow beyond it.
                Default: T + 128 slots in full caches, and window + sinks in the rings of windowed
                layers without full-attention decoding, which then hold rows of any length.
            positions: where the tokens that `decode` adds stand: "text", behind all tokens before
                them, or "cache", behind those that they see, one token a row at a time. The prompt
                is read at its own positions either way.

        Raises:
            ValueError: "cache" under a policy with other than windowed layers.
        """
        if positions == "cache":
            check_stream(self.layer_attention)
        batch, width = check_tokens("tokens", tokens).shape
        if lengths is None:
            lengths = jnp.full((batch,), width, jnp.int32)

        def cache(out: LayerOutput, block: DecoderLayer, layer: LayerKind) -> LayerCache:
            del block
            assert isinstance(layer, LayerAttention)  # the policy's
            in_cache = positions == "cache"
            built = build_cache(
                out.attended.plain_k if in_cache else out.attended.k,
                out.attended.v,
                lengths=lengths,
                layer=layer,
                cache_size=cache_size,
                mesh=self.mesh,
            )
            return as_stream(built) if in_cache else built

        states = self.hidden_states(tokens, lengths=lengths, tap=cache)
        return Prefill(
            logits=self.head(_last_rows(states.hidden, lengths)),
            caches=Caches(layers=tuple(states.tapped), pos_B=lengths.astype(jnp.int32)),
        )

    def decode(
        self,
        tokens: Int[Array, "B n"],
        caches: Caches,
        *,
        lengths: Int[Array, " B"] | None = None,
        stage_ids: Int[Array, "B n"] | None = None,
    ) -> tuple[Float[Array, "B n V"], Caches]:
        """Logits after each of n new tokens a row, and the caches with them.

        Args:
            tokens: the next n tokens of every row.
            caches: from `prefill` or an earlier `decode`; donate them under jit.
            lengths: how many of the n are real, 0 to n; None: all.
            stage_ids: stages of the new tokens; None: all `Stage.ANSWER`.
        """
        hidden, caches = self.extend(tokens, caches, lengths=lengths, stage_ids=stage_ids)
        return self.head(hidden), caches

    def empty_caches(
        self,
        num_rows: int,
        *,
        cache_size: int,
        pages: tuple[int, int] | None = None,
        positions: str = "text",
    ) -> Caches:
        """Caches before the first token, for prompts that `read` reads.

        Args:
            num_rows: rows of the batch.
            cache_size: tokens that a row can become long, prompt and answer together.
            pages: how many there are, and the slots of each, where full caches are to be pages
                that rows share. `Caches.table` then says whose they are; all entries are page 0.
            positions: where the tokens that `decode` adds stand, as in `prefill`.

        Raises:
            ValueError: "cache" under a policy with other than windowed layers.
        """
        if positions == "cache":
            check_stream(self.layer_attention)
        layers = [
            empty_cache(
                layer,
                shape=(num_rows, self.cached_heads(layer), self.config.head_dim),
                cache_size=cache_size,
                dtype=self.norm.scale.dtype,
                mesh=self.mesh,
                pages=pages,
            )
            for layer in self.layer_attention
        ]
        if positions == "cache":
            layers = [as_stream(ring) for ring in layers]
        table = None
        if pages is not None:
            table = jnp.zeros((num_rows, -(-cache_size // pages[1])), jnp.int32)
        pos_B = jnp.zeros((num_rows,), jnp.int32)
        return Caches(layers=tuple(layers), pos_B=pos_B, table=table)

    def cached_heads(self, layer: LayerAttention) -> int:
        """KV heads of a layer's caches, with the copies that fill the mesh."""
        counts = {"num_heads": self.config.num_heads, "num_kv_heads": self.config.num_kv_heads}
        return self.config.num_kv_heads * head_copies(layer, self.mesh, **counts)

    def read(
        self,
        tokens: Int[Array, "B n"],
        caches: Caches,
        *,
        lengths: Int[Array, " B"] | None = None,
        prompt_lengths: Int[Array, " B"] | None = None,
    ) -> Prefill:
        """Read the next chunk of each row's prompt; all chunks together are one `prefill`.

        Activations are those of n tokens, whatever the length of the prompt.

        Args:
            tokens: the next n tokens of every prompt, padded on the right.
            caches: from `empty_caches` or an earlier `read`; donate them under jit. Where layers
                have a tail, `recast_caches` makes rings of them once the prompts are read.
            lengths: how many of the n are real, 0 to n; None: all.
            prompt_lengths: tokens of each whole prompt; needed under a `full_attention_tail`.

        Returns:
            The logits after each row's last token in this chunk, and the caches with the chunk.
        """
        stage_ids = jnp.full(tokens.shape, Stage.PROMPT, jnp.int32)
        hidden, caches = self.extend(
            tokens, caches, stage_ids=stage_ids, lengths=lengths, prompt_lengths=prompt_lengths
        )
        return Prefill(logits=self.head(_last_rows(hidden, lengths)), caches=caches)

    def extend(
        self,
        tokens: Int[Array, "B n"],
        caches: Caches,
        *,
        stage_ids: Int[Array, "B n"] | None,
        lengths: Int[Array, " B"] | None = None,
        prompt_lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B n D"], Caches]:
        """Final hidden states of n new tokens a row, and the caches with them.

        What `read` and `decode` are made of; their arguments are explained there.
        """
        if len(caches.layers) != self.config.num_layers:
            raise ValueError(
                f"caches: expected {self.config.num_layers} layers, got {len(caches.layers)}; "
                "prefill with this model"
            )
        num_new = tokens.shape[1]
        positions = caches.pos_B[:, None] + jnp.arange(num_new, dtype=jnp.int32)[None, :]
        rows = self._rows(
            positions,
            lengths=lengths,
            stage_ids=stage_ids,
            pos_B=caches.pos_B,
            prompt_lengths=prompt_lengths,
        )
        ran = self._run(tokens, rows, caches=caches.bound())
        pos_B = caches.pos_B + (num_new if lengths is None else lengths)
        return ran.x, caches.grown(ran.caches, pos_B)

    def head(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Float32 logits of final hidden states."""
        return self.vocab_head().logits(hidden)

    def vocab_head(self) -> VocabHead:
        """The matrix of the logits, with all that is to be known of it."""
        if self.lm_head is None:
            name, vocab_axis, variable = EMBEDDING, 0, self.embed_tokens.embedding
        else:
            name, vocab_axis, variable = "lm_head.kernel", 1, self.lm_head.kernel
        return VocabHead(
            name=name,
            weight=variable.get_value(),
            vocab_axis=vocab_axis,
            axes=variable.axes,
            softcap=self.config.logits_softcap,
        )

    def _rows(self, positions: Int[Array, "B T"], **about: Any) -> Rows:
        """What the layers need to know of tokens at these positions."""
        config = self.config
        ropes = dict.fromkeys(config.layer_rope(index) for index in range(config.num_layers))
        rotations = {rope: rotation(positions, rope, config.head_dim) for rope in ropes}
        return Rows(rotations=rotations, mesh=self.mesh, backend=self.backend, **about)

    def _run(
        self,
        tokens: Int[Array, "B T"],
        rows: Rows,
        *,
        layers: Sequence[LayerKind] | None = None,
        caches: Sequence[LayerCache] | None = None,
        tap: Tap | None = None,
        remat: str = "none",
        blocks: Blocks | None = None,
    ) -> Ran:
        """From tokens through all layers and the last norm."""
        # A table that is trained is in float32 until its rows are taken; the rest has one dtype.
        x = self.embed_tokens(tokens).astype(self.norm.scale.dtype)
        ran = run_layers(
            self.layers if blocks is None else blocks,
            rows.laid_out(x),
            rows,
            layers=self.layer_attention if layers is None else layers,
            caches=caches,
            tap=tap,
            remat=remat,
        )
        return dataclasses.replace(ran, x=self.norm(ran.x))


def _check_logits_at(logits_at: object) -> None:
    if isinstance(logits_at, str) and logits_at != "last":
        raise wrong("logits_at", "None, 'last' or indices [B, n]", logits_at)


def _check_positions(tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None) -> None:
    """Positions must be float32 numbers, each one its own; traced ones are the caller's care."""
    last = check_tokens("tokens", tokens).shape[1] - 1
    if positions is not None and not isinstance(positions, Tracer) and positions.size:
        last = int(np.max(np.asarray(positions)))  # not jnp, which is traced within jit
    if last >= MAX_POSITIONS:
        raise ValueError(
            f"positions: expected less than {MAX_POSITIONS}, beyond which they share rotary angles "
            f"in float32, got {last}; split the row"
        )


def _last_rows(
    hidden: Float[Array, "B T D"], lengths: Int[Array, " B"] | None
) -> Float[Array, "B D"]:
    """The hidden state of each row's last real token."""
    if lengths is None:
        return hidden[:, -1]
    last = jnp.maximum(lengths - 1, 0)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
