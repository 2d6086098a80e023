"""What attention gives."""

import dataclasses

import jax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOutput:
    """Attention output and the log-sum-exp of each row's scaled (and soft-capped) scores.

    Rows without any visible key (padding) hold ``out = 0`` and ``lse = -inf``. A log-sum-exp that
    was not asked for may be NaN.

    Examples:
      >>> import jax.numpy as jnp
      >>> from kernels_pallas import swa_prefill
      >>> x = jnp.zeros((1, 5, 1, 4))
      >>> found = swa_prefill(x, x, x, window=3, return_lse=True)
      >>> jnp.exp(found.lse[0, :, 0]).round().tolist()  # all scores are 0: keys that a row sees
      [1.0, 2.0, 3.0, 3.0, 3.0]
    """

    out: Float[Array, "B T N H"]
    lse: Float[Array, "B T N"]  # float32, natural logarithm
