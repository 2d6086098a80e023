"""What a model needs on devices that are not here: formulas, compiles, the largest that fits."""

import functools
import json
import math
import pathlib
import subprocess

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import swaa_jax as swaa
from kernels_pallas.chips import GPUS
from swaa_jax import costs
from swaa_jax.attention import AttentionOptions, attend
from swaa_jax.bench.shapes import SHAPES
from swaa_jax.cli.main import main
from swaa_jax.engine import EngineOptions
from swaa_jax.engine.demand import chunk_bytes, demand_of
from swaa_jax.eval.search import recipes
from swaa_jax.memory import bytes_of_arrays
from swaa_jax.models.function import split_model
from swaa_jax.plan import measure as measuring
from swaa_jax.plan import plan
from swaa_jax.plan.compiled import exchanged_bytes
from swaa_jax.plan.program import Program, check_chip, topology_of
from swaa_jax.plan.shapes import abstract_model
from swaa_jax.plan.solve import largest
from swaa_jax.plan.work import MEASURED, model_flops
from swaa_jax.policy import LayerAttention, load_policy
from swaa_jax.sharding import make_mesh
from swaa_jax.train import TrainConfig
from swaa_jax.train.dry_run import plan_run
from tests.support import tpu_compiler

POLICY = "window=2048,sinks=10,full_layers=1::2"
GIB = 1 << 30


def program(**others):
    fields = {"config": {}, "policy": {}, "chip": "v6e", "mesh": {"fsdp": 1}, "kind": "train"}
    return Program(**{**fields, "context": 64, **others})


@pytest.mark.parametrize("most", [1, 7, 40])
def test_the_largest_fits_and_one_more_does_not_from_any_guess(most):
    for answer in range(most + 1):
        for guess in range(1, most + 1):
            asked = []

            def fits(number, answer=answer, asked=asked):
                asked.append(number)
                return number <= answer

            assert largest(fits, guess=guess, most=most) == answer
            assert len(asked) == len(set(asked)) and all(1 <= one <= most for one in asked)


@pytest.mark.parametrize(
    ("solve", "step", "least_over"), [("context", 512, 20_480), ("batch", 2, 11), ("slots", 1, 7)]
)
def test_a_solution_fits_by_what_was_measured_and_one_step_more_does_not(solve, step, least_over):
    def fake(program):
        size = program.context if solve == "context" else program.batch
        over = size >= least_over
        return {
            "found_by": "TPU compiler",
            "parts": {"parameters": GIB},
            "peak": 17 * GIB if over else 8 * GIB,
            "fits": not over,
            "compile_s": 1.0,
        }

    context = None if solve == "context" else 2048
    found = plan(
        "serve", "Qwen3-0.6B", chip="v5e", solve=solve, step=step, context=context, measure=fake
    )
    value = found.context if solve == "context" else found.batch
    assert found.fits and value % step == 0
    assert value < least_over <= value + step
    assert (value, True) in found.tried and (value + step, False) in found.tried
    assert f"{value:,} is the largest that fits" in str(found)


def test_where_not_even_the_least_fits():
    def fake(program):
        return {"found_by": "TPU compiler", "parts": {}, "peak": 99 * GIB, "fits": False}

    found = plan("train", "Qwen3-0.6B", chip="v5e", solve="context", measure=fake)
    assert not found.fits and "context: not even 4,096 fits" in str(found)


def test_formulas_are_those_of_recipes():
    """One answer everywhere: what `swaa recipes` says of the engine's chunks and of one piece."""
    (row,) = [one for one in recipes(context=32768, rows=3) if one.name == "instruct-no-train"]
    given = {"policy": "instruct-no-train", "chip": "h200", "batch": 3, "compiles": False}
    chunk, steps = plan("serve", "Qwen3-4B", **given).figures
    assert chunk.peak == row.memory and chunk.found_by == "closed form"
    assert steps.peak == chunk.parts["parameters"] + 3 * row.cache_bytes
    assert plan("score", "Qwen3-4B", **given).peak == row.memory_in_one_piece


