"""`load_model` and `save_model`: a checkpoint directory in HF layout to a model and back."""

import collections
import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from swaa_jax import checkpoint
from swaa_jax.arguments import check_model, check_place, check_tokenizer, told_keywords
from swaa_jax.attention import check_backend
from swaa_jax.checkpoint import WeightReader, WeightRule
from swaa_jax.checkpoint.keymap import Expected
from swaa_jax.directories import atomic_directory
from swaa_jax.fields import integer, mapping, nearest, or_none, show, text, wrong
from swaa_jax.models.causal_lm import CausalLM
from swaa_jax.models.config import WINDOW_FIELDS, DecoderConfig, refuse_idle_overrides
from swaa_jax.models.config_types import HfConfig, check_config_types
from swaa_jax.models.families import FAMILIES, ModelFamily
from swaa_jax.models.source import config_overrides, file_stamps, note_source
from swaa_jax.policy import AttentionPolicy, PolicyLike, load_policy
from swaa_jax.runtime import is_main_process, keep_compiled_programs, wait_for_all
from swaa_jax.sharding import resolve_mesh, sharding_for, target_of
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


_TIED = {"lm_head.weight": "model.embed_tokens.weight"}
_DTYPES = ("bfloat16", "float16", "float32")
_IS_LOADED = "it is loaded already; with_policy gives it another policy"


@told_keywords({"torch_dtype": "dtype", "name": "path", "attention_policy": "policy"})
def load_model(
    path: PathLike,
    policy: PolicyLike | None = None,
    dtype: jnp.dtype | str | None = None,
    mesh: Mesh | str | Mapping[str, int] | None = None,
    revision: str | None = None,
    config_overrides: Mapping[str, object] | None = None,
    backend: str = "auto",
) -> CausalLM:
    """Load a pretrained model from a directory in Hugging Face layout, or from the hub.

    Args:
        path: the directory with `config.json` and the safetensors, local or in a bucket
            (`gs://...`); a Hugging Face hub id such as `Qwen/Qwen3-4B`, of which what is needed is
            downloaded to the hub's cache; or `"tiny-retriever"`, the small model that this
            package ships.
        policy: what each token may see, in any form that `swaa_jax.policy.load_policy` reads, such
            as "window=64,sinks=4" or the name of a shipped one. None takes `attention_policy.json`
            if the directory has one, else the checkpoint's own window, else full attention; the
            choice is logged.
        dtype: of parameters and activations: bfloat16, float16 or float32. None, as everywhere in
            this package: `default_dtype`, float32 on a CPU and bfloat16 elsewhere.
        mesh: None (one device), `"auto"` (all devices along fsdp), sizes such as
            `{"fsdp": 4, "tensor": 2}`, or a mesh with the axes of `swaa_jax.sharding.MESH_AXES`.
            Each device then reads only its own slices.
        revision: of a hub id: a branch, a tag or a commit; a directory has none.
        config_overrides: config values under their HF names that replace the checkpoint's.
        backend: what computes attention and experts: `"auto"` (kernels on TPUs, plain XLA
            elsewhere; the environment's `SWAA_BACKEND` if it is set), a name from
            `swaa_jax.attention.available_backends()`, or names by op such as
            `"swa_prefill=pallas_tpu,swa_decode=xla"`. What is named never falls back.

    Raises:
        CheckpointError: missing, malformed or inconsistent files; it names all of them.
        ValueError: an argument, an override, or a policy that does not fit the model.
        NotImplementedError: a model family or a config value that is not supported, or a backend
            that does not run on the mesh's devices.

    Examples:
        >>> model = load_model("tiny-retriever", dtype="float32")
        >>> str(model.policy)
        'full'
        >>> model(jnp.array([[1, 2, 3]]), logits_at="last").shape == (1, model.config.vocab_size)
        True
    """
    check_place("path", path, expected="a directory or a name to load from", advice=_IS_LOADED)
    policy = None if policy is None else load_policy(policy)
    config_overrides = or_none(mapping)("config_overrides", config_overrides)
    chosen = None if dtype is None else check_dtype(dtype)
    keep_compiled_programs()
    directory = checkpoint.open_checkpoint(path, revision)
    mesh = resolve_mesh(mesh)
    _check_backend(backend, mesh)
    reader = WeightReader(directory)
    plan = read_blueprint(
        directory,
        policy=policy,
        dtype=check_dtype(default_dtype(mesh)) if chosen is None else chosen,
        mesh=mesh,
        config_overrides=config_overrides,
        backend=backend,
        reader=reader,
    )
    stamps = file_stamps(directory)
    arrays = checkpoint.load_weights(
        reader,
        plan.rules,
        num_layers=plan.model.config.num_layers,
        expected=plan.expected,
        tied=plan.tied,
        sizes=plan.model.config.sizes,
    )
    for name, param in plan.params.items():
        param.set_value(arrays[_join(name)])
    nnx.update(plan.model, nnx.from_flat_state(plan.params))
    note_source(
        plan.model, directory, stamps={os.fspath(directory): stamps}, overrides=config_overrides
    )
    return plan.model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blueprint:
    """A checkpoint's model, from its `config.json`, before its weights are read.

    Attributes:
        model: has shapes in place of arrays.
        params: its parameters, by their paths in it.
        expected: what the weights must be, as `checkpoint.load_weights` takes it.
        rules: the family's table of weights.
        tied: checkpoint names of copies, with what they copy; None for none.

    Examples:
        >>> place = checkpoint.open_checkpoint("tiny-retriever")
        >>> plan = read_blueprint(place, policy=None, dtype=jnp.dtype("bfloat16"))
        >>> sum(param.size for param in plan.params.values()), len(plan.rules)
        (6887680, 13)
    """

    model: CausalLM
    params: dict[Any, Any]
    expected: dict[str, Expected]
    rules: tuple[WeightRule, ...]
    tied: Mapping[str, str] | None


