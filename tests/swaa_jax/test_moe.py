"""Mixture-of-experts blocks: against loops and dense autodiff, on one device and on a mesh."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import swaa_jax as swaa
from swaa_jax import sharding
from swaa_jax.models import moe
from swaa_jax.models.blocks import Initial, RouterStatistics, Rows
from swaa_jax.models.moe import SparseMLP, load_balancing_loss
from tests.support.devices import mesh_of
from tests.support.random_models import random_model

B, T, D, F, E = 4, 6, 8, 12, 4
MESHES: dict[str, Any] = {
    "experts": {"fsdp": 2, "tensor": 2, "expert": 2},
    "data": {"data": 4, "expert": 2},
    "tensor": {"fsdp": 2, "tensor": 4},
    "experts that do not divide": {"expert": 8},
}
FEWER: dict[str, Any] = {
    "two of experts": {"expert": 2},
    "two of tensor": {"tensor": 2},
    "four": {"expert": 2, "tensor": 2},
}
"""As many devices as one machine's GPUs may be."""
on_gpus = (pytest.mark.slow, pytest.mark.multigpu)
LENGTHS = jnp.array([6, 2, 0, 5])


def rows(mesh=None, lengths=LENGTHS, **options):
    width = jnp.zeros((B, T, 2))
    return Rows(rotations={None: (width, width)}, lengths=lengths, mesh=mesh, **options)  # pyright: ignore[reportArgumentType]


def block(*, num_per_token=2, normalise=True, mesh=None) -> SparseMLP:
    made = SparseMLP(
        num_experts=E,
        num_per_token=num_per_token,
        normalise=normalise,
        width=D,
        inner=F,
        hidden_act="silu",
        initial=Initial(std=0.5, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)),
    )
    if mesh is not None:
        for _, param in nnx.to_flat_state(nnx.state(made, nnx.Param)):
            put = jax.device_put(param.get_value(), sharding.sharding_for(param, mesh))
            param.set_value(put)
    return made


def inputs() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32))


def weights(made: SparseMLP):
    e = made.experts
    return [k[...] for k in (made.gate.kernel, e.gate_proj.kernel, e.up_proj.kernel)] + [
        e.down_proj.kernel[...]
    ]


def token_by_token(x, router, gate, up, down, *, num_per_token, normalise):
    """The oracle: each token's k best experts in turn, in float64 numpy."""
    x, router, gate, up, down = (np.asarray(a, np.float64) for a in (x, router, gate, up, down))
    out = np.zeros_like(x)
    for b, t in np.ndindex(B, T):
        if t >= LENGTHS[b]:
            continue
        scores = np.exp(x[b, t] @ router)
        scores /= scores.sum()
        best = np.argsort(-scores)[:num_per_token]
        total = scores[best].sum() if normalise else 1.0
        for e in best:
            h = x[b, t] @ gate[e]
            out[b, t] += scores[e] / total * ((h / (1 + np.exp(-h)) * (x[b, t] @ up[e])) @ down[e])
    return out


@pytest.mark.parametrize("num_per_token, normalise", [(1, False), (2, True), (3, False), (4, True)])
def test_the_block_is_the_sum_over_each_tokens_experts(num_per_token, normalise):
    made = block(num_per_token=num_per_token, normalise=normalise)
    got = nnx.jit(lambda made: made(inputs(), rows()).out)(made)
    options = {"num_per_token": num_per_token, "normalise": normalise}
    # float32 sums of tens of products of order 1; padding is zero in both.
    np.testing.assert_allclose(
        got, token_by_token(inputs(), *weights(made), **options), rtol=0, atol=2e-5
    )


def dense(x, router, gate, up, down):
    """All experts for all tokens, weighted by zero where not chosen: plain JAX autodiff."""
    scores = jax.nn.softmax(x @ router)
    second = jnp.sort(scores, axis=-1)[..., -2:-1]
    chosen = jnp.where(scores >= second, scores, 0.0)
    chosen = chosen / chosen.sum(-1, keepdims=True)
    h = jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate)) * jnp.einsum("btd,edf->btef", x, up)
    out = jnp.einsum("btef,efd,bte->btd", h, down, chosen)
    return jnp.where((jnp.arange(T) < LENGTHS[:, None])[..., None], out, 0.0)


