"""Several devices in bfloat16, with shapes that GPUs have kernels for; and a run that half of its
devices go on with.

`pytest -m multigpu` runs these, and what else is marked so, on the GPUs of a machine; without GPUs
the devices are simulated. Other files hold float32 runs on a mesh to one device's, much closer.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import swaa_jax as swaa
from swaa_jax.engine import Engine, EngineOptions, Request
from swaa_jax.lora import LoraConfig
from swaa_jax.train import StepConfig, make_step
from tests.support import byte_tokenizer, train_runs
from tests.support.devices import mesh_of
from tests.support.random_models import random_model
from tests.support.training import examples, gradient, lora_model, packed, to_host

pytestmark = [pytest.mark.multigpu, pytest.mark.slow]

POLICY = swaa.AttentionPolicy(window=100, num_sink_tokens=4, full_attention_layers="1::2")
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 1024,
    "initializer_range": 0.06,
}
# All experts for each token: where fewer are chosen, a rounding may choose another one.
EXPERTS = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
}
MESHES = [{"tensor": 2}, {"fsdp": 2}, {"data": 2}, {"tensor": 4}, {"fsdp": 2, "tensor": 2}]
EXPERT_MESHES = [{"expert": 2}, {"expert": 2, "tensor": 2}]
on_meshes = pytest.mark.parametrize("sizes", MESHES, ids=str)

# A bfloat16 number has 8 bits, and a rounding moves it by 2**-9 of itself in the mean and 2**-8 at
# most. Forward, a layer rounds 14 times (norm, q, k, v, two rotations, weights, attention, output
# and sum; norm, gate and up, their product, down and sum), two layers and the head 30 times.
# Roundings are independent, so that their squares add up. A gradient has three times as many.
FORWARD = 30**0.5 * 2**-8
BACKWARD = 90**0.5 * 2**-8


# Elsewhere tests on GPUs ask for the highest precision, which is for float32.
as_users_do = functools.partial(jax.default_matmul_precision, "default")


def in_float32(model):
    """The same weights; what is computed with them is not rounded."""
    graph, state = nnx.split(model)

    def exact(x):
        return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x

    return nnx.merge(graph, jax.tree.map(exact, state))


def error(got, want) -> float:
    """Relative to the whole array."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@nnx.jit
def logits_of(model):
    """Of the last tokens of prompts, and of five new tokens behind each."""
    rng = np.random.default_rng(0)
    tokens, new = (jnp.asarray(rng.integers(0, 256, (4, width))) for width in (384, 5))
    prefill = model.prefill(tokens, lengths=jnp.array([384, 130, 257, 64]))
    decoded, _ = model.decode(new, prefill.caches)
    return prefill.logits, decoded


def model_of(mesh=None, **overrides):
    return random_model(POLICY, dtype="bfloat16", mesh=mesh, **(SHAPE | overrides))


@functools.cache
def exact_logits(is_sparse):
    return logits_of(in_float32(model_of(**(EXPERTS if is_sparse else {}))))


def check_logits(mesh, **overrides):
    with as_users_do():
        many = logits_of(model_of(mesh, **overrides))
        one = logits_of(model_of(**overrides))
    for got, single, want in zip(many, one, exact_logits(bool(overrides)), strict=True):
        print("error", error(got, want), "of one device", error(single, want))
        assert error(single, want) < FORWARD
        assert error(got, want) < FORWARD


@on_meshes
def test_prompts_and_new_tokens(sizes):
    check_logits(mesh_of(**sizes))


@pytest.mark.parametrize("sizes", EXPERT_MESHES, ids=str)
def test_prompts_and_new_tokens_with_experts(sizes):
    check_logits(mesh_of(**sizes), **EXPERTS)


OPTIONS = EngineOptions(num_slots=4, max_tokens=512, chunk_size=128, page_size=64)


@functools.cache
def exact_answers():
    return answers(in_float32(model_of()))


def answers(model):
    """Greedy tokens and their log-probabilities, of prompts in one chunk and in several."""
    rng = np.random.default_rng(1)
    engine = Engine(model, OPTIONS)
    numbers = [
        engine.submit(Request(tokens=rng.integers(0, 256, size), max_new_tokens=16, logprobs=True))
        for size in (300, 20, 129, 200, 64)
    ]
    found = {number: ((), ()) for number in numbers}
    for update in engine.run():
        tokens, logprobs = found[update.request]
        found[update.request] = (tokens + update.tokens, logprobs + update.logprobs)
    return [found[number] for number in numbers]


