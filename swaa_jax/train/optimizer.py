"""AdamW with warm-up, schedule and clipping, from an `OptimizerConfig`."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from swaa_jax.train.config import OptimizerConfig

__all__ = ["learning_rate", "make_optimizer"]


def learning_rate(config: OptimizerConfig, step: Int[Array, ""]) -> Float[Array, ""]:
    """The rate of a step, counted from 0; as in Transformers' schedules, the first one is 0.

    Examples:
        >>> config = OptimizerConfig(learning_rate=1.0, schedule="linear", total_steps=10)
        >>> [round(float(learning_rate(config, jnp.int32(step))), 2) for step in (0, 1, 4, 10)]
        [0.0, 1.0, 0.67, 0.0]
    """
    warmup = config.num_warmup_steps
    done = (step - warmup) / max(1, config.total_steps - warmup)
    done = jnp.clip(done.astype(jnp.float32), 0.0, 1.0)
    if config.schedule == "cosine":
        share = 0.5 * (1.0 + jnp.cos(jnp.pi * done))
    elif config.schedule == "linear":
        share = 1.0 - done
    elif config.schedule == "warmup_stable_decay":
        left = (config.total_steps - step) / config.num_decay_steps
        share = jnp.clip(left.astype(jnp.float32), 0.0, 1.0)
    else:
        share = jnp.ones_like(done)
    share = config.min_lr_ratio + (1.0 - config.min_lr_ratio) * share
    share = jnp.where(step < warmup, step / max(1, warmup), share)
    return config.learning_rate * share.astype(jnp.float32)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping, then AdamW, of optax's parts; `update(gradient, state, params)`.

    >>> optimizer = make_optimizer(OptimizerConfig(learning_rate=0.5, warmup_steps=0))
    >>> params = {"w": jnp.ones((1, 2))}
    >>> updates, state = optimizer.update(params, optimizer.init(params), params)  # gradient 1
    >>> updates["w"].round(3).tolist()  # Adam's first step is the rate, against the gradient
    [[-0.5, -0.5]]
    """

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda param: param.ndim > 1, params)

    steps = [
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=matrices),
        optax.scale_by_learning_rate(lambda step: learning_rate(config, jnp.asarray(step))),
    ]
    if config.clip_norm is not None:
        steps.insert(0, optax.clip_by_global_norm(config.clip_norm))
    return optax.chain(*steps)
