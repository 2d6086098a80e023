"""`swaa recipes`: what is listed, recommended and counted, against the paper and whole models."""

import dataclasses
import functools
import json
import pathlib

import jax.numpy as jnp
import pytest

import swaa_jax as swaa
from swaa_jax.cli.main import main
from swaa_jax.costs import cache_bytes
from swaa_jax.eval.search import shipped as recipes
from swaa_jax.lora import without_lora
from swaa_jax.policy import AttentionPolicy, Needs, load_policy
from tests.support.training import lora_model

# arXiv 2512.10411 v5, Table 1: LongMemEval_24k, LongBench-v2, RULER; Thinking, then Instruct.
TABLE_1 = {
    "full": ((73.0, 34.6, 85.6), (62.0, 35.2, 92.8)),  # row 0
    "naive": ((3.2, 9.4, 0.0), (11.0, 25.8, 0.0)),  # row 1
    "thinking-no-train-efficient": ((50.0, 24.2, 3.2), None),  # row 8
    "instruct-no-train": (None, (53.6, 28.6, 75.8)),  # row 17
    "thinking-no-train-quality": ((73.0, 33.4, 65.4), None),  # row 22
    "trained-efficient-fa-decode": ((57.9, 29.2, 0.4), (42.0, 30.2, 0.8)),  # row 27
    "trained-efficient-interleave": ((63.6, 29.5, 59.0), (54.6, 31.9, 62.2)),  # row 28
    "trained-quality": ((73.2, 38.3, 74.0), (58.8, 34.6, 85.8)),  # row 31
    "trained-quality-sinks": ((73.2, 37.2, 72.8), (61.4, 33.9, 89.2)),  # row 34
}
TRAINED_FULL = ((74.6, 37.9, 88.2), (63.4, 34.9, 90.6))  # row 24
MODELS = ("Qwen3-4B-Thinking-2507", "Qwen3-4B-Instruct-2507")


@pytest.mark.parametrize("name", TABLE_1)
def test_evidence_is_the_papers(name):
    found = {r.file.name: r for r in recipes.list_recipes()}[name]
    full = TRAINED_FULL if found.file.needs.training else TABLE_1["full"]
    for model, scores, limits in zip(MODELS, TABLE_1[name], full, strict=True):
        got = [(one.score, one.full) for one in found.file.evidence if one.model == model]
        assert got == ([] if scores is None else list(zip(scores, limits, strict=True)))


@functools.cache
def listed():
    return recipes.list_recipes()


def names(needs, **options):
    return [one.file.name for one in recipes.recommend(listed(), needs, **options)]


def test_recommendations_are_table_2():
    untrained = {"training": False}
    assert names(Needs(**untrained, thinking=False))[0] == "instruct-no-train"  # 0.86, 0.70 kept
    for prefer in (None, "quality", "efficiency"):
        instruct = Needs(**untrained, thinking=False, prefer=prefer)
        assert names(instruct, model=MODELS[1]) == ["instruct-no-train"]
        for model in ("meta-llama/Llama-3.1-8B-Instruct", "Meta-Llama-3.1-8B-Instruct"):
            assert names(instruct, model=model) == ["instruct-no-train-even-layers"]
    efficient = Needs(**untrained, thinking=True, prefer="efficiency")
    assert names(efficient) == ["thinking-no-train-efficient"]
    quality = Needs(**untrained, thinking=True, prefer="quality")
    assert names(quality, model=f"Qwen/{MODELS[0]}") == ["thinking-no-train-quality"]
    assert names(quality, model="Qwen/Qwen3-30B-A3B-Thinking-2507/") == [
        "thinking-no-train-even-layers"
    ]
    assert set(names(Needs(training=True, prefer="efficiency"))) == {
        "trained-efficient-fa-decode",
        "trained-efficient-interleave",
    }
    assert names(Needs(training=True, thinking=False, prefer="quality"))[0].startswith(
        "trained-quality"
    )
    assert not {"full", "naive"} & set(names(Needs()))


def test_a_memory_limit_leaves_out_what_keeps_everything():
    listed = {one.file.name: one for one in recipes.list_recipes(context=131072)}
    half, whole = listed["trained-efficient-interleave"], listed["trained-efficient-fa-decode"]
    assert half.memory < whole.memory
    needs = Needs(training=True)
    found = recipes.recommend(list(listed.values()), needs, max_memory=half.memory)
    assert [one.file.name for one in found] == ["trained-efficient-interleave"]
    assert not recipes.recommend(list(listed.values()), needs, max_memory=half.memory - 1)