@on_meshes
def test_answers(sizes):
    """Up to the first token that differs, and with it: the likeliest token's log-probability moves
    by no more than logits do, whichever token that is.
    """
    spread = float(np.std(exact_logits(False)[1]))
    furthest = 0.0
    with as_users_do():
        found = answers(model_of(mesh_of(**sizes)))
    for (got, logprobs), (want, exact) in zip(found, exact_answers(), strict=True):
        differs = [a != b for a, b in zip(got, want, strict=True)]
        until = 1 + (differs.index(True) if any(differs) else len(got) - 1)
        moved = np.abs(np.subtract(logprobs[:until], exact[:until]))
        furthest = max(furthest, float(moved.max()))
    print("moved", furthest, "of a spread of", spread)
    # Of 80 roundings the largest is four deviations away; logits' normaliser moves by far less.
    assert furthest < 4 * FORWARD * spread


def training_model(mesh=None):
    lora = LoraConfig(rank=4, alpha=8.0)
    return lora_model(POLICY, lora=lora, dtype="bfloat16", mesh=mesh, **SHAPE)


def training_batch():
    made = examples(16, seed=2, longest=100)
    return packed([made[row : row + 2] for row in range(0, 16, 2)], width=208)


def first_gradient(model, **settings):
    """Of packed rows, with layers in a scan whose activations are computed again."""
    config = StepConfig(scan_layers=True, remat="layer", **settings)
    trainer = make_step(model, config)
    slopes, metrics = gradient(trainer, trainer.init(), training_batch())
    values = [np.ravel(slopes[name]) for name in sorted(slopes)]
    return to_host(np.concatenate(values)), float(metrics["loss"])


@functools.cache
def exact_gradient():
    return first_gradient(in_float32(training_model()), dtype="float32")


@on_meshes
def test_gradients(sizes):
    want, exact_loss = exact_gradient()
    for model in (training_model(), training_model(mesh_of(**sizes))):
        with as_users_do():
            got, loss = first_gradient(model)
        print("error", error(got, want), "loss", loss - exact_loss)
        assert error(got, want) < BACKWARD
        assert abs(loss - exact_loss) < FORWARD * exact_loss


class _GoneError(Exception):
    """Stands in for the end of a process."""


RECORDS = [{"prompt": f"{n} plus one", "answer": f"{n + 1}"} for n in range(12)]


@pytest.mark.parametrize("sizes", [{"fsdp": 2}, {"data": 2}, {"fsdp": 4}], ids=str)
def test_half_of_the_devices_load_what_all_have_saved(sizes, tmp_path):
    """The losses of a run go on as if nothing had happened."""
    axis, count = next(iter(sizes.items()))
    every, half = mesh_of(**sizes), mesh_of(**{axis: count // 2})

    def run(output, mesh, *, is_ended=False):
        def evaluate(model, step):
            if is_ended and step == 5:
                raise _GoneError
            return {}

        swaa.train(
            model=train_runs.small_model(mesh=mesh),
            tok=byte_tokenizer.build(),
            data={"records": RECORDS, "batch_size": 4, "packing": "bucket", "num_epochs": 3},
            policy="window=8,sinks=2",
            lora={"rank": 2, "alpha": 4},
            optimizer={"learning_rate": 0.01, "warmup_steps": 0},
            metrics={"tensorboard": False},
            checkpoint={"every": 2},
            dtype="float32",
            evaluate=evaluate,
            eval_every=5,
            output_dir=output,
            progress=False,
        )
        return train_runs.curve(output)

    whole = run(tmp_path / "whole", every)
    assert [step for step, *_ in whole] == list(range(1, 10))
    with pytest.raises(_GoneError):
        run(tmp_path / "out", every, is_ended=True)
    saved = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert saved[-1] == "00000004"
    # float32: sums over rows are in another order, and Adam divides small gradients by their size.
    np.testing.assert_allclose(run(tmp_path / "out", half), whole, rtol=2e-4, atol=1e-5)


def test_the_bounds_tell_a_lost_part():
    """Half of one layer's heads, as a partial sum that was not added: far beyond them."""
    model = model_of()
    kernel = model.layers[1].self_attn.o_proj.kernel
    kernel.set_value(kernel[...].at[: kernel.shape[0] // 2].set(0))
    with as_users_do():
        got = logits_of(model)
    assert all(error(a, b) > 3 * FORWARD for a, b in zip(got, exact_logits(False), strict=True))