def checked_config(
    hf_config: HfConfig, config_overrides: Mapping[str, object] | None = None
) -> DecoderConfig:
    """The content of a `config.json` with overrides, of which nothing is wrong or without effect.

    Raises:
        ValueError, NotImplementedError: as `load_model`.

    Examples:
        >>> checked_config(checkpoint.read_config("tiny-retriever"), {"vocab_size": 300}).vocab_size
        300
    """
    check_config_types({**hf_config, **(config_overrides or {})})
    read = _family(hf_config).config_class
    config = read.from_hf(hf_config, config_overrides)
    refuse_idle_overrides(read, hf_config, config_overrides or {}, config)
    return config


def read_blueprint(
    directory: epath.Path,
    *,
    policy: PolicyLike | None,
    dtype: jnp.dtype,
    mesh: Mesh | None = None,
    config_overrides: Mapping[str, object] | None = None,
    backend: str = "auto",
    reader: WeightReader | None = None,
) -> Blueprint:
    """Reads a checkpoint's config and policy; no weights, and no memory for them.

    Args:
        directory: the checkpoint.
        policy, dtype, mesh, config_overrides, backend: as in `load_model`.
        reader: of the weights, whose headers must have as many layers and experts as the config;
            None: they are not looked at.

    Raises:
        CheckpointError, ValueError, NotImplementedError: as `load_model`.

    Examples:
        >>> place = checkpoint.open_checkpoint("tiny-retriever")
        >>> plan = read_blueprint(place, policy="window=64", dtype=jnp.dtype("bfloat16"))
        >>> plan.expected["layers.0.mlp.up_proj.kernel"][0], str(plan.model.policy)
        ((256, 512), 'window=64')
    """
    hf_config = checkpoint.read_config(directory)
    config = checked_config(hf_config, config_overrides)
    family = _family(hf_config)
    _check_range(family, dtype)
    rules = family.weight_rules(config)
    if reader is not None:
        checkpoint.check_counts(
            reader,
            rules,
            num_layers=config.num_layers,
            num_experts=config.num_stored_experts,
            sizes=config.sizes,
        )
    policy = _choose_policy(directory, config, policy, config_overrides or {})
    model = family.model_class(
        config, policy=policy, dtype=dtype, mesh=mesh, backend=backend, rngs=None
    )
    params = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    return Blueprint(
        model=model,
        params=params,
        expected={
            _join(name): (tuple(param.shape), param.dtype, sharding_for(param, mesh))
            for name, param in params.items()
        },
        rules=rules,
        tied=_TIED if config.tie_word_embeddings else None,
    )


