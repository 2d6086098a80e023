"""Compiles the chunked loss for a TPU that is not attached; prints its memory as JSON.

Run as ``PYTHONPATH=. python tests/support/compile_loss.py frozen`` (or ``trained``,
``distilled``), with libtpu installed. T = 32k, V = 152k, D = 2560, bfloat16, on one v5e chip.
"""

import json
import sys

from tests.support import topologies  # first: it keeps JAX from looking for a TPU

# isort: split
import jax
import jax.numpy as jnp

from swaa_jax.losses import LossConfig, chunked_loss
from swaa_jax.models.head import VocabHead

T, V, D = 32768, 151936, 2560


def main(case):
    on = jax.sharding.SingleDeviceSharding(topologies.devices_of("v5e")[0])
    trained, distilled = case == "trained", case == "distilled"
    config = LossConfig(self_distill=0.5 if distilled else 0.0)

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=on)

    def loss(hidden, matrix, targets, weights, teacher=None):
        head = VocabHead(weight=matrix, vocab_axis=0)
        sums, _ = chunked_loss(
            hidden,
            head,
            targets,
            weights,
            config=config,
            teacher=teacher,
            trains_head=trained,
        )
        return sums.total / sums.weight

    arguments = [
        shape(1, T, D),
        shape(V, D, dtype=jnp.float32 if trained else jnp.bfloat16),
        shape(1, T, dtype=jnp.int32),
        shape(1, T, dtype=jnp.float32),
    ]
    if distilled:
        arguments.append(shape(1, T, D))
    wanted = (0, 1) if trained else 0
    compiled = jax.jit(jax.value_and_grad(loss, argnums=wanted)).lower(*arguments).compile()
    stats = compiled.memory_analysis()
    found = {
        "temporaries": stats.temp_size_in_bytes,
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    print(json.dumps(found | {"peak": sum(found.values())}))


if __name__ == "__main__":
    main(sys.argv[1])
