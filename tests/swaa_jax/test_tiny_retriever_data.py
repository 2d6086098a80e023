"""tiny-retriever's training data, assembled from arrays, against text and the tokenizer."""

import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from swaa_jax.eval.tasks.ruler import HAYSTACKS, text
from training.tiny_retriever import config, data, loader
from training.tiny_retriever.pieces import Vocabulary

ROOT = pathlib.Path(__file__).parents[2]
TOKENIZER = AutoTokenizer.from_pretrained(ROOT / "swaa_jax" / "assets" / "tiny-retriever")
VOCAB = Vocabulary(num_sentences=3000)
FACT = re.compile(r"([a-z]+-[a-z]+) is: (\d{7})")
LIST = re.compile(r"numbers for ([^:?]*?) mentioned in the provided text are ([^.]*)\.")


def assert_answers_agree(body):
    """Every value in a scratchpad or list is its key's in the needles above."""
    needles = dict(FACT.findall(body.split("<think>")[0]))
    checked = 0
    for key, value in FACT.findall(body.partition("<think>")[2]):
        assert needles[key] == value
        checked += 1
    for keys, values in LIST.findall(body):
        keys, values = re.findall(r"[a-z]+-[a-z]+", keys), re.findall(r"\d{7}", values)
        assert [needles[key] for key in keys] == values
        checked += len(keys)
    assert checked


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    haystack=st.sampled_from(HAYSTACKS),
    thinking=st.booleans(),
    num_keys=st.integers(1, 6),
    data_=st.data(),
)
def test_ruler_documents_are_what_the_tokenizer_makes_of_their_text(
    seed, haystack, thinking, num_keys, data_
):
    num_queries = data_.draw(st.integers(1, num_keys))
    length = data_.draw(st.sampled_from([512, 700, 1024]))
    document = data.ruler_document(
        np.random.default_rng(seed),
        VOCAB,
        length=length,
        haystack=haystack,
        thinking=thinking,
        num_keys=num_keys,
        num_queries=num_queries,
    )
    body = TOKENIZER.decode(document.tokens)
    assert TOKENIZER.encode(body) == document.tokens.tolist()
    # A shorter sentence than five tokens with its separator there is not.
    assert length - 4 <= len(document.tokens) <= length
    assert_answers_agree(body)

    # The same words as evaluation's, through the chat template.
    user = body.removeprefix("<|im_start|>user\n").partition("<|im_end|>")[0]
    assert user.startswith(text.PROMPT_HEAD)
    keys = re.findall(r"[a-z]+-[a-z]+", user.rpartition("numbers for ")[2])
    query = text.join_list(keys)
    assert user.endswith(text.PROMPT_TAIL.format(query=query))
    prompt = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": user}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=thinking,
    )
    assert body.startswith(prompt)
    answer = body.removeprefix(prompt)
    values = [dict(FACT.findall(user))[key] for key in keys]
    last = f"{text.ANSWER_PREFIX.format(query=query)} {text.join_list(values)}.<|im_end|>"
    if thinking:
        lines = "".join(f"- {k} is: {v}.\n" for k, v in zip(keys, values, strict=True))
        assert answer == f"{lines}</think>\n\n{last[1:]}"
    else:
        assert answer == last
    starts = np.flatnonzero(document.groups)
    assert [TOKENIZER.decode(document.tokens[s : s + 3]) for s in starts] == values * (1 + thinking)
    assert (document.weights[starts] == 1).all()


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("length", [128, 256, 1024])
def test_dense_documents(listed, length):
    rng = np.random.default_rng(0)
    for _ in range(20):
        document = data.dense_document(rng, VOCAB, length=length, listed=listed)
        body = TOKENIZER.decode(document.tokens)
        assert TOKENIZER.encode(body) == document.tokens.tolist()
        assert length - 30 <= len(document.tokens) <= length
        assert_answers_agree(body)