def model_from_config(
    hf_config: HfConfig,
    *,
    policy: PolicyLike | None = None,
    dtype: jnp.dtype | str = "float32",
    mesh: Mesh | str | Mapping[str, int] | None = None,
    seed: int = 0,
    backend: str = "auto",
) -> CausalLM:
    """A model with random weights, from the content of an HF `config.json`.

    Weights are normal with the config's `initializer_range` (0.02 where it has none), norm scales
    one, biases zero.

    >>> config = checkpoint.read_config("tiny-retriever") | {"num_hidden_layers": 2}
    >>> model = model_from_config(config, policy="window=64", seed=1)
    >>> jax.eval_shape(model, jnp.zeros((1, 3), int)).shape  # logits `[B, T, V]`
    (1, 3, 2304)
    """
    keep_compiled_programs()
    hf_config = mapping("hf_config", hf_config)
    family = _family(hf_config)
    _check_range(family, check_dtype(dtype))
    mesh = resolve_mesh(mesh)
    _check_backend(backend, mesh)
    return family.model_class(
        family.config_class.from_hf(hf_config),
        policy=None if policy is None else load_policy(policy),
        dtype=check_dtype(dtype),
        mesh=mesh,
        backend=backend,
        initializer_range=hf_config.get("initializer_range", 0.02),
        rngs=nnx.Rngs(seed),
    )


@told_keywords({"path": "directory", "tok": "tokenizer"})
def save_model(
    model: CausalLM,
    directory: PathLike,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    max_shard_size: int = 5 * 10**9,
    overwrite: bool = False,
) -> epath.Path:
    """Save in HF layout, so that Transformers and `load_model` read it; all of it or nothing.

    Writes `config.json` (which says the policy too, where Transformers can express it; otherwise a
    warning says what it cannot), `generation_config.json`, safetensors shards with their index, the
    tokenizer's files, `attention_policy.json` and `provenance.json`. Of several processes all have
    to call it, since each holds a part of the model; process 0 writes.

    Args:
        model: its parameters are stored in their own dtype.
        directory: must not exist, unless `overwrite`.
        tokenizer: saved beside the weights; by default the files of the directory that the model
            was loaded from are copied.
        max_shard_size: bytes a safetensors file holds at most.
        overwrite: replace the directory, once the new one is complete.

    Raises:
        CheckpointError: the directory exists and `overwrite` is false, or it holds no model.
        ValueError: the model has adapters: merge them, or save them alone.

    Examples:
        >>> model = load_model("tiny-retriever", policy="window=64")
        >>> print(load_model(save_model(model, "windowed")).policy)
        window=64
    """
    check_model("model", model)
    check_place("directory", directory)
    check_tokenizer("tokenizer", tokenizer)
    integer(least=1)("max_shard_size", max_shard_size)
    if model.lora_config is not None:
        raise ValueError(
            "model: expected one without adapters, got one with LoRA adapters, which a checkpoint "
            "in Hugging Face layout does not hold; save merge_lora(model), or the adapters alone "
            "with save_adapter(model, directory)"
        )
    config = model.config
    family = FAMILIES[config.model_type]
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    params = {_join(name): param.get_value() for name, param in state}
    tensors = checkpoint.dump_weights(params, family.weight_rules(config), config.num_layers)
    if not is_main_process():
        collections.deque(tensors, maxlen=0)  # to gather what is spread over the processes
        wait_for_all("save_model")
        return epath.Path(directory)
    with atomic_directory(directory, overwrite=overwrite) as target:
        checkpoint.write_safetensors(target, tensors, max_shard_size=max_shard_size)
        if model.source is not None:
            checkpoint.copy_generation_config(model.source, target, config_overrides(model))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(target))
        elif model.source is not None:
            checkpoint.copy_tokenizer_files(model.source, target)
        checkpoint.write_attention_policy(
            target, model.policy.to_dict(), num_layers=config.num_layers
        )
        checkpoint.write_provenance(target, base=model.source, dtype=str(model.dtype))
        hf_config = hf_config_under(config, model.policy)
        checkpoint.write_config(target, checkpoint.with_dtype(hf_config, str(model.dtype)))
    wait_for_all("save_model")
    return epath.Path(directory)


