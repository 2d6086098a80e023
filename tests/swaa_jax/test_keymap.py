"""The key-map engine: invertible tables, sharded loading, one error for all that is wrong."""

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from swaa_jax.checkpoint import (
    CheckpointError,
    Transform,
    WeightReader,
    WeightRule,
    dump_weights,
    expand,
    load_weights,
    write_safetensors,
)

RULES = (
    WeightRule("model.embed_tokens.weight", "embed_tokens.embedding"),
    WeightRule("lm_head.weight", "lm_head.kernel", Transform.TRANSPOSE),
    WeightRule("model.layers.{layer}.q.weight", "layers.{layer}.q.kernel", Transform.TRANSPOSE),
    WeightRule("model.layers.{layer}.q.bias", "layers.{layer}.q.bias"),
)
TIED = {"lm_head.weight": "model.embed_tokens.weight"}
L, V, D, N = 3, 32, 16, 24


def _stored(seed: int = 0, dtype=ml_dtypes.bfloat16) -> dict[str, np.ndarray]:
    """A checkpoint by its HF names; made without the table."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D)}
    for i in range(L):
        shapes |= {f"model.layers.{i}.q.weight": (N, D), f"model.layers.{i}.q.bias": (N,)}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def _expected(dtype=ml_dtypes.bfloat16, sharding=None, **drop) -> dict:
    shapes = {"embed_tokens.embedding": (V, D), "lm_head.kernel": (D, V)}
    for i in range(L):
        shapes |= {f"layers.{i}.q.kernel": (D, N), f"layers.{i}.q.bias": (N,)}
    return {path: (shape, dtype, sharding) for path, shape in shapes.items()}


def _reader(directory, tensors) -> WeightReader:
    write_safetensors(directory, tensors.items(), max_shard_size=2000)
    return WeightReader(directory)


def _load(reader, expected, **kwargs):
    return load_weights(reader, RULES, num_layers=L, expected=expected, **kwargs)


def test_load_then_dump_is_the_checkpoint(tmp_path):
    stored = _stored()
    params = _load(_reader(tmp_path, stored), _expected())
    assert list(params) == list(_expected())
    np.testing.assert_array_equal(
        params["layers.1.q.kernel"], stored["model.layers.1.q.weight"].transpose()
    )
    np.testing.assert_array_equal(
        params["embed_tokens.embedding"], stored["model.embed_tokens.weight"]
    )
    dumped = dict(dump_weights(params, RULES, L))
    assert set(dumped) == set(stored)
    for name, value in stored.items():
        assert dumped[name].dtype == value.dtype
        np.testing.assert_array_equal(dumped[name].view(np.uint16), value.view(np.uint16))


@given(
    names=st.lists(st.text("ab.", min_size=1, max_size=4), unique=True, max_size=4),
    layered=st.lists(st.booleans(), min_size=4, max_size=4),
    num_layers=st.integers(0, 12),
)
def test_every_table_is_invertible(names, layered, num_layers):
    rules = [
        WeightRule(f"h.{n}.{{layer}}.x", f"o.{{layer}}.{n}", Transform.TRANSPOSE)
        if many
        else WeightRule(f"one.{n}", f"uno.{n}")
        for n, many in zip(names, layered, strict=False)
    ]
    rows = expand(rules, num_layers)
    assert len({r.hf for r in rows}) == len({r.ours for r in rows}) == len(rows)
    assert len(rows) == sum(num_layers if "{layer}" in r.hf else 1 for r in rules)


def test_a_bad_table_is_an_error():
    with pytest.raises(ValueError, match="each hf name once"):
        expand([WeightRule("a", "b"), WeightRule("a", "c")], 1)
    with pytest.raises(ValueError, match="each ours name once"):
        expand([WeightRule("a", "c"), WeightRule("b", "c")], 1)
    with pytest.raises(ValueError, match="both or neither"):
        WeightRule("a.{layer}", "b")
    with pytest.raises(ValueError, match="once at most"):
        WeightRule("a.{head}", "b.{head}")
    with pytest.raises(ValueError, match="once at most"):
        WeightRule("a.{expert}", "b.{expert}")
    with pytest.raises(ValueError, match="cover its rows once"):
        expand([WeightRule("a", "b", part=(0, 2)), WeightRule("a", "c", part=(3, 4))], 1)


FUSED = (
    WeightRule("l.{layer}.qkv", "l.{layer}.q", Transform.TRANSPOSE, part=(0, 8)),
    WeightRule("l.{layer}.qkv", "l.{layer}.k", Transform.TRANSPOSE, part=(8, 12)),
    WeightRule("l.{layer}.e.{expert}.up", "l.{layer}.up", Transform.TRANSPOSE),
)
FUSED_SHAPES = {"q": (6, 8), "k": (6, 4), "up": (4, 6, 10)}


@pytest.mark.parametrize("sharded", [False, True])
def test_fused_and_stacked_tensors_load_and_dump(tmp_path, sharded):
    rng = np.random.default_rng(0)
    stored = {}
    for i in range(2):
        stored[f"l.{i}.qkv"] = rng.standard_normal((12, 6)).astype(np.float32)
        for e in range(4):
            stored[f"l.{i}.e.{e}.up"] = rng.standard_normal((10, 6)).astype(np.float32)
    specs = {"q": P("x", "y"), "k": P(None, "y"), "up": P("x", None, "y")}
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    expected = {
        f"l.{i}.{name}": (
            shape,
            np.float32,
            NamedSharding(mesh, specs[name]) if sharded else None,
        )
        for i in range(2)
        for name, shape in FUSED_SHAPES.items()
    }
    reader = _reader(tmp_path, stored)
    params = load_weights(reader, FUSED, num_layers=2, expected=expected)
    np.testing.assert_array_equal(params["l.1.q"], stored["l.1.qkv"][:8].T)
    np.testing.assert_array_equal(params["l.1.k"], stored["l.1.qkv"][8:].T)
    np.testing.assert_array_equal(params["l.0.up"][3], stored["l.0.e.3.up"].T)
    dumped = dict(dump_weights(params, FUSED, 2))
    assert set(dumped) == set(stored)
    for name, value in stored.items():
        np.testing.assert_array_equal(dumped[name], value)


def test_faults_of_fused_and_stacked_tensors_are_named(tmp_path):
    stored = {
        "l.0.qkv": np.zeros((11, 6), np.float32),
        **{f"l.0.e.{e}.up": np.zeros((10, 6), np.float32) for e in (0, 1, 2, 4)},
    }
    expected = {f"l.0.{name}": (shape, np.float32, None) for name, shape in FUSED_SHAPES.items()}
    with pytest.raises(CheckpointError) as error:
        load_weights(_reader(tmp_path, stored), FUSED, num_layers=1, expected=expected)
    message = str(error.value)
    assert "'l.0.qkv' expected (12, 6), got (11, 6)" in message
    assert "1 missing: 'l.0.e.3.up'" in message and "1 unexpected: 'l.0.e.4.up'" in message


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dtypes_are_cast(tmp_path, stored, wanted):
    tensors = _stored(dtype=stored)
    params = _load(_reader(tmp_path, tensors), _expected(wanted))
    for path, row in (("embed_tokens.embedding", "model.embed_tokens.weight"),):
        assert params[path].dtype == wanted
        np.testing.assert_array_equal(params[path], tensors[row].astype(wanted))


def test_values_beyond_float16_are_not_made_infinite(tmp_path):
    tensors = _stored() | {"lm_head.weight": np.full((V, D), 1e6, np.float32)}
    reader = _reader(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"values of 'lm_head.weight' within float16"):
        _load(reader, _expected(np.float16))


@pytest.mark.parametrize(
    "spec, parts",
    [((None, "x"), 4), (("y", None), 2), (("y", "x"), 8), (("x", "y"), 8), ((), 1)],
    ids=str,
)
def test_each_device_reads_only_its_slice(tmp_path, spec, parts):
    """Bytes and slices read, over 8 devices in a 2 x 4 mesh; replicas share one read."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("y", "x"))
    expected = {
        path: (shape, np.float32, NamedSharding(mesh, P(*spec) if len(shape) == 2 else P()))
        for path, (shape, _, _) in _expected().items()
    }
    stored = _stored()
    reader = _reader(tmp_path, stored)
    sizes: dict[str, list[int]] = {}
    read = reader.read

    def counting(name, index=None):
        value = read(name, index)
        sizes.setdefault(name, []).append(value.nbytes)
        return value

    reader.read = counting
    params = _load(reader, expected)
    for path, (_, _, sharding) in expected.items():
        assert params[path].sharding == sharding
    np.testing.assert_array_equal(
        params["layers.2.q.kernel"], stored["model.layers.2.q.weight"].T.astype(np.float32)
    )
    for name, value in stored.items():
        count = parts if value.ndim == 2 else 1
        assert sizes[name] == [value.nbytes // count] * count
    assert reader.bytes_read == sum(v.nbytes for v in stored.values())


def test_everything_wrong_is_one_error(tmp_path):
    tensors = _stored()
    del tensors["model.layers.0.q.bias"], tensors["model.layers.2.q.weight"]
    tensors["model.layers.1.q.weight"] = np.zeros((D, N), np.float32)
    tensors |= {"model.layers.7.q.bias": np.zeros(3, np.float32), "extra": np.zeros(3, np.float32)}
    reader = _reader(tmp_path, tensors)
    with pytest.raises(CheckpointError) as caught:
        _load(reader, _expected())
    message = str(caught.value)
    for part in (
        "2 missing: 'model.layers.0.q.bias', 'model.layers.2.q.weight'",
        "2 unexpected: 'extra', 'model.layers.7.q.bias'",
        "1 of the wrong shape: 'model.layers.1.q.weight' expected (24, 16), got (16, 24)",
    ):
        assert part in message
    assert "\n" not in message
    assert reader.bytes_read == 0


def test_many_unexpected_are_counted(tmp_path):
    extra = {f"x{chr(97 + i)}": np.zeros(1, np.float32) for i in range(25)}
    with pytest.raises(CheckpointError, match=r"25 unexpected: 'xa', .*'xt', and 5 more"):
        _load(_reader(tmp_path, _stored() | extra), _expected())


def test_quantised_tensors_are_named(tmp_path):
    import safetensors.numpy

    tensors = _stored()
    tensors["model.layers.1.q.weight"] = np.zeros((N, D), np.int8)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.q\.weight \(I8\)'.*quantised"):
        _load(WeightReader(tmp_path), _expected())


def test_ignored_tensors_may_be_there(tmp_path):
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32),
        "vision.patch": np.zeros(4, np.float32),
    }
    reader = _reader(tmp_path, _stored() | buffers)
    assert set(_load(reader, _expected(), ignored=["vision.*"])) == set(_expected())
    with pytest.raises(CheckpointError, match=r"1 unexpected: 'vision.patch'"):
        _load(reader, _expected())


