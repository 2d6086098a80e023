"""What a checkpoint must agree with to be gone on from."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
from flax import nnx

from swaa_jax.data import BatchSource
from swaa_jax.models import CausalLM
from swaa_jax.train.run_config import TrainConfig

__all__ = ["run_identity", "weights_digest"]


def run_identity(
    config: TrainConfig, model: CausalLM, data: BatchSource, total_steps: int
) -> dict[str, object]:
    """What a checkpoint must agree with: all that decides the result, and no more.

    The mesh, the number of processes, rows_per_device and where things are may change.
    """
    fields = config.to_dict()
    optimizer = fields["optimizer"] | {"total_steps": total_steps}
    if config.optimizer.schedule == "constant":  # its length changes nothing but the warm-up
        del optimizer["warmup_ratio"], optimizer["total_steps"]
        optimizer["warmup_steps"] = dataclasses.replace(
            config.optimizer, total_steps=total_steps
        ).num_warmup_steps
    loss = {name: value for name, value in fields["loss"].items() if name != "chunk_tokens"}
    return {
        "model": {
            "type": model.config.model_type,
            "num_layers": model.config.num_layers,
            "hidden_size": model.config.hidden_size,
            "config": hashlib.sha256(model.config.hf_json.encode()).hexdigest()[:16],
            "weights": weights_digest(model),
        },
        "policy": model.policy.to_dict(),
        "lora": fields["lora"],
        "loss": loss,
        "optimizer": optimizer,
        "dtype": config.dtype,
        "seed": config.seed,
        "data": dict(data.plan.identity),
    }


def weights_digest(model: nnx.Module) -> str:
    """A checksum of the bits of all weights, the same on every mesh: integer sums commute."""
    digest = hashlib.sha256()
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        digest.update(f"{path}{variable.dtype}{variable.shape}".encode())
        digest.update(int(_bit_sum(variable.get_value())).to_bytes(4, "big"))
    return digest.hexdigest()[:16]


@jax.jit
def _bit_sum(array: jax.Array) -> jax.Array:
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(array, kind).astype(jnp.uint32)
    rows = jnp.arange(array.shape[0], dtype=jnp.uint32) * 2 + 1  # so that swapped rows show
    return jnp.sum(bits * rows.reshape(-1, *(1,) * (array.ndim - 1)), dtype=jnp.uint32)
