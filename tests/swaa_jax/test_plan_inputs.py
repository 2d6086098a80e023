"""What people give a plan: used, refused by name, or noted; and figures that make sense."""

import inspect
import json
import os
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

import swaa_jax as swaa
from swaa_jax import checkpoint
from swaa_jax.attention import FullCache, cache_specs
from swaa_jax.cli.main import main
from swaa_jax.plan import measure as measuring
from swaa_jax.plan import plan
from swaa_jax.plan.program import Program
from swaa_jax.plan.shapes import abstract_model
from swaa_jax.sharding import make_mesh, split_over

GIVEN = {"chip": "v5e", "compiles": False}
LAYERS, KV_HEADS, HEAD_DIM = 36, 8, 128  # of Qwen3-4B


def refusal(capsys, typed):
    assert main(typed.split()) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("serve Qwen3-4B --mesh tensor=0", "--mesh: tensor: expected an integer of at least 1"),
        ("serve Qwen3-4B --mesh auto", "--mesh: expected sizes such as fsdp=4"),
        ("serve Qwen3-4B --mesh tensor=2,tensor=4", "give tensor once"),
        ("serve Qwen3-4B --context 1.5k", "--context: expected one number such as 4096, 32k"),
        ("serve Qwen3-4B --context 17M", "--context: expected an integer of at least 1 and of at"),
        ("serve Qwen3-4B --slots 0", "--slots: expected an integer of at least 1, got 0"),
        ("train Qwen3-4B --slots 2", "write --batch 2"),
        ("train Qwen3-4B --solve slots", "--solve: expected one of context, batch"),
        ("serve Qwen3-4B --solve context --context 8k", "solve looks for it; leave it out"),
        ("serve Qwen3-4B --solve slots --slots 4", "--slots: expected none for serve"),
        ("serve Qwen3-4B --solve context --step 0", "--step: expected one number"),
        ("serve Qwen3-4B --solve context --step 32M", "--step: expected an integer of at least 1"),
        ("serve Qwen3-4B --solve slots --step 100k", "--step: expected at most 65,536"),
        ("train Qwen3-4B --solve batch --step 3 --mesh fsdp=8", "--step: expected a multiple of"),
        ("serve Qwen3-4B --seconds 1e300", "--seconds: expected a number above 0 and of at most"),
        ("serve Qwen3-4B --seconds 5", "--seconds: expected none"),
        ("serve Qwen3-4B --full-training", "--full-training: expected none for serve"),
        ("train Qwen3-4B --full-training --lora-rank 16", "--lora-rank: expected none with"),
        ("train Qwen3-4B --lora-rank 70000", "--lora-rank: expected an integer of at least 1"),
        ("serve Qwen3-4B --chunk-size 8192 --context 4k", "--chunk-size: expected at most the 4,0"),
        ("serve qwen3-4b", "(did you mean 'Qwen3-4B'?)"),
        ("serve Qwen3-4B --config-override hidden_size=big", "expected a positive integer"),
        ("serve Qwen3-4B --config-override sliding_window=9", "make idle"),
    ],
)
def test_what_cannot_be_used_is_refused_by_its_flag(typed, told, capsys):
    assert told in refusal(capsys, f"plan {typed} --chip v5e --closed-form")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "64"),
        ("hidden_size", -1),
        ("vocab_size", [1]),
        ("num_hidden_layers", 1.5),
        ("num_hidden_layers", 10**30),
        ("max_position_embeddings", 0),
    ],
)
def test_a_config_of_wrong_values_is_refused_as_loading_refuses_it(field, value, tmp_path, capsys):
    config = checkpoint.read_config("tiny-retriever") | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = refusal(capsys, f"plan serve {tmp_path} --chip v5e --closed-form")
    assert f"config.{field}: expected" in told


def test_a_checkpoints_own_policy_is_planned_under(tmp_path):
    model = swaa.load_model("tiny-retriever", policy="window=64,sinks=4")
    swaa.save_model(model, tmp_path)
    found = plan("decode", tmp_path, context=512, **GIVEN)
    assert found.policy == "window=64,sinks=4"
    assert plan("decode", tmp_path, policy="full", context=512, **GIVEN).policy == "full"


def test_numbers_of_numpy_are_numbers_and_other_types_are_refused():
    unchecked = inspect.unwrap(plan)  # tests check annotations; users have none of that
    sizes = {"context": np.int64(2048), "batch": np.int32(2), "mesh": {"tensor": np.int64(2)}}
    found = unchecked("serve", "Qwen3-0.6B", **sizes, **GIVEN)
    assert json.loads(json.dumps(found.to_dict()))["mesh"] == {"tensor": 2}
    wrong = {"context": True, "batch": "2", "mesh": 4, "compiles": "no", "step": 1.5, "seconds": ""}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            unchecked("serve", "Qwen3-0.6B", **{**sizes, **GIVEN, name: value})
    for mesh in ({"foo": 4}, {"tensor": 0}, {"tensor": "2"}, [("tensor", 2)]):
        with pytest.raises(ValueError, match=r"^mesh: "):
            unchecked("serve", "Qwen3-0.6B", mesh=mesh, **GIVEN)


def test_parts_are_what_arithmetic_says():
    rows, tokens, ring = 3, 8192, 2048 + 10
    policy = "window=2048,sinks=10,full_layers=1::2"
    given = {"policy": policy, "context": tokens, "batch": rows}
    for one in plan("serve", "Qwen3-4B", **given, **GIVEN).figures:
        slot = 2 * KV_HEADS * HEAD_DIM * 2
        assert one.parts["caches"] == rows * LAYERS // 2 * (tokens * slot + ring * (slot + 4))
        assert one.parts["parameters"] == 8_044_936_192 == 2 * 4_022_468_096
        assert one.peak == sum(one.parts.values())