@pytest.mark.parametrize("sizes", [{"fsdp": 1}, {"tensor": 2, "context": 2}], ids=str)
def test_one_figure_everywhere(sizes):
    """`swaa recipes`, the engine's message, `swaa train --dry-run` and plans count the same bytes.

    The engine alone adds its slots' numbers and tokens, which are no keys: the same under all
    policies.
    """
    mesh = make_mesh(jax.devices()[: math.prod(sizes.values())], **sizes)
    given = {"chip": "v6e", "mesh": sizes, "context": 2048, "compiles": False}
    shipped = {one.name: one.memory for one in recipes("tiny-retriever", context=2048, rows=3)}
    numbers = set()
    for policy in ("full", "naive", "trained-efficient-interleave"):
        planned = plan("serve", "tiny-retriever", policy=policy, batch=3, **given).figures[0]
        model = split_model(
            swaa.load_model("tiny-retriever", policy=policy, dtype="bfloat16", mesh=mesh)
        )
        options = EngineOptions(num_slots=3, max_tokens=2048, chunk_size=1024, page_size=256)
        weights = bytes_of_arrays(model.arrays.values())
        told = demand_of(
            {"model": model}, {"model": options}, weight_bytes=weights, memory=1 << 34, share=1.0
        ).needed
        assert planned.parts["parameters"] == weights
        assert planned.parts["activations"] == chunk_bytes(model, options)
        numbers.add(told - planned.peak)
        if mesh.size == 1:
            assert shipped[policy] == planned.peak
        config = TrainConfig(
            model="tiny-retriever",
            policy=policy,
            mesh=sizes,
            data={"files": "tiny-needles", "answers": "verbatim", "seq_len": 2048, "batch_size": 1},
            lora={"rank": 16},
            dtype="bfloat16",
            output_dir="runs/none",
        )
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(TrainConfig, "make_mesh", lambda _: mesh)  # not all eight devices
            dry = plan_run(config, progress=False)
        step = plan("train", "tiny-retriever", policy=policy, remat=config.remat, **given)
        assert step.peak == dry.memory.total == dry.demand.needed
    (slots,) = numbers
    assert 0 < slots < 48 << 10


def test_formulas_know_what_a_mesh_splits():
    def parts(mesh, work="serve"):
        given = {"chip": "v6e", "context": 8192, "batch": 8, "compiles": False}
        return plan(work, "Qwen3-4B", policy=POLICY, mesh=mesh, **given).figures[0].parts

    one, four = parts("fsdp=1"), parts("tensor=4")
    assert four["caches"] == pytest.approx(one["caches"] / 4, rel=0.01)
    assert four["parameters"] == pytest.approx(one["parameters"] / 4, rel=0.01)
    whole, split = parts("fsdp=1", "train"), parts("fsdp=8", "train")
    assert split["parameters"] == pytest.approx(whole["parameters"] / 8, rel=0.03)
    a_row = plan("train", "Qwen3-4B", policy=POLICY, chip="v6e", context=8192, compiles=False)
    trained = a_row.figures[0].parts["optimizer"] // 2  # their gradient, which fsdp splits
    alike = a_row.figures[0].parts["activations"] - trained
    gathered = 2 * 151_936 * 2560 * 2  # embedding and head, whole, where fsdp splits them
    assert 0 < split["activations"] - alike - gathered <= trained
    assert whole["activations"] > 4 * alike


def test_what_waits_in_the_hosts_memory_is_told():
    given = {"chip": "v5e", "mesh": "context=4", "context": 1 << 16, "compiles": False}
    here = plan("train", "Qwen3-4B", policy=POLICY, remat="layer", **given).figures[0]
    away = plan("train", "Qwen3-4B", policy=POLICY, remat="offload", **given)
    inputs = 36 * 2560 * 2 * (1 << 14)  # of every layer, a quarter of the row's tokens
    assert here.host == 0 and away.figures[0].host == inputs
    assert here.peak - away.peak == inputs * 70 // 36  # all of them twice; two of them
    assert "host      2.81 GiB of the host's memory" in str(away)