GIB = 1 << 30


def test_memory_is_near_what_the_tpu_compiler_says():
    """Peaks of the engine's chunks, and of a prompt in one piece, on one chip (aot_models.json)."""
    rows = json.loads(pathlib.Path("benchmarks/results/aot_models.json").read_text())["rows"]
    compared = 0
    for row in rows:
        if row["model"] != "Qwen3-4B" or row["mesh"] != {"tensor": 1} or row["kind"] == "steps":
            continue
        policy = AttentionPolicy()
        if row["window"]:
            policy = AttentionPolicy(
                window=row["window"],
                num_sink_tokens=row["sinks"],
                full_attention_layers=row["full_layers"] or (),
                decode=row["decode"],
            )
        chunk, whole = recipes.memory_of(recipes.QWEN3_4B, policy.resolve(36), row["context"])
        found, near = (chunk, 0.02) if row["kind"] == "chunk" else (whole, 0.05)
        assert found == pytest.approx(row["peak"], rel=near), row
        compared += 1
    assert compared == 5


def test_recipes_in_python(no_type_checks):
    found = swaa.recipes(training=False, thinking=True, prefer="efficiency")
    assert [one.name for one in found] == ["thinking-no-train-efficient"]
    assert found.table().columns[:2] == ("name", "policy")
    assert "Thinking: 50 of 73" in found._repr_html_() and "Thinking: 50 of 73" in str(found)
    everything = {one.name: one for one in swaa.recipes()}
    assert everything["full"].memory > 12.4 * GIB  # weights and caches alone: 11.99
    tiny = swaa.recipes(swaa.load_model("tiny-retriever", dtype="bfloat16"), context=1024)
    by_name = swaa.recipes("tiny-retriever", context=1024)
    assert [one.memory for one in tiny] == [one.memory for one in by_name]
    for arguments, message in [
        ({"memory": 5}, "memory: expected at least 10.5 GiB"),
        ({"memory": "16GiB"}, "memory: expected a number of GiB above 0, got '16GiB'"),
        ({"prefer": "speed"}, "prefer: expected one of quality, efficiency, got 'speed'"),
        ({"model": 3}, "model: expected a path or name"),
        ({"context": "long"}, "context: expected an integer"),
        ({"rows": 0}, "rows: expected an integer of at least 1"),
        ({"thinking": "yes"}, "thinking: expected true or false"),
    ]:
        with pytest.raises(ValueError, match=message) as told:
            swaa.recipes(**arguments)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["full", "naive", "trained-efficient-interleave"])
def test_cache_bytes_are_those_of_a_models_caches(name):
    policy = load_policy(name)
    if policy.window is not None:
        policy = dataclasses.replace(policy, window=6)  # shorter than the prompt
    model = without_lora(lora_model(num_hidden_layers=4)).with_policy(policy)
    config = model.config
    caches = model.prefill(jnp.full((1, 16), 3), cache_size=32).caches
    slots = max(cache.num_slots for cache in caches.layers)
    want = cache_bytes(
        policy.resolve(4),
        tokens=slots,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        itemsize=4,
    )
    assert caches.nbytes == want


def test_the_command(capsys):
    assert main(["recipes", "--no-training", "--thinking", "--prefer", "efficiency"]) == 0
    assert "Begin with thinking-no-train-efficient" in capsys.readouterr().out
    assert main(["recipes", "--model", "tiny-retriever", "--context", "1152", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    full = rows["full"]
    assert full["prefill_share"] == 1.0
    assert full["cache_bytes"] == 9216 * 1024  # the demo's KV KiB, 1,024 + 128 tokens
    assert full["memory_bytes"] - full["cache_bytes"] > 2 * 6_887_680
    assert main(["recipes", "trained-quality"]) == 0
    shown = capsys.readouterr().out
    assert "window: 2000" in shown and "73.2" in shown and "Table 1, row 31" in shown
    assert "for: fine-tuned, quality" in shown
    assert main(["recipes", "naive"]) == 0
    assert "for: comparison" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["trained-qualty"], "did you mean 'trained-quality'"),
        (["--memory", "1"], "--memory: expected at least 10.5 GiB"),
        (["--context", "0"], "--context: expected an integer of at least 1, got 0"),
        (["--model", "./nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_paragraph(arguments, message, capsys):
    assert main(["recipes", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_flags_of_a_search_want_a_search(capsys):
    assert main(["recipes", "--floor", "0.9"]) == 2
    assert "--floor: expected --search with it" in capsys.readouterr().err