def hf_config_under(config: DecoderConfig, policy: AttentionPolicy) -> dict[str, Any]:
    """The `config.json` to save: with the policy where Transformers can express it, and a warning
    where it cannot, because it will run something else without one.
    """
    try:
        return config.to_hf(policy)
    except NotImplementedError as error:
        logger.warning(
            "config.json: expected the model's policy, got one that it cannot express (%s); it "
            "keeps %s, under which other programs will run the model",
            error,
            config.own,
        )
        return config.to_hf()


def _check_backend(backend: str, mesh: Mesh | None) -> None:
    target = target_of(mesh)
    text("backend", backend)
    check_backend(backend, platform=None if target is None else target.platform)


def _family(hf_config: HfConfig) -> ModelFamily:
    model_type = str(hf_config.get("model_type"))
    if model_type not in FAMILIES:
        raise NotImplementedError(
            f"config.model_type: expected one of {', '.join(sorted(FAMILIES))}, got "
            f"{show(model_type)}; docs/add-a-model.md says how to add a family"
        )
    return FAMILIES[model_type]


def _choose_policy(
    directory: epath.Path,
    config: DecoderConfig,
    policy: PolicyLike | None,
    overrides: Mapping[str, object],
) -> AttentionPolicy:
    if policy is not None:
        chosen, why = load_policy(policy), "the caller's"
    elif (
        saved := checkpoint.read_attention_policy(directory, num_layers=config.num_layers)
    ) is not None:
        chosen, why = AttentionPolicy.from_dict(saved), "from attention_policy.json"
        idle = [name for name in WINDOW_FIELDS if name in overrides]
        if idle and chosen != config.own:
            raise ValueError(
                f"config_overrides.{idle[0]}: expected none, since the checkpoint's "
                f"attention_policy.json ({chosen}) goes before its config.json, got "
                f"{show(overrides[idle[0]])}; give a policy (policy=..., --window) in its place"
            )
    else:
        chosen, why = config.own, "from config.json"
    logger.info("attention policy: %s (%s)", chosen, why)
    _warn_of_wider_windows(config, chosen)
    return chosen


def _warn_of_wider_windows(config: DecoderConfig, chosen: AttentionPolicy) -> None:
    """A policy can undo the windows that a checkpoint (a Gemma, say) was trained with."""
    pairs = zip(
        chosen.resolve(config.num_layers, num_kv_heads=config.num_kv_heads),
        config.own.resolve(config.num_layers),
        strict=True,
    )
    wider = [
        index
        for index, (layer, own) in enumerate(pairs)
        if own.window is not None
        and (layer.window is None or layer.window > own.window or layer.full_heads)
    ]
    if wider:
        logger.warning(
            "attention policy: expected at most the window of %d that the checkpoint's config "
            "gives layers %s, got a policy under which they see more",
            config.own.window,
            show(wider),
        )


def _check_range(family: ModelFamily, dtype: jnp.dtype) -> None:
    """Warns of activations that the dtype cannot hold."""
    if family.model_class.overflows_float16 and dtype == jnp.float16:
        logger.warning(
            "dtype: expected bfloat16 or float32 for %s, got float16, whose range this family's "
            "activations exceed; logits may be NaN",
            family.config_class.model_type,
        )


def check_dtype(dtype: jnp.dtype | str) -> jnp.dtype:
    """A dtype that models can have, by name or as it is."""
    try:
        name = dtype if isinstance(dtype, str) else str(np.dtype(dtype))
    except TypeError:  # such as torch.bfloat16
        raise wrong("dtype", f"one of {list(_DTYPES)}", dtype, "write it as a text") from None
    if name not in _DTYPES:
        error = wrong("dtype", f"one of {list(_DTYPES)}", name)
        raise ValueError(f"{error}{nearest(name, _DTYPES)}")
    return jnp.dtype(name)


def default_dtype(mesh: Mesh | None = None) -> str:
    """What a model is loaded in where nobody says it: float32 on a CPU, which computes in bfloat16
    more slowly than that, and bfloat16 on TPUs and GPUs, half of the memory.

    Args:
        mesh: what the model is for; None: this process's devices.

    Examples:
        >>> default_dtype()  # on a CPU
        'float32'
    """
    target = target_of(mesh)
    platform = jax.default_backend() if target is None else target.platform
    return "float32" if platform == "cpu" else "bfloat16"


def _join(path: Sequence[object]) -> str:
    return ".".join(str(part) for part in path)