def test_a_context_that_the_model_does_not_know_is_named():
    given = {"chip": "v6e", "mesh": "context=8", "compiles": False, "context": 1 << 18}
    (note,) = plan("train", "Qwen3-4B", **given).notes
    assert "context: expected at most 40,960" in note and "got 262,144" in note
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32768}
    longer = plan("train", "Qwen3-4B", config_overrides={"rope_scaling": yarn}, **given)
    assert longer.notes == () and "note" not in str(longer)
    with pytest.raises(ValueError, match=r"config_overrides: .* got 'rope_scalin'"):
        plan("train", "Qwen3-4B", config_overrides={"rope_scalin": yarn}, **given)


def test_all_weights_take_more_than_adapters():
    given = {"chip": "h200", "context": 4096, "compiles": False}
    adapters = plan("train", "Qwen3-0.6B", **given)
    whole = plan("train", "Qwen3-0.6B", lora_rank=None, **given)
    assert whole.figures[0].parts["optimizer"] > 50 * adapters.figures[0].parts["optimizer"]
    assert whole.figures[0].flops > adapters.figures[0].flops


def test_layers_add_up_to_the_model():
    """Operations of all layers and of the head are those of the run."""
    (found,) = plan(
        "train", "Qwen3-4B", policy=POLICY, chip="h200", context=8192, compiles=False
    ).figures
    assert [(one.layers, one.count) for one in found.layers] == [("window=2048", 18), ("full", 18)]
    head = 4 * 2560 * 151936 * 8192
    total = head + sum(one.count * one.flops for one in found.layers)
    assert found.flops == pytest.approx(total, rel=1e-9)
    assert found.layers[1].flops > found.layers[0].flops


def test_shares_of_peaks_are_those_of_measured_runs():
    """What the estimate of time rests on, from the files that it names."""
    results = pathlib.Path("benchmarks/results")
    shares = {"train": [], "chunk": [], "steps": []}
    for row in json.loads((results / "train_step.json").read_text())["rows"]:
        if row["side"] == "swaa_jax" and row["rows"] == "one":
            shares["train"].append(row["flops"] / row["peak_flops"] / row["seconds"])
    bench = json.loads((results / "bench_qwen3_4b.json").read_text())
    chip = GPUS["h200"]
    for measured in bench["measurements"]:
        details = measured["details"]
        prompt = program(
            config=SHAPES["Qwen3-4B"],
            policy=load_policy(measured["policy"]).to_dict(),
            kind="prefill",
            context=16384,
        )
        flops = model_flops(prompt, abstract_model(prompt, None))
        prompts = details["read_tokens"] / 16384
        shares["chunk"].append(prompts * flops / chip.peak_flops / details["read_s"])
        read = 2 * 4_022_468_096 + measured["cache_bytes"]  # weights, and 8 slots
        least = details["decode_steps"] * read / chip.hbm_bandwidth
        shares["steps"].append(least / details["decode_s"])
    planned = json.loads((results / "plan_gpu.json").read_text())["rows"]
    for row in planned:
        if row["mesh"] == "fsdp=1" and row["kind"] in shares:
            shares[row["kind"]].append(row["least_seconds"] / row["seconds"])
    assert max(abs(row["planned_over_measured"] - 1) for row in planned) < 0.07
    for kind, found in shares.items():
        kept = [share for shares in MEASURED["h200", kind].values() for share in shares]
        assert kept == pytest.approx(found, abs=1e-3), kind