@pytest.mark.parametrize(
    "name, in_parts",
    [
        *((name, False) for name in (None, *MESHES)),
        *((name, True) for name in (None, "experts")),
        *(pytest.param(name, True, marks=on_gpus) for name in FEWER),
    ],
)
def test_values_and_gradients_equal_dense_autodiff(name, in_parts, monkeypatch):
    """Parts of five tokens of a device, or fewer: 24 and 12 are cut, the last one is filled up."""
    monkeypatch.setattr(moe, "FED_AT_ONCE", 5)
    mesh = None if name is None else mesh_of(**(MESHES | FEWER)[name])
    made = block(mesh=mesh)
    graph, params, rest = nnx.split(made, nnx.Param, ...)
    direction = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, D)).astype(np.float32))

    def ours(params, x):
        fed = nnx.merge(graph, params, rest)(x, rows(mesh, feeds_in_parts=in_parts))
        return jnp.sum(direction * fed.out), fed.out

    (_, out), (by_params, by_x) = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(
        params, inputs()
    )
    if mesh is None:
        rows_of_all_choices = f"f32[{2 * B * T},{D}]"
        assert (rows_of_all_choices in str(jax.make_jaxpr(ours)(params, inputs()))) != in_parts
    reference = weights(block())
    # float32; sums in another order, gradients of order 10.
    np.testing.assert_allclose(out, dense(inputs(), *reference), rtol=0, atol=2e-5)
    want = jax.grad(lambda x, *w: jnp.sum(direction * dense(x, *w)), (0, 1, 2, 3, 4))(
        inputs(), *reference
    )
    got = [by_x, *weights(nnx.merge(graph, by_params, rest))]
    for ours_, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours_, theirs, rtol=1e-5, atol=1e-4)
    assert np.any(want[1] != 0), "the router learns through the weights"


def test_a_mesh_exchanges_weights_and_each_devices_own_tokens_only():
    mesh = sharding.make_mesh(**MESHES["experts"])
    made = block(mesh=mesh)
    graph, state = nnx.split(made)
    big = jnp.zeros((B, 50 * T, D))  # tokens dwarf weights
    big = jax.device_put(big, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))

    def run(state, x):
        return nnx.merge(graph, state)(x, Rows(rotations={}, mesh=mesh)).out

    text = jax.jit(run).lower(state, big).compile().as_text()
    own = big.size // 2  # fsdp = 2
    sums = [shape for shape, op in _collectives(text) if op == "all-reduce"]
    gathered = [shape for shape, op in _collectives(text) if op == "all-gather"]
    assert sums, "the devices' shares are added"
    assert max(np.prod(shape) for shape in sums) <= own
    assert gathered, "the experts' matrices are stored in slices"
    assert max(np.prod(shape) for shape in gathered) <= E * D * F
    assert not {op for _, op in _collectives(text)} & {"all-to-all", "collective-permute"}


def _collectives(text):
    pattern = r"= \(?\w+\[([\d,]*)\][^ ]* (all-\w+(?:-\w+)?|collective-permute)(?:-start)?\("
    return [([int(n) for n in dims.split(",") if n], op) for dims, op in re.findall(pattern, text)]


MOE = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 3,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
}
POLICY = swaa.AttentionPolicy(window=5, num_sink_tokens=2, full_attention_layers=(1,))


MOE_LENGTHS = jnp.array([16, 3, 9, 12])


@nnx.jit
def everything(model):
    rng = np.random.default_rng(0)
    tokens, new = (jnp.asarray(rng.integers(0, 61, (4, width))) for width in (16, 6))
    states = model.hidden_states(tokens, lengths=MOE_LENGTHS)
    prefill = model.prefill(tokens, lengths=MOE_LENGTHS)
    decoded, _ = model.decode(new, prefill.caches)
    real = (jnp.arange(16) < MOE_LENGTHS[:, None])[..., None]
    logits = jnp.where(real, model.head(states.hidden), 0)
    return logits, states.router_loss, prefill.logits, decoded


@pytest.fixture(scope="module")
def on_one_device():
    return everything(random_model(POLICY, **MOE))


