"""The environment variables that the commands read, and those that look like one of them."""

import os
from collections.abc import Mapping

from swaa_jax.fields import nearest, show

VARIABLES: Mapping[str, str] = {
    "SWAA_BACKEND": "what computes attention and experts wherever `auto` is asked for",
    "SWAA_BENCH_API_KEY": "the key of the server that swaa bench asks",
    "SWAA_EVAL_API_KEY": "the key of the server that swaa eval asks",
    "SWAA_JUDGE_API_KEY": "the key of the server that judges answers",
    "SWAA_SERVE_KEYS": "keys of which a client of swaa serve needs one, with commas",
    "SWAA_TRACEBACK": "1: the traceback of a mistake too",
    "SWAA_VERIFY_API_KEY": "the key of the server that swaa verify asks",
}
"""What each of our own is for."""

_OF_JAX = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_PLATFORMS",
)
"""JAX's that decide how a command runs; JAX has more, so only close neighbours are mistakes."""


def unknown_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """A sentence for each variable that no command reads, though its name says so.

    >>> unknown_variables({"SWAA_BACKND": "xla", "SWAA_BACKEND": "xla", "HOME": "/root"})
    ["SWAA_BACKND: expected a variable that is read, got 'xla' (did you mean 'SWAA_BACKEND'?)"]
    """
    found = []
    for name, value in environ.items():
        if name.startswith("SWAA_") and name not in VARIABLES:
            hint = nearest(name, VARIABLES, cutoff=0.7)
        elif name.startswith("JAX_") and name not in _OF_JAX:
            hint = nearest(name, _OF_JAX, cutoff=0.94)
            if not hint:
                continue
        else:
            continue
        shown = "a secret" if "KEY" in name else show(value)
        found.append(f"{name}: expected a variable that is read, got {shown}{hint}")
    return found
