"""The rule table, and sharded models against one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import swaa_jax as swaa
from swaa_jax import sharding
from tests.support.random_models import HF_CONFIG, random_model

POLICY = swaa.AttentionPolicy(
    window=5, num_sink_tokens=2, full_attention_layers="1::2", decode="full"
)
MESHES = [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 4}]


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
    import flax.nnx as nnx

    for path, param in nnx.to_flat_state(nnx.state(random_model(), nnx.Param)):
        assert len(param.axes) == len(param.shape), path
        assert all(axis in sharding.RULES for axis in param.axes), path


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_sharded_model_equals_one_device(sizes):
    mesh = sharding.make_mesh(**sizes)
    one, many = random_model(POLICY), random_model(POLICY, mesh=mesh)
    kernel = many.layers[0].self_attn.q_proj.kernel[...]
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
        np.testing.assert_allclose(run(many), run(one), rtol=1e-4, atol=1e-4)


def test_loading_onto_a_mesh_equals_loading_onto_one_device(tmp_path):
    swaa.save_model(random_model(), tmp_path / "model")
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    one = swaa.load_model(tmp_path / "model", dtype="float32")
    many = swaa.load_model(tmp_path / "model", dtype="float32", mesh=mesh)
    auto = swaa.load_model(tmp_path / "model", dtype="float32", mesh="auto")
    tokens = jnp.arange(24).reshape(2, 12)
    for model in (many, auto):
        assert len(model.embed_tokens.embedding[...].sharding.device_set) == 8
        np.testing.assert_allclose(model(tokens), one(tokens), rtol=1e-4, atol=1e-4)
