"""Small models with adapters, and batches, for the tests of `swaa_jax.train`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import swaa_jax as swaa
from swaa_jax.lora import LoraConfig, LoraParam, add_lora
from tests.support.random_models import HF_CONFIG, random_model

POLICY = swaa.AttentionPolicy(
    window=5, num_sink_tokens=2, full_attention_layers="1::2", decode="full"
)
VOCAB = HF_CONFIG["vocab_size"]


def lora_model(
    policy: swaa.AttentionPolicy | None = POLICY,
    *,
    lora: LoraConfig | None = None,
    seed: int = 0,
    **overrides: Any,
) -> Any:
    """Two layers with adapters whose B is random too: gradients flow to both factors."""
    base = random_model(policy, **{"num_hidden_layers": 2, **overrides})
    model = add_lora(base, lora or LoraConfig(rank=3, alpha=6.0), rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    for path, param in nnx.to_flat_state(nnx.state(model, LoraParam)):
        if "lora_B" in path:
            value = jnp.asarray(rng.normal(size=param.shape) * 0.05, jnp.float32)
            value = jax.device_put(value, param.get_value().sharding)
            _at(model, path).set_value(value)
    return model


def _at(node: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        node = node[part] if isinstance(part, int) else getattr(node, part)
    return node


def examples(count: int, *, seed: int = 0, longest: int = 12) -> list[dict[str, np.ndarray]]:
    """Prompts and answers of different lengths, each as one row `[T]` without padding."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        prompt, answer = rng.integers(2, longest - 4), rng.integers(2, 5)
        tokens = rng.integers(3, VOCAB, prompt + answer)
        is_answer = np.arange(tokens.size) >= prompt
        made.append(
            {
                "tokens": tokens,
                "targets": np.append(tokens[1:], 0),
                "stage_ids": is_answer.astype(np.int32),
                "loss_weights": np.append(is_answer[1:], False).astype(np.float32),
                "positions": np.arange(tokens.size),
            }
        )
    return made


def packed(rows: list[list[dict[str, np.ndarray]]], *, width: int) -> dict[str, np.ndarray]:
    """Rows of examples side by side, padded on the right, as `swaa_jax.data` lays them out."""
    batch = {
        name: np.zeros((len(rows), width), np.int32)
        for name in ("tokens", "targets", "stage_ids", "positions")
    }
    batch["loss_weights"] = np.zeros((len(rows), width), np.float32)
    batch["segment_ids"] = np.full((len(rows), width), -1, np.int32)
    batch["lengths"] = np.zeros(len(rows), np.int32)
    for row, members in enumerate(rows):
        end = 0
        for segment, example in enumerate(members):
            start, end = end, end + example["tokens"].size
            for name, value in example.items():
                batch[name][row, start:end] = value
            batch["segment_ids"][row, start:end] = segment
        batch["lengths"][row] = end
    return batch


def random_batch(seed: int, *, num_rows: int = 8, width: int = 24, per_row: int = 2) -> Any:
    """Packed rows; with `per_row=1` one example a row."""
    made = examples(num_rows * per_row, seed=seed)
    rows = [made[row * per_row : (row + 1) * per_row] for row in range(num_rows)]
    return packed(rows, width=width)


def gradient(trainer: Any, state: Any, batch: Any) -> Any:
    """A step's gradient before clipping, and its metrics."""
    run = functools.partial(trainer._gradient, state.trainable, trainer.frozen)
    return jax.jit(lambda batch: trainer._over_micro_batches(run, batch, None))(trainer.put(batch))


def to_host(tree: Any) -> Any:
    """Numpy copies, which donation does not take away."""
    return jax.tree.map(np.array, tree)
