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
    "backends": "choosing backends",
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
    _tell(**_compute(), stage="backends")
    _tell(backends=_backends(), stage="done")


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


def _backends() -> dict[str, list[str]]:
    """What computes each operation of a model like Qwen3-4B here, and what speaks against others,
    or why nothing does; nothing is computed.
    """
    import jax
    import jax.numpy as jnp

    import kernels_pallas as kernels
    from kernels_pallas.backends import record_choices
    from swaa_jax.models import default_dtype

    dtype = default_dtype(None)

    def floats(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def integers(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    rules: dict[str, Any] = {"window": 2048, "num_sink_tokens": 10}
    num_heads, num_kv_heads, head_dim = 32, 8, 128
    prompt = [floats(1, 4096, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    chunk = [floats(1, 1024, num_heads, head_dim), *prompt[1:]]
    slots = [floats(1, 1, num_heads, head_dim), *([floats(1, 4096, num_kv_heads, head_dim)] * 2)]

    def decode(q: Any, k: Any, v: Any, at: Any, positions: Any) -> Any:
        return kernels.swa_decode(q, k, v, q_positions=at, cache_positions=positions, **rules)

    calls: dict[str, tuple[Any, list[Any]]] = {
        "prompts": (lambda q, k, v: kernels.swa_prefill(q, k, v, **rules), prompt),
        "chunks of prompts": (
            lambda q, k, v, at: kernels.swa_prefill(q, k, v, q_offset=at, **rules),
            [*chunk, integers()],
        ),
        "packed rows": (
            lambda q, k, v, ids: kernels.swa_prefill(q, k, v, segment_ids=ids, **rules),
            [*prompt, integers(1, 4096)],
        ),
        "new tokens": (decode, [*slots, integers(1, 1), integers(1, 4096)]),
        "experts": (
            kernels.grouped_matmul,
            [floats(4096, 2048), floats(8, 2048, 768), integers(8)],
        ),
    }
    found = {}
    for name, (call, arguments) in calls.items():
        try:
            with record_choices() as choices:
                jax.eval_shape(call, *arguments)
        except NotImplementedError as error:  # SWAA_BACKEND names what cannot compute this
            found[name] = [str(error)]
            continue
        found[name] = [
            f"{one.op}: {one.name}"
            + (", as asked for" if one.is_named else "")
            + "".join(f"; not {other} ({why})" for other, why in one.left_out)
            for one in choices
        ]
    return found


def _tell(**found: Any) -> None:
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
