"""A selection as methods give them, without a run."""

import swaa_jax as swaa
from swaa_jax.selection import Selection


def selected_heads() -> Selection:
    """Three KV heads of four layers with two each, by gates."""
    return Selection(
        method="gates",
        policy=swaa.AttentionPolicy(window=24, full_attention_heads={1: (0,), 3: (0, 1)}),
        chosen=(),
        heads={1: (0,), 3: (0, 1)},
        scores=(0.0, 0.5, 0.1, 1.0),
        nll_none=2.0,
        nll_chosen=1.5,
        nll_all=1.0,
        num_samples=3,
        num_evaluations=0,
        num_new=2,
        num_compiles=1,
        seconds=1.0,
        details={"gates": [[0.0, 0.0], [1.0, 0.0], [0.1, 0.1], [1.0, 1.0]]},
    )