def test_recall_documents_repeat_their_table():
    rng = np.random.default_rng(0)
    for _ in range(50):
        document = data.recall_document(rng, VOCAB, length=128)
        starts = np.flatnonzero(document.groups)
        size = int(np.diff(starts).min()) if len(starts) > 1 else None
        if size is None:
            continue
        first = int(starts[0]) // size * size
        rows = {tuple(document.tokens[i : i + size]) for i in range(0, first, size)}
        asked = range(first, len(document.tokens), size)
        assert {tuple(document.tokens[i : i + size]) for i in asked} <= rows
        keys = {row[: (starts[0] - first)] for row in rows}
        assert len(keys) == len(rows)  # a key says which row is meant


def test_repeat_documents_repeat():
    rng = np.random.default_rng(0)
    document = data.repeat_document(rng, VOCAB, length=256)
    period = int(np.flatnonzero(document.weights > 0.1)[0])
    assert (document.tokens[period:] == document.tokens[:-period]).all()


@pytest.mark.parametrize("stage", config.STAGES)
def test_batches(stage):
    batch = data.make_batch(VOCAB, stage, seed=(0, 1, 2))
    again = data.make_batch(VOCAB, stage, seed=(0, 1, 2))
    other = data.make_batch(VOCAB, stage, seed=(0, 1, 3))
    assert batch.tokens.shape == (stage.batch_tokens // stage.width, stage.width)
    assert (batch.tokens == again.tokens).all()
    assert (batch.tokens != other.tokens).any()
    assert batch.filled > 0.95
    assert (batch.weights[batch.tokens == VOCAB.pad] == 0).all()
    assert batch.tokens.max() < VOCAB.size == config.MODEL["vocab_size"]


def test_the_number_of_workers_does_not_matter():
    stages = config.SMOKE_STAGES

    def first(num_workers):
        with loader.Loader(stages, seed=3, num_workers=num_workers) as batches:
            batches.set_stage(0, 0)
            made = [next(batches) for _ in range(5)]
            batches.set_stage(1, 0)  # what was made ahead for stage 0 must not come out
            return [batch.tokens for batch in [*made, next(batches), next(batches)]]

    for alone, together in zip(first(0), first(2), strict=True):
        assert (alone == together).all()


def test_stages_advance_on_exact_match_only():
    from training.tiny_retriever.train import should_advance

    stage = config.STAGES[2]
    good = {"list/noise": 0.99, "scratchpad/noise": 0.99, "dense_list": 0.1}
    assert should_advance(stage, stage.min_steps, good)
    assert not should_advance(stage, stage.min_steps - 1, good)
    assert not should_advance(stage, stage.min_steps, good | {"answer/essay": 0.5})
    assert not should_advance(stage, stage.min_steps, {})
    assert should_advance(stage, stage.max_steps, {"list/noise": 0.0})


@pytest.mark.slow
def test_training_stops_goes_on_and_exports(tmp_path):
    script = ROOT / "training" / "tiny_retriever" / "train.py"

    def run(name, *arguments):
        command = [sys.executable, script, "--smoke", "--out", tmp_path / name, *arguments]
        subprocess.run(list(map(str, command)), check=True)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def losses(entries):
        return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}

    whole = run("whole")
    assert len(run("cut", "--time-limit", 0)) == 1  # a step, and out of time
    assert not (tmp_path / "cut" / "model").exists()
    assert losses(run("cut")) == losses(whole)

    steps = losses(whole)
    assert list(steps) == list(range(1, 21))
    assert steps[10] < steps[1]  # of the first stage
    stages = [entry["eval/stage"] for entry in whole if "eval/stage" in entry]
    assert stages == [0, 0, 1, 1]

    import swaa_jax

    model = swaa_jax.load_model(tmp_path / "whole" / "model")
    assert model.config.hidden_size == config.SMOKE_MODEL["hidden_size"]
    assert (tmp_path / "whole" / "model" / "tokenizer.json").exists()