def test_time_is_at_least_what_peaks_allow_and_an_estimate_only_where_runs_were_measured():
    def time(chip, work="serve", **others):
        given = {"chip": chip, "context": 16384, "batch": 8, "compiles": False, **others}
        return plan(work, "Qwen3-4B", **given).figures[-1].time

    steps = time("h200")
    assert steps.bound == "memory" and steps.least < steps.low < steps.high
    assert steps.low == pytest.approx(steps.least / 0.644)
    for lacking in (time("v6e"), time("h200", mesh="fsdp=8")):
        assert lacking.low is None and lacking.least > 0
    assert time("v6e", "train").bound == "operations"
    found = plan("decode", "Qwen3-4B", chip="v6e", compiles=False)
    assert "at least" in str(found) and "no estimate: " in str(found)


def test_a_step_need_not_read_all_experts_nor_the_rows_of_a_table():
    def time(model, **others):
        given = {"chip": "h200", "context": 32768, "compiles": False, **others}
        (found,) = plan("decode", model, policy="window=2048,sinks=10", **given).figures
        return found.parts, found.time

    rows = json.loads(pathlib.Path("benchmarks/results/moe_gpu.json").read_text())["rows"]
    (measured,) = (row["ms_per_token"] for row in rows if row["part"] == "model_32k:swaa_jax")
    parts, one = time("Qwen3-30B-A3B")
    assert 16 * 1e-3 * measured > one.least  # 16 steps a run
    assert one.low is None and "experts" in one.basis  # what was measured had none
    shared = time("Qwen3-30B-A3B", mesh={"expert": 2})[1].least
    assert one.least / 2 < shared < one.least
    parts, untied = time("Llama-3.1-8B")
    table = 2 * SHAPES["Llama-3.1-8B"]["vocab_size"] * SHAPES["Llama-3.1-8B"]["hidden_size"]
    read = parts["parameters"] - table + parts["caches"]
    assert untied.least == pytest.approx(16 * read / GPUS["h200"].hbm_bandwidth)


def test_context_splits_rows_and_a_windowed_layer_is_sent_the_same_whatever_the_length():
    def one(work, context, shards):
        mesh = {"context": shards}
        given = {"chip": "v6e", "mesh": mesh, "context": context, "compiles": False}
        return plan(work, "Qwen3-4B", policy=POLICY, **given).figures[0]

    short, long = one("train", 1 << 15, 8), one("train", 1 << 18, 8)
    (windowed, full), (same, more) = (
        [layer.exchanged for layer in each.layers] for each in (short, long)
    )
    assert windowed == same == (2047 + 7 * 10) * 2 * 8 * 128 * 2
    assert more > 7 * full > 0
    for work, context in (("train", 1 << 18), ("score", 1 << 18), ("prefill", 1 << 20)):
        whole, split = one(work, context, 1), one(work, context, 8)
        assert split.parts["activations"] < whole.parts["activations"] / 3
    # FA decode is off: every other layer has a ring, which is whole on all devices.
    whole, split = (one("decode", 1 << 20, shards).parts["caches"] for shards in (1, 8))
    assert 18 * 2 * 2 * 8 * 128 * (1 << 17) < split < whole / 7


LOOP = """HloModule m

%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %h = bf16[8,4]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,2}}
  %r = f32[16]{0} all-reduce(%y), replica_groups={{0,1},{2,3}}, to_apply=%add
}

ENTRY %main (a: bf16[8,4]) -> bf16[8,4] {
  %g = bf16[32,4]{1,0} all-gather(%a), replica_groups=[2,4]<=[8], dimensions={0}
  %s = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) all-gather-start(%a), replica_groups=[2,4]<=[8]
  %w = (s32[], bf16[8,4]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %d = f32[2]{0} reduce-scatter(%z), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
}
"""  # noqa: E501


def test_bytes_that_devices_exchange_are_counted_with_loops():
    assert exchanged_bytes(LOOP) == {
        "all-gather": 2 * 32 * 4 * 2 * 3 // 4,
        "collective-permute": 3 * 8 * 4 * 2,
        "all-reduce": 3 * 2 * 16 * 4 // 2,
        "reduce-scatter": 2 * 4 * 3,
    }