def test_optional_parameters_may_be_missing(tmp_path):
    tensors = _stored()
    del tensors["model.layers.1.q.bias"]
    reader = _reader(tmp_path, tensors)
    params = _load(reader, _expected(), optional={"layers.1.q.bias"})
    assert set(_expected()) - set(params) == {"layers.1.q.bias"}


def test_a_parameter_without_a_rule_is_an_error(tmp_path):
    reader = _reader(tmp_path, _stored())
    with pytest.raises(ValueError, match=r"got none for 'new\.scale'"):
        _load(reader, _expected() | {"new.scale": ((3,), np.float32, None)})
    with pytest.raises(ValueError, match=r"got none for 'new\.scale'"):
        list(dump_weights({"new.scale": np.zeros(3)}, RULES, L))


def test_tied_embeddings(tmp_path):
    """Absent, equal, different, misshaped, and the copy alone."""
    tied = _expected()
    del tied["lm_head.kernel"]
    tensors = _stored()
    embedding = tensors["model.embed_tokens.weight"]

    def load(name, changes, without=()):
        (tmp_path / name).mkdir()
        kept = {k: v for k, v in (tensors | changes).items() if k not in without}
        return _load(_reader(tmp_path / name, kept), tied, tied=TIED)

    load("absent", {}, without=["lm_head.weight"])
    assert set(load("equal", {"lm_head.weight": embedding})) == set(tied)
    alone = load("alone", {"lm_head.weight": embedding}, without=["model.embed_tokens.weight"])
    np.testing.assert_array_equal(alone["embed_tokens.embedding"], embedding)
    with pytest.raises(CheckpointError, match=r"values that differ.*tie_word_embeddings"):
        load("different", {})
    with pytest.raises(CheckpointError, match=r"of one shape, .* got \(33, 16\) and \(32, 16\)"):
        load("misshaped", {"lm_head.weight": np.zeros((V + 1, D), ml_dtypes.bfloat16)})
    with pytest.raises(CheckpointError, match=r"1 missing: 'model.embed_tokens.weight'"):
        load("neither", {}, without=["lm_head.weight", "model.embed_tokens.weight"])


def test_an_untied_head_must_be_there(tmp_path):
    tensors = _stored()
    del tensors["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing: 'lm_head.weight'"):
        _load(_reader(tmp_path, tensors), _expected())
