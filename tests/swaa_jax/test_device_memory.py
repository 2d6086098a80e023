"""What does not fit a device: what is said to fit does, in arithmetic and where XLA runs out."""

import dataclasses
import re

import jax
import numpy as np
import pytest

import swaa_jax as swaa
from swaa_jax.data import Sample
from swaa_jax.engine import Engine, EngineOptions
from swaa_jax.engine import engine as engines
from swaa_jax.engine.demand import chunk_bytes, demand_of
from swaa_jax.infer import likelihoods
from swaa_jax.infer.likelihoods import Continuation, score_continuations
from swaa_jax.memory import Demand, DeviceMemoryError, told_when_full
from swaa_jax.models.function import split_model
from swaa_jax.train import dry_run
from swaa_jax.train.step import Trainer
from tests.support import byte_tokenizer, train_runs
from tests.support.random_models import random_model

FULL = swaa.AttentionPolicy()
RINGS = swaa.AttentionPolicy(window=6, num_sink_tokens=2)
OUT = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1GiB.")


def demand(**changes):
    given = {
        "rows": 6,
        "tokens": 1000,
        "row_option": "rows_option",
        "token_option": "tokens_option",
        "bytes_of": lambda rows, tokens: 700 + rows * (50 + 3 * tokens),
        "memory": 10_000,
        "advice": "or do this",
        "unit": 10,
    }
    return Demand(**(given | changes))


def said(text: str) -> list[tuple[int, int]]:
    """Rows and tokens that a message says would fit."""
    return [(int(a), int(b)) for a, b in re.findall(r"(\d+) rows? of (\d+) tokens(?=.* fit)", text)]


@pytest.mark.parametrize("memory", [0, 700, 800, 1_500, 4_000, 9_000, 10_000, 18_000, 30_000])
def test_what_is_said_to_fit_does_and_no_more(memory):
    one = demand(memory=memory)
    fitting = [
        (rows, tokens)
        for rows in range(1, 7)
        for tokens in range(10, 1001, 10)
        if one.bytes_of(rows, tokens) <= memory
    ]
    assert one.exceeds == ((6, 1000) not in fitting)
    found = said(one.would_fit())
    if not fitting:
        assert found == [] and one.would_fit() == "not one row would fit"
        return
    assert set(found) <= set(fitting)
    for rows, tokens in found:
        assert (rows, tokens + 10) not in fitting
        assert tokens < 1000 or (rows + 1, tokens) not in fitting
    assert found[0] == max(fitting) if found[0][0] == 6 else found[0][0] in (1, max(fitting)[0])


@pytest.mark.parametrize(
    "message, asked",
    [
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1200 bytes.", 1200),
        ("RESOURCE_EXHAUSTED: Failed to allocate request for 1.5KiB (1536B) on device", 1536),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1.5KiB: ...", 1536),
        ("RESOURCE_EXHAUSTED: Error allocating: Attempting to allocate 1.5K. That was not", 1536),
        ("RESOURCE_EXHAUSTED: Ran out. Exceeded hbm capacity by 1.5K. Total", 1536),
        ("RESOURCE_EXHAUSTED: no number", 1),
    ],
)
def test_where_xla_runs_out_the_message_says_what_would_fit(message, asked):
    """All that is asked for would fit by arithmetic; the part of it that XLA had room for does."""
    one = demand(memory=1 << 20)
    assert not one.exceeds
    with (
        pytest.raises(DeviceMemoryError, match="tokens_option: expected rows that fit") as told,
        told_when_full(lambda: one),
    ):
        raise jax.errors.JaxRuntimeError(message)
    text = str(told.value)
    assert "got 6 of 1000 tokens" in text
    assert text.endswith("lower tokens_option or rows_option, or do this")
    least = 700 + 50 + 3 * 10  # of one row
    share = ((1 << 20) - least) / ((1 << 20) - least + asked)
    room = least + share * (one.needed - least)
    tokens = max(n for n in range(0, 1001, 10) if one.bytes_of(6, n) <= room)
    assert tokens < 1000 and (6, tokens) in said(text)