def test_groups_of_devices_by_axes_and_loops_by_their_condition():
    text = """%cond (p: s32[]) -> pred[] {
  %n = s32[]{:T(128)} constant(7)
}

%body (p: s32[]) -> s32[] {
  %g = f32[16,4]{1,0} all-gather(%p), replica_groups=mesh['a'=8,'b'=2] {'a'}, dimensions={0}
}

ENTRY %main (p: s32[]) -> s32[] {
  %w = s32[] while(%p), condition=%cond, body=%body
}
"""
    assert exchanged_bytes(text) == {"all-gather": 7 * 16 * 4 * 4 * 7 // 8}


def test_slices_have_the_devices_that_a_mesh_needs():
    assert topology_of("tpu7x", 8)[0] == "tpu7x:2x2x1"
    with pytest.raises(ValueError, match=r"mesh: expected 1, 2, .* devices of v6e, got 6"):
        topology_of("v6e", 6)
    with pytest.raises(ValueError, match=r"got 'v6e-32'; 32 of them are chip v6e"):
        check_chip("chip", "v6e-32")


def row_of(peak, **others):
    return {"found_by": "TPU compiler", "parts": {}, "peak": peak, **others}


def test_what_was_compiled_is_kept_until_something_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows = []

    def compile_apart(program, *, seconds):
        rows.append(row_of(len(rows), **({"error": "x"} if program.context == 65 else {})))
        return rows[-1]

    monkeypatch.setattr(measuring, "compile_apart", compile_apart)
    assert measuring.measure(program())["peak"] == 0
    again = measuring.measure(program())
    assert again == row_of(0, is_kept=True)
    assert measuring.measure(program(batch=2))["peak"] == 1
    monkeypatch.setenv("SWAA_BACKEND", "xla")
    assert measuring.measure(program())["peak"] == 2
    for _ in range(2):  # a failure is tried again
        measuring.measure(program(context=65))
    assert len(rows) == 5


@pytest.mark.parametrize("text", ["", '{"peak": 1', "[]", "{}", '{"peak": "1"}', "\udcff", "7"])
def test_a_wrong_entry_of_what_is_kept_is_compiled_again(text, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measuring, "compile_apart", lambda *_, **__: row_of(5))
    measuring.measure(program())
    (path,) = (tmp_path / "swaa_jax" / "plans").iterdir()
    path.write_bytes(text.encode(errors="surrogateescape"))
    monkeypatch.setattr(measuring, "compile_apart", lambda *_, **__: row_of(6))
    assert measuring.measure(program()) == row_of(6)
    assert measuring.measure(program()) == row_of(6, is_kept=True)


def test_a_compile_that_is_killed_leaves_what_is_kept_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "compile_apart", lambda *_, **__: row_of(5))
    measuring.measure(program())
    (kept,) = (tmp_path / "swaa_jax" / "plans").iterdir()
    whole = kept.read_bytes()
    monkeypatch.setattr(measuring, "compile_apart", killed)
    with pytest.raises(KeyboardInterrupt):
        measuring.measure(program(batch=2))
    monkeypatch.setattr(measuring.os, "replace", killed)  # as late as can be
    monkeypatch.setattr(measuring, "compile_apart", lambda *_, **__: row_of(7))
    with pytest.raises(KeyboardInterrupt):
        measuring.measure(program(batch=2))
    assert list(kept.parent.iterdir()) == [kept] and kept.read_bytes() == whole
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measuring, "compile_apart", lambda *_, **__: row_of(8))
    assert measuring.measure(program(batch=2)) == row_of(8)
    assert measuring.measure(program()) == row_of(5, is_kept=True)


def test_a_compile_that_takes_too_long_is_ended(monkeypatch):
    def run(*_, timeout, **__):
        raise subprocess.TimeoutExpired("child", timeout)

    monkeypatch.setattr(subprocess, "run", run)
    assert measuring.compile_apart(program(), seconds=3) == {
        "error": "a compile that takes more than 3 s (--seconds)"
    }


