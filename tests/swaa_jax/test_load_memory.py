"""What loading takes of host memory, and that reading in pieces gives the same values.

`benchmarks/load_memory.py` measures whole processes; here Python's own allocations are counted,
which is exact: numpy's arrays and the bytes that safetensors hands out are among them.
"""

import gc
import itertools
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest

from swaa_jax.checkpoint import WeightReader, WeightRule, keymap, load_weights, write_safetensors
from swaa_jax.checkpoint.keymap import Transform
from swaa_jax.sharding import make_mesh

RULES = (
    WeightRule("plain", "plain"),
    WeightRule("turned", "turned", Transform.TRANSPOSE),
    WeightRule("fused", "first", Transform.TRANSPOSE, part=(0, 5)),
    WeightRule("fused", "second", part=(5, 16)),
    WeightRule("expert.{expert}", "experts", Transform.TRANSPOSE),
    WeightRule("vector", "vector"),
    WeightRule("number", "number"),
    WeightRule("empty", "empty", Transform.TRANSPOSE),
)


def tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = {"plain": (40, 8), "turned": (40, 8), "fused": (16, 24), "vector": (33,), "number": ()}
    shapes |= {f"expert.{e}": (10, 6) for e in range(4)} | {"empty": (0, 8)}
    return {name: np.asarray(rng.normal(size=shape), "float32") for name, shape in shapes.items()}


def wanted(stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        "plain": stored["plain"],
        "turned": stored["turned"].T,
        "first": stored["fused"][:5].T,
        "second": stored["fused"][5:],
        "experts": np.stack([stored[f"expert.{e}"].T for e in range(4)]),
        "vector": stored["vector"],
        "number": stored["number"],
        "empty": stored["empty"].T,
    }


@pytest.mark.parametrize("read_bytes, turn_rows", [(1, 1), (100, 2), (600, 7), (1 << 20, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [None, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_pieces_add_up(tmp_path, monkeypatch, read_bytes, turn_rows, dtype, sizes):
    monkeypatch.setattr(keymap, "_READ_BYTES", read_bytes)
    monkeypatch.setattr(keymap, "_TURN_ROWS", turn_rows)
    stored = tensors(np.random.default_rng(0))
    write_safetensors(tmp_path, stored.items())
    expected = {}
    for name, value in wanted(stored).items():
        sharding = None
        if sizes is not None:
            mesh = make_mesh(**sizes)
            axes = ("tensor", "fsdp", None)[-value.ndim :] if value.ndim else ()
            divides = (a and n % mesh.shape[a] == 0 for a, n in zip(axes, value.shape, strict=True))
            split = [a if ok else None for a, ok in zip(axes, divides, strict=True)]
            sharding = jax.NamedSharding(mesh, jax.P(*split))
        expected[name] = (value.shape, np.dtype(dtype), sharding)
    loaded = load_weights(WeightReader(tmp_path), RULES, num_layers=1, expected=expected)
    for name, value in wanted(stored).items():
        assert loaded[name].dtype == dtype
        np.testing.assert_array_equal(loaded[name], value.astype(dtype), err_msg=name)


# To be turned in pieces for eight devices takes longest; of the two dtypes float32 is cast, too.
LONGEST = ({"fsdp": 8}, Transform.TRANSPOSE, "bfloat16")
COSTS = [
    pytest.param(*case, marks=[pytest.mark.slow] * (case == LONGEST))
    for case in itertools.product(
        (None, {"fsdp": 8}, {"data": 8}), Transform, ("bfloat16", "float32")
    )
]


@pytest.mark.parametrize("sizes, transform, dtype", COSTS, ids=str)
def test_one_tensor_costs_little_more_than_itself(tmp_path, monkeypatch, dtype, transform, sizes):
    """Not a second copy: neither whole as read, nor turned, nor cast, nor one for each replica."""
    monkeypatch.setattr(keymap, "_READ_BYTES", 1 << 20)
    value = np.random.default_rng(0).integers(0, 99, (8192, 1024)).astype(ml_dtypes.bfloat16)
    write_safetensors(tmp_path, [("w", value)])
    shape = transform.shape(value.shape)
    sharding = jax.NamedSharding(make_mesh(**sizes), jax.P("fsdp")) if sizes else None
    expected = {"w": (shape, np.dtype(dtype), sharding)}
    reader = WeightReader(tmp_path)
    gc.collect()
    tracemalloc.start()
    try:
        rules = [WeightRule("w", "w", transform)]
        loaded = load_weights(reader, rules, num_layers=1, expected=expected)
        array = loaded["w"].block_until_ready()
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = value.size * np.dtype(dtype).itemsize
    # Two readings of 1 MiB may be alive at once, as read and cast to twice the width.
    assert peak <= size + 4 * 2**20
    # JAX keeps our buffer and has made none of its own, which would not be counted here.
    assert held >= size
    np.testing.assert_array_equal(array, transform.apply(value).astype(dtype))