@pytest.mark.parametrize("tensor", [2, 3, 16, 64])
def test_caches_lie_as_the_engine_lays_them(tensor):
    """`tensor` that does not divide the heads leaves them whole, and the plan says so."""
    mesh = make_mesh([jax.devices()[0]] * tensor, tensor=tensor)  # one in place of all
    held = KV_HEADS * (2 if tensor == 16 else 1)  # copies where they make them as many
    x: Any = jax.ShapeDtypeStruct((1, 1024, held, HEAD_DIM), "bfloat16")
    lies = cache_specs(FullCache(k=x, v=x), mesh).k
    heads = held // tensor if split_over(lies, 2) else held
    found = plan("decode", "Qwen3-4B", mesh={"tensor": tensor}, context=1024, **GIVEN)
    assert found.figures[0].parts["caches"] == LAYERS * 1024 * 2 * heads * HEAD_DIM * 2
    assert any("mesh: expected for tensor" in note for note in found.notes) == (heads == KV_HEADS)


@pytest.mark.parametrize(
    ("work", "mesh", "is_noted"),
    [
        ("serve", "expert=4", True),
        ("serve", "data=2", True),
        ("score", "data=2", False),
        ("serve", "context=3", True),
        ("serve", "context=4", False),
        ("train", "fsdp=3", True),
        ("train", "fsdp=8", False),
    ],
)
def test_an_axis_that_shares_nothing_is_noted(work, mesh, is_noted):
    axis = mesh.partition("=")[0]
    notes = plan(work, "Qwen3-4B", mesh=mesh, context=1024, **GIVEN).notes
    assert any(f"mesh: expected for {axis}" in note for note in notes) == is_noted


def test_more_takes_more():
    def peak(**given):
        return plan("serve", "Qwen3-4B", **{"policy": "naive", **given}, **GIVEN).peak

    assert peak(context=512) < peak(context=1024) < peak(context=4096) <= peak(context=1 << 20)
    assert peak(batch=1) < peak(batch=2) < peak(batch=64)
    assert peak(mesh="tensor=1") > peak(mesh="tensor=2") > peak(mesh="tensor=8")


@pytest.mark.parametrize("work", ["train", "serve", "score"])
def test_a_solution_of_formulas_fits_and_one_step_more_does_not(work):
    given = {"policy": "trained-efficient-interleave", **GIVEN}
    found = plan(work, "Qwen3-4B", solve="context", step=1024, **given)
    assert found.fits and plan(work, "Qwen3-4B", context=found.context, **given).fits
    assert not plan(work, "Qwen3-4B", context=found.context + 1024, **given).fits


def test_the_most_that_is_looked_at_is_not_called_the_largest():
    found = plan("serve", "Qwen3-0.6B", policy="naive", solve="context", step=1 << 22, **GIVEN)
    assert found.fits and found.context == 1 << 24
    assert "16,777,216 fits, and no more was looked at" in str(found)


def test_what_a_real_run_takes_less_of_is_noted():
    given = {"context": 32768, "batch": 16, "compiles": False}
    found = plan("serve", "Llama-3.1-8B", chip="h100", **given)
    assert found.fits and "fits, by less than an estimate's error" in str(found)
    assert any("memory_share: expected weights and caches within 90%" in it for it in found.notes)
    assert any("XLA_PYTHON_CLIENT_MEM_FRACTION" in note for note in found.notes)
    assert plan("serve", "Llama-3.1-8B", chip="h200", **given).notes == ()


def test_a_run_is_named_and_text_table_and_json_say_the_same():
    found = plan("serve", "Qwen3-4B", context=4096, batch=2, **GIVEN)
    assert [one.run for one in found.figures] == [
        "the last 1,024 tokens of one row's prompt",
        "16 new tokens of all 2 rows",
    ]
    lines = found.table().records()
    for line, one, kept in zip(lines, found.figures, found.to_dict()["figures"], strict=True):
        assert one.run in str(found)
        assert line["run"] == kept["run"] == one.run
        assert line["peak_bytes"] == kept["peak"] == one.peak == sum(one.parts.values())


def test_formulas_ask_for_no_device():
    """Another program may hold the devices, and libtpu writes to stderr where there is no TPU."""
    code = (
        "from swaa_jax.plan import plan\n"
        "for work in ('serve', 'train'):\n"
        "    plan(work, 'Qwen3-0.6B', chip='v5e', context=1024, compiles=False)"
    )
    env = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_a_deep_model_is_planned_in_time_that_grows_with_its_layers():
    """Shapes are made without tracing, which looked at all earlier operations again and again."""
    program = Program(
        config=checkpoint.read_config("tiny-retriever") | {"num_hidden_layers": 2},
        policy={},
        chip="v5e",
        mesh={"fsdp": 1},
        kind="steps",
        context=64,
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("flax.nnx.eval_shape", None)
        patched.setattr("jax.random.normal", None)
        assert abstract_model(program, None).config.num_layers == 2


@pytest.mark.parametrize(
    "kept", [{"peak": True}, {"peak": -1}, {"parts": {"a": "x"}}, {"fits": "no"}], ids=str
)
def test_wrong_values_of_what_is_kept_are_compiled_again(kept, tmp_path):
    row = {"found_by": "TPU compiler", "parts": {"a": 1}, "peak": 2}
    path = tmp_path / "one.json"
    path.write_text(json.dumps(row))
    assert measuring._read(path) == row
    path.write_text(json.dumps(row | kept))
    assert measuring._read(path) is None