def test_a_chip_that_is_not_here_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = plan("decode", "tiny-retriever", chip="h100", context=512)
    assert found.found_by == "closed form" and "this machine has" in str(found)


def test_the_command(capsys):
    typed = "plan serve Qwen3-4B --policy naive --chip h100 --slots 4 --context 8k --closed-form"
    assert main(typed.split()) == 0
    assert "chunk: fits" in capsys.readouterr().out
    assert main([*typed.replace("h100", "v5e").replace("8k", "40k").split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["figures"][0]["found_by"] == "closed form" and found["context"] == 40960
    assert main(typed.replace("naive --chip h100", "full --chip v5e").split()) == 0
    assert main(typed.replace("naive", "full").replace("8k", "1000k").split()) == 1
    for typed, told in (
        ("plan train Qwen3-4B --chip v6", "--chip: expected one of v4, v5e"),
        ("plan train Qwen3-4B --closed-form", "--chip: expected one by name"),
        ("plan train Qwen3-4B --chip v5e --mesh fsdp=8 --batch 3", "--batch: expected a multiple"),
        ("plan train Qwen3-4B --chip v5e --context 1k,2k", "--context: expected one number"),
        ("plan serve Qwen3-4B --chip v5e --batch 1 --slots 2", "--slots: expected none with"),
    ):
        assert main(typed.split()) == 2
        assert told in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_of_training_for_a_chip_that_is_not_here():
    tpu_compiler.needs_libtpu()
    found = swaa.plan("train", "tiny-retriever", policy="window=64", chip="v5e", context=2048)
    (figures,) = found.figures
    assert figures.found_by == "TPU compiler" and figures.fits
    assert sum(figures.parts.values()) == figures.peak


@pytest.mark.slow
def test_decoding_here_is_measured_by_xla():
    (figures,) = swaa.plan("decode", "tiny-retriever", context=512, batch=2).figures
    assert figures.found_by == "XLA on the attached device" and figures.fits
    assert sum(figures.parts.values()) == figures.peak
    formula = plan("decode", "tiny-retriever", chip="h100", context=512, batch=2, compiles=False)
    assert figures.parts["parameters"] == formula.figures[0].parts["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("layer", [LayerAttention(), LayerAttention(window=300)], ids=str)
def test_bytes_of_a_compiled_layer_are_those_of_the_formula(layer):
    """What a plan counts in a program of eight devices, and what it says before one is compiled."""
    mesh, tokens = make_mesh(jax.devices()[:8], context=8), 4096
    split = NamedSharding(mesh, PartitionSpec(None, "context"))
    q, k = (
        jax.ShapeDtypeStruct((1, tokens, heads, 16), "float32", sharding=split) for heads in (4, 2)
    )
    options = AttentionOptions(mesh=mesh, backend="xla")
    run = jax.jit(functools.partial(attend, layer=layer, options=options))
    counted = exchanged_bytes(run.lower(q, k, k).compile().as_text())
    formula = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "itemsize": 4}
    told = costs.exchanged_bytes(layer, tokens=tokens, shards=8, **formula)
    segments = 0 if layer.window is None else 4 * (layer.window - 1)  # which the formula leaves out
    assert sum(counted.values()) == told + segments


@pytest.mark.parametrize(
    "work, given",
    [
        ("serve", {"lora_rank": 8}),
        ("serve", {"lora_rank": None}),
        ("decode", {"remat": "offload"}),
        ("train", {"chunk_size": 512}),
        ("train", {"step": 4096}),
        ("train", {"effort": -1.0}),
    ],
)
def test_what_is_not_used_is_refused(work, given):
    (name,) = given
    with pytest.raises(ValueError, match=f"{name}: expected none for {work} on h100, by formulas"):
        plan(work, "Qwen3-0.6B", chip="h100", compiles=False, **given)
