"""The rule table, and sharded models against one device."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

import swaa_jax as swaa
from swaa_jax import sharding
from swaa_jax.models.blocks import Initial
from tests.support.random_models import HF_CONFIG, random_model

POLICY = swaa.AttentionPolicy(
    window=5, num_sink_tokens=2, full_attention_layers="1::2", decode="full"
)
MESHES = [
    pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
    {"data": 2, "fsdp": 2, "tensor": 2},
    pytest.param({"fsdp": 2, "tensor": 4}, marks=pytest.mark.slow),  # more than the KV heads
    {"tensor": 8},  # more than the query heads
]


def test_specs_follow_the_table():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    spec = sharding.spec_for(("embed", "heads"), (32, 64), mesh)
    assert spec == PartitionSpec(("fsdp",), ("tensor",))
    assert sharding.spec_for(("vocab", "embed"), (61, 32), mesh) == PartitionSpec(None, ("fsdp",))
    with pytest.raises(ValueError, match="'hedas'"):
        sharding.spec_for(("embed", "hedas"), (32, 64), mesh)
    with pytest.raises(ValueError, match="'tensor'"):
        sharding.spec_for(("heads", "mlp"), (32, 64), mesh)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: sharding.make_mesh(fsdp=3), "number of devices, 8"),
        (lambda: sharding.make_mesh(model=8), "model"),
        (lambda: sharding.resolve_mesh("all"), "auto"),
        (lambda: sharding.resolve_mesh(Mesh(np.array(jax.devices()), ("x",))), "make_mesh"),
    ],
)
def test_wrong_meshes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_parameter_names_its_axes():
    for path, param in nnx.to_flat_state(nnx.state(random_model(), nnx.Param)):
        assert len(param.axes) == len(param.shape), path
        assert all(axis in sharding.RULES for axis in param.axes), path


def test_random_weights_are_not_all_whole_on_one_device_while_they_are_drawn(monkeypatch):
    normal, held = Initial.normal, []

    def held_by_the_first():
        first, arrays = jax.devices()[0], jax.live_arrays()
        shards = [x.sharding.shard_shape(x.shape) for x in arrays if first in x.sharding.device_set]
        return sum(map(math.prod, shards))

    def counted(self, shape, **metadata):
        held.append(held_by_the_first())
        return normal(self, shape, **metadata)

    monkeypatch.setattr(Initial, "normal", counted)
    model = random_model(mesh=sharding.make_mesh(fsdp=8))
    whole = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    # An eighth, which the device keeps, and the norms, and the one that is being drawn.
    assert held[-1] - held[0] < whole / 4


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_sharded_model_equals_one_device(sizes):
    mesh = sharding.make_mesh(**sizes)
    one, many = random_model(POLICY), random_model(POLICY, mesh=mesh)
    kernel = many.layers[0].mlp.gate_proj.kernel[...]
    assert len(kernel.sharding.device_set) == 8
    assert kernel.addressable_shards[0].data.size < kernel.size
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, HF_CONFIG["vocab_size"], (4, 16)))
    lengths = jnp.array([16, 3, 9, 12])
    stages = jnp.asarray(rng.integers(0, 2, (4, 16)))
    new = jnp.asarray(rng.integers(0, HF_CONFIG["vocab_size"], (4, 6)))
    for run in (
        lambda model: model(
            tokens, lengths=lengths, stage_ids=stages, logits_at=jnp.ones((4, 1), int)
        ),
        lambda model: model.prefill(tokens, lengths=lengths).logits,
        lambda model: model.decode(new, model.prefill(tokens, lengths=lengths).caches)[0],
    ):
        # float32; partial sums over tensor-parallel devices are added in another order.
        run = nnx.jit(run)
        np.testing.assert_allclose(run(many), run(one), rtol=1e-4, atol=1e-4)


def test_heads_are_never_cut_and_kv_heads_are_copied_to_fill_a_mesh():
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    model = random_model(POLICY, mesh=mesh, attention_bias=True)  # 4 query heads, 2 KV heads
    attention = model.layers[0].self_attn
    for name, spec in (("q_proj", ("tensor",)), ("k_proj", None), ("v_proj", None)):
        projection = getattr(attention, name)
        assert projection.kernel[...].sharding.spec == PartitionSpec(("fsdp",), spec)
        assert projection.bias[...].sharding.spec == PartitionSpec(spec)
    tokens = jnp.arange(8).reshape(2, 4)
    caches = nnx.jit(lambda model: model.prefill(tokens).caches)(model)
    grown = nnx.jit(lambda model, caches: model.decode(tokens, caches)[1])(model, caches)
    for cache in (*caches.layers, *grown.layers):
        assert cache.k.shape[2] == 4 and cache.k.addressable_shards[0].data.shape[2] == 1


@pytest.mark.parametrize(
    "tensor, num_heads, num_kv_heads, copies",
    [(1, 8, 2, 1), (2, 8, 2, 1), (4, 8, 2, 2), (8, 8, 1, 8), (8, 4, 2, 1), (8, 32, 3, 1)],
)
def test_copies_of_kv_heads(tensor, num_heads, num_kv_heads, copies):
    mesh = sharding.make_mesh(fsdp=8 // tensor, tensor=tensor)
    got = sharding.kv_head_copies(mesh, num_heads=num_heads, num_kv_heads=num_kv_heads)
    assert got == copies
    assert sharding.kv_head_copies(None, num_heads=num_heads, num_kv_heads=num_kv_heads) == 1


def test_loading_onto_a_mesh_equals_loading_onto_one_device(tmp_path):
    swaa.save_model(random_model(), tmp_path / "model")
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    one = swaa.load_model(tmp_path / "model", dtype="float32")
    many = swaa.load_model(tmp_path / "model", dtype="float32", mesh=mesh)
    auto = swaa.load_model(tmp_path / "model", dtype="float32", mesh="auto")
    tokens = jnp.arange(24).reshape(2, 12)
    for model in (many, auto):
        assert len(model.embed_tokens.embedding[...].sharding.device_set) == 8
        run = nnx.jit(lambda model: model(tokens))
        np.testing.assert_allclose(run(model), run(one), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 4, "fsdp": 2}], ids=str
)
@pytest.mark.parametrize(
    "family",
    [
        "gemma2",
        "gemma3_text",
        "llama",
        "ministral",
        "mistral",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
    ],
)
def test_every_family_on_a_mesh_equals_one_device(family, sizes, tmp_path):
    tiny_hf = pytest.importorskip("tests.support.tiny_hf")
    assert family in tiny_hf.FAMILIES
    tiny_hf.save(tiny_hf.build(family), tmp_path)
    one = swaa.load_model(tmp_path, dtype="float32")
    many = swaa.load_model(tmp_path, dtype="float32", mesh=sharding.make_mesh(**sizes))
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 131, (4, 24)))
    lengths = jnp.array([24, 5, 17, 9])
    for run in (
        lambda model: model(tokens, lengths=lengths, logits_at="last"),
        lambda model: model.decode(tokens, model.prefill(tokens, lengths=lengths).caches)[0],
    ):
        run = nnx.jit(run)
        # float32; partial sums over tensor-parallel devices are added in another order.
        np.testing.assert_allclose(run(many), run(one), rtol=1e-4, atol=1e-4)
