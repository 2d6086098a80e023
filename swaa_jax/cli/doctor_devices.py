"""What `swaa doctor` asks JAX, in a process of its own: it may hang, or end without a word.

Writes a line of JSON for each thing that it has found; the last line says how far it came.
"""

import json
import sys
import time
from typing import Any

STAGES = {
    "import": "importing JAX",
    "devices": "asking for the devices",
    "compute": "computing attention",
    "done": "",
}
"""In order, and what was being done where nothing came after."""


def main() -> None:
    """Go through the stages."""
    started = time.perf_counter()
    _tell(stage="import")
    import jax

    from swaa_jax import runtime

    _tell(
        jax=jax.__version__,
        jax_file=jax.__file__,
        import_s=time.perf_counter() - started,
        cache=runtime.enable_compilation_cache(),
        cache_enabled=bool(jax.config.jax_enable_compilation_cache),  # pyright: ignore[reportAttributeAccessIssue]
        stage="devices",
    )
    started = time.perf_counter()
    devices = jax.devices()
    _tell(
        platform=devices[0].platform,
        devices=[_about(device) for device in devices],
        local_devices=jax.local_device_count(),
        devices_s=time.perf_counter() - started,
        stage="compute",
    )
    _tell(**_compute(), stage="done")


def _about(device: Any) -> dict[str, Any]:
    try:
        stats = device.memory_stats() or {}
    except Exception:  # platforms that keep none
        stats = {}
    return {
        "id": device.id,
        "kind": device.device_kind,
        "memory_bytes": stats.get("bytes_limit"),
        "used_bytes": stats.get("bytes_in_use"),
    }


def _compute() -> dict[str, Any]:
    """One windowed attention with sinks, by what `auto` takes, against the reference."""
    import jax
    import jax.numpy as jnp

    import kernels_pallas as kernels
    from swaa_jax.sharding import make_mesh

    q_key, k_key, v_key = jax.random.split(jax.random.key(0), 3)
    q_BTNH = jax.random.normal(q_key, (1, 256, 4, 128), jnp.bfloat16)
    k_BSKH = jax.random.normal(k_key, (1, 256, 2, 128), jnp.bfloat16)
    v_BSKH = jax.random.normal(v_key, (1, 256, 2, 128), jnp.bfloat16)

    def attend(backend: str) -> Any:
        call = jax.jit(
            lambda q, k, v: kernels.swa_prefill(
                q, k, v, window=64, num_sink_tokens=4, backend=backend
            )
        )
        return jax.block_until_ready(call(q_BTNH, k_BSKH, v_BSKH)).astype(jnp.float32)

    started = time.perf_counter()
    found = attend("auto")
    seconds = time.perf_counter() - started
    error = jnp.max(jnp.abs(found - attend("reference")))
    return {
        "mesh": dict(make_mesh(fsdp=jax.device_count()).shape),
        "compute_s": seconds,
        "error": float(error),
    }


def _tell(**found: Any) -> None:
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