@pytest.mark.parametrize(
    "sizes",
    [
        MESHES["experts"],
        MESHES["tensor"],
        *(pytest.param(sizes, marks=on_gpus) for sizes in FEWER.values()),
    ],
    ids=str,
)
def test_a_sharded_model_equals_one_device(sizes, on_one_device):
    """Two KV heads: `tensor=4` does not divide them."""
    mesh = mesh_of(**sizes)
    many = random_model(POLICY, mesh=mesh, **MOE)
    kernel = many.layers[0].mlp.experts.up_proj.kernel[...]
    assert kernel.addressable_shards[0].data.size == kernel.size // mesh.size
    for got, want in zip(everything(many), on_one_device, strict=True):
        # float32; partial sums over devices are added in another order.
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_loading_onto_a_mesh_gives_each_device_its_experts(tmp_path):
    swaa.save_model(random_model(**MOE), tmp_path / "model")
    one = swaa.load_model(tmp_path / "model", dtype="float32")
    mesh = sharding.make_mesh(**MESHES["experts"])
    many = swaa.load_model(tmp_path / "model", dtype="float32", mesh=mesh)
    pairs = zip(*(nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (one, many)), strict=True)
    for (path, want), (_, got) in pairs:
        np.testing.assert_array_equal(got.get_value(), want.get_value(), err_msg=str(path))
    kernel = many.layers[2].mlp.experts.down_proj.kernel[...]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 12, 16)}


def test_the_hubs_name_for_the_number_of_experts(tmp_path):
    """Files of Transformers 4 have `num_experts`, those of 5 `num_local_experts`."""
    others = {name: value for name, value in MOE.items() if name != "num_experts"}
    by_name = [
        random_model(**others, **{name: 4}).config for name in ("num_experts", "num_local_experts")
    ]
    assert [config.num_experts for config in by_name] == [4, 4]  # pyright: ignore[reportAttributeAccessIssue]


def test_the_balance_loss_is_transformers(tmp_path):
    tiny_hf = pytest.importorskip("tests.support.tiny_hf")
    theirs = tiny_hf.build("qwen3_moe", num_experts_per_tok=3)
    tiny_hf.save(theirs, tmp_path)
    ours = swaa.load_model(tmp_path, dtype="float32")
    tokens = np.random.default_rng(0).integers(3, 131, (3, 20))
    loss = nnx.jit(lambda m, t, n: m.hidden_states(t, lengths=n).router_loss)
    for lengths in ([20, 20, 20], [20, 7, 12]):
        mask = tiny_hf.torch.tensor(np.arange(20) < np.array(lengths)[:, None]).long()
        with tiny_hf.torch.no_grad():
            want = theirs(
                tiny_hf.torch.tensor(tokens), attention_mask=mask, output_router_logits=True
            ).aux_loss
        # float32 means over some hundred tokens.
        got = loss(ours, jnp.asarray(tokens), jnp.asarray(lengths))
        np.testing.assert_allclose(got, float(want), rtol=1e-5)


def test_the_balance_loss_is_least_where_experts_are_chosen_evenly():
    def loss(assigned, probability):
        one = RouterStatistics(
            assigned=jnp.array(assigned),
            probability=jnp.array(probability),
            num_tokens=jnp.array(8.0),
        )
        return load_balancing_loss([one, None, one])

    # Eight tokens, two choices each, of four experts.
    assert loss([4.0] * 4, [2.0] * 4) == 2.0
    assert loss([8.0, 8.0, 0.0, 0.0], [4.0, 4.0, 0.0, 0.0]) == 4.0
    assert load_balancing_loss([None, None]) is None


def test_the_balance_loss_moves_the_router():
    graph, params, rest = nnx.split(block(), nnx.Param, ...)

    def loss(params):
        return load_balancing_loss([nnx.merge(graph, params, rest)(inputs(), rows()).router])

    router, *experts = weights(nnx.merge(graph, jax.jit(jax.grad(loss))(params), rest))
    assert np.any(router != 0)
    assert not any(np.any(kernel != 0) for kernel in experts)


@pytest.mark.parametrize(
    "field, value, message",
    [
        (
            "num_experts_per_tok",
            9,
            "config.num_experts_per_tok: expected 1 to num_experts=4, got 9",
        ),
        ("decoder_sparse_step", 0, "config.decoder_sparse_step: expected .*, got 0"),
        ("moe_intermediate_size", None, r"expected \['moe_intermediate_size'\].*qwen3_moe"),
    ],
)
def test_wrong_configs_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        random_model(**{**MOE, field: value})


@pytest.mark.parametrize("count", [1, 40, moe._COMPARED + 1])
def test_choices_are_sorted_stably(count):
    experts = np.random.default_rng(count).integers(0, 7, count)
    order, place = map(np.asarray, moe._sort(jnp.asarray(experts)))
    np.testing.assert_array_equal(order, np.argsort(experts, stable=True))
    np.testing.assert_array_equal(order[place], np.arange(count))