@pytest.mark.parametrize(
    "asked, fits", [(20_000, (6, 980)), (1_000_000, (6, 490)), (1 << 40, (1, 10))]
)
def test_where_xla_asks_for_more_than_was_estimated(asked, fits):
    """What tokens take was guessed too small; rows are not said to be out of the question."""
    one = demand(memory=1_000_000)
    assert asked > one.needed
    assert said(one.would_fit(lacking=asked))[0] == fits
    assert demand(memory=700).would_fit(lacking=asked) == "not one row would fit"


@pytest.mark.parametrize(
    "message",
    [
        "INTERNAL: something else",
        "RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 270336, available: 1",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 32.42M of 16.00M vmem.",
    ],
)
def test_other_errors_are_left_alone(message):
    """Those of a kernel's own memory too: fewer tokens do not mend them."""
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match=message.split(":")[0]),
        told_when_full(lambda: pytest.fail("was asked")),
    ):
        raise jax.errors.JaxRuntimeError(message)


OPTIONS = EngineOptions(num_slots=512, max_tokens=128, chunk_size=16, page_size=8)


def model_of(policy):
    return random_model(policy, num_hidden_layers=2)


@pytest.mark.parametrize("policy", [FULL, RINGS], ids=["full", "rings"])
def test_an_engine_takes_what_it_said_would_fit(policy, monkeypatch):
    """Of hundreds of rows none is begun; those that are told have all their pages and rings."""
    model = model_of(policy)
    weights = engines.bytes_of_arrays(split_model(model).arrays.values())
    monkeypatch.setattr(engines, "device_memory", lambda _: 4 * weights)
    with pytest.raises(DeviceMemoryError, match="memory_share: expected room for") as told:
        Engine(model, OPTIONS)
    found = said(str(told.value))
    assert found, told.value
    for rows, tokens in found:
        room = dataclasses.replace(OPTIONS, num_slots=rows, max_tokens=tokens, reuse=False)
        engine = Engine(model, room)
        whole = model.empty_caches(rows, cache_size=tokens, pages=(rows * tokens // 8, 8))
        assert engine.cache_bytes == whole.nbytes


def test_a_step_computes_within_the_memory_that_is_left(monkeypatch):
    """What a long chunk takes is left free, where it is more than the share leaves."""
    model = split_model(model_of(FULL))
    weights = engines.bytes_of_arrays(model.arrays.values())
    monkeypatch.setattr(engines, "device_memory", lambda _: 8 * weights)
    options = dataclasses.replace(OPTIONS, num_slots=8)
    working = engines.chunk_bytes(model, options)
    assert 0 < working < 7 * weights
    engine = Engine(model, options, memory_share=1.0)
    assert weights + engine.cache_bytes <= 8 * weights - working
    monkeypatch.setattr(engines, "chunk_bytes", lambda *_: 7 * weights)
    with pytest.raises(DeviceMemoryError, match=r"got a device's .* less .* lower chunk_size, or"):
        Engine(model, OPTIONS, memory_share=1.0)


def test_what_any_model_reads_with_is_counted():
    """The one with the largest caches may read in the smallest pieces."""
    models = {"full": split_model(model_of(FULL)), "rings": split_model(model_of(RINGS))}
    options = {"full": dataclasses.replace(OPTIONS, num_slots=1), "rings": OPTIONS}
    asked = demand_of(models, options, weight_bytes=0, memory=1 << 30, share=1.0)
    assert asked.rows == 512
    caches = [asked.bytes_of(rows, 8) for rows in (1, 2)]
    alone = caches[0] - (caches[1] - caches[0])  # without a row
    assert alone >= chunk_bytes(models["full"], options["full"])


def test_generate_tells_what_would_fit(monkeypatch):
    def full(*args, **kwargs):
        raise OUT

    monkeypatch.setattr("swaa_jax.engine.lane.Lane.round", full)
    with pytest.raises(DeviceMemoryError, match=r"max_tokens: expected rows that .*batch_size"):
        swaa.generate(model_of(FULL), None, [[5, 6, 7]] * 2, max_new_tokens=4)


def test_scoring_tells_what_would_fit(monkeypatch):
    def full(*args, **kwargs):
        raise OUT

    monkeypatch.setattr(likelihoods, "_token_losses", full)
    texts = [Continuation(context=[5] * n, tokens=[6]) for n in (30, 40)]
    with pytest.raises(DeviceMemoryError, match="lower continuations or batch_size"):
        score_continuations(model_of(FULL), texts)


@pytest.mark.parametrize(
    "method, program, lower",
    [
        ("add_one", "per_row._row_losses", "max_length or rows_at_once"),
        ("gates", "gates._step", "max_length or rows"),
        ("lazy_ratio", "lazy_ratio._ratios", "max_length"),
    ],
)
def test_selection_tells_what_would_fit(method, program, lower, monkeypatch):
    def full(*args, **kwargs):
        raise OUT

    full.num_compiled = lambda structure: 0
    monkeypatch.setattr(f"swaa_jax.selection.{program}", full)
    tokens = np.arange(40, dtype=np.int32)
    samples = [Sample(tokens=tokens, stage_ids=tokens * 0, is_target=tokens > 30)] * 2
    with pytest.raises(DeviceMemoryError, match=f"max_length: expected rows .* lower {lower}, or"):
        swaa.select_layers(
            model_of(FULL), data=samples, policy="window=8", num_full_layers=1, method=method
        )


def test_distillation_tells_what_would_fit(monkeypatch):
    def full(*args, **kwargs):
        raise OUT

    monkeypatch.setattr("swaa_jax.engine.lane.Lane.round", full)
    with pytest.raises(DeviceMemoryError, match=r"max_tokens: expected rows that .*batch_size"):
        swaa.distill(
            train_runs.small_model(),
            byte_tokenizer.build(),
            [{"prompt": "one plus one", "answer": "2"}],
            max_new_tokens=4,
        )


def run(tmp_path, **changes):
    given = {
        "model": train_runs.small_model(),
        "tok": byte_tokenizer.build(),
        "data": {
            "records": [{"prompt": f"{n} plus one", "answer": f"{n + 1}"} for n in range(4)],
            "batch_size": 4,
            "packing": "bucket",
            "bucket_widths": [64],
            "seq_len": 64,
        },
        "lora": {"rank": 2, "alpha": 4},
        "optimizer": {"warmup_steps": 0},
        "metrics": {"tensorboard": False},
        "output_dir": tmp_path / "out",
        "max_steps": 1,
        "progress": False,
    }
    return swaa.train(**(given | changes))


def test_a_run_that_will_hardly_fit_is_warned_of(tmp_path, monkeypatch, caplog):
    """And tried."""

    def begins(*args, **kwargs):
        raise InterruptedError

    monkeypatch.setattr(Trainer, "__call__", begins)
    monkeypatch.setattr(dry_run, "memory_of", lambda _: 300_000)
    with pytest.raises(InterruptedError):
        run(tmp_path, rows_per_device=4)
    (line,) = [one.getMessage() for one in caplog.records if "expected rows" in one.getMessage()]
    assert "data.seq_len: expected rows that fit a device's 0.000279 GiB, got 4 of 64" in line
    ((rows, tokens), *_) = said(line)
    assert rows == 4 and 0 < tokens < 64


def test_a_run_that_does_not_fit_says_what_would(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OUT

    monkeypatch.setattr(Trainer, "__call__", full)
    with pytest.raises(
        DeviceMemoryError, match=r"lower data\.seq_len, take remat=offload, or split"
    ) as told:
        run(tmp_path)
    assert "and 1 GiB more was asked for" in str(told.value)
