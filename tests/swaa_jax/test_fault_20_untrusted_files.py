"""Kinds 20 to 29, second round: tokenizers that grow a text, long lines, pipes, kept files."""

import json
import os
import pathlib
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from etils import epath

import swaa_jax as swaa
from swaa_jax.checkpoint import read_config
from swaa_jax.checkpoint.provenance import weight_marks
from swaa_jax.cli.errors import one_paragraph
from swaa_jax.data import DataConfig, prepare_samples
from swaa_jax.distill import run as distillation
from swaa_jax.eval.evaluation import evaluate
from swaa_jax.eval.judging import Judged, make_judge
from swaa_jax.eval.run import EvalConfig, TaskEntry
from swaa_jax.eval.tasks import QaTask
from swaa_jax.infer.prompts import encode_prompts
from swaa_jax.limits import CONFIG_BYTES
from swaa_jax.lora import LoraConfig
from swaa_jax.models.config_types import check_config_types
from swaa_jax.records import DataError, open_records
from swaa_jax.redact import redact, redact_url
from swaa_jax.runs import differences, fingerprint
from swaa_jax.storage import CheckpointError, sha256
from swaa_jax.train.checkpoints import Checkpoints
from tests.support import byte_tokenizer
from tests.support.random_models import random_model

DOUBLE = {"type": "Replace", "pattern": {"String": "t"}, "content": "tt"}
TEMPLATE = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}


@pytest.mark.parametrize(
    ("part", "steps"),
    [
        ("normalizer", {"type": "Sequence", "normalizers": [DOUBLE] * 24}),
        ("normalizer", {"type": "Prepend", "prepend": "x" * 2_000}),
        ("normalizer", {**DOUBLE, "pattern": {"Regex": "."}, "content": "x" * 2_000}),
        ("normalizer", {**DOUBLE, "pattern": {"String": ""}, "content": "x" * 2_000}),
        ("decoder", {"type": "Sequence", "decoders": [DOUBLE] * 24}),
        (
            "post_processor",
            {**TEMPLATE, "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2_000},
        ),
    ],
)
def test_fault_23_a_tokenizer_that_makes_a_text_long(tmp_path, part, steps):
    byte_tokenizer.build().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: steps}))
    with pytest.raises(CheckpointError, match=f"tokenizer.json: {part}: expected steps that make"):
        swaa.load_tokenizer(tmp_path)


def test_fault_23_lists_of_a_small_parquet_file(tmp_path):
    count = 160_000_000
    zeros = pyarrow.array(np.zeros(count, np.int8))
    lists = pyarrow.ListArray.from_arrays(pyarrow.array([0, count], pyarrow.int32()), zeros)
    table = pyarrow.table({"prompt": ["a"], "answer": ["b"], "x": lists})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", compression="zstd")
    assert (tmp_path / "x.parquet").stat().st_size < 10_000
    with pytest.raises(DataError, match="row group 0: expected at most 1024 MB of records"):
        open_records([tmp_path / "x.parquet"])


def test_fault_22_lines_are_found_in_time_linear_in_their_length(tmp_path):
    """A line of 256 MB is never held, let alone copied for each piece that is read of it."""
    (tmp_path / "a.jsonl").write_bytes(b"")
    os.truncate(tmp_path / "a.jsonl", 1 << 28)
    tracemalloc.start()
    records = open_records([tmp_path / "a.jsonl"])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(records) == 1
    assert peak < 1 << 26, peak
    mixed = tmp_path / "b.jsonl"
    mixed.write_text(
        '{"a": 1}\n\n  \n{"a": 2}\r\n' + json.dumps({"a": "x" * 9_000_000}) + '\n{"a": 3}'
    )
    found = list(open_records([mixed]))
    assert [one.line for one in found] == [1, 4, 5, 6]
    assert [len(str(one.fields["a"])) for one in found] == [1, 1, 9_000_000, 1]


def test_fault_25_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="expected a regular file, got a pipe"):
        open_records([tmp_path / "a.jsonl"])
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="expected a regular file, got something else"):
        weight_marks(tmp_path)


def test_fault_22_a_config_that_is_too_long(tmp_path):
    (tmp_path / "config.json").write_bytes(b"{}")
    os.truncate(tmp_path / "config.json", CONFIG_BYTES + 1)
    with pytest.raises(CheckpointError, match="expected at most 64 MB"):
        read_config(tmp_path)


def test_fault_24_echoes_are_bounded():
    with pytest.raises(ValueError) as raised:
        check_config_types({"rope_parameters": {f"k{n}" * 50: {"factor": "x"} for n in range(900)}})
    assert len(str(raised.value)) < 3_000 and "and 890 more" in str(raised.value)
    assert len(differences({"a": 1}, {"x" * 10_000: 2})) < 600
    with pytest.raises(ValueError, match="rank_pattern: expected at most 20000 patterns"):
        LoraConfig(rank_pattern={f"m{n}": 1 for n in range(20_001)})


def test_fault_29_secrets_in_every_form():
    assert redact_url("http://host/v1?SECRET") == "http://host/v1?(hidden)"
    for secret, echoed in (
        ('sk-"ab', 'key sk-\\"ab'),
        ("se cret/9", "se+cret%2f9"),
        ("a b", "a%20b"),
    ):
        assert redact(f"got {echoed}!", [secret]).endswith("(hidden)!"), echoed
    judge = make_judge("llm", url="http://127.0.0.1:9/v1?key=se+cret%2f9&BARE", model="m")
    assert {"se+cret%2f9", "se cret/9", "BARE"} <= set(judge._endpoint.secrets)


def test_fault_30_messages_hold_no_control_characters():
    assert one_paragraph(ValueError("a \x1b]0;pwn\x07 b")) == "a \\x1b]0;pwn\\x07 b"
    assert one_paragraph(ValueError("naïve 文")) == "naïve 文"


def cached(path):
    return prepare_samples(
        DataConfig(files=str(path / "d.jsonl"), seq_len=99, batch_size=1, chat_template=False),
        byte_tokenizer.build(template=None),
    )


@pytest.mark.parametrize("damage", ["tokens", "lengths", "shape", "huge"])
def test_fault_27_a_cache_with_digests_of_its_own(tmp_path, caplog, damage):
    (tmp_path / "d.jsonl").write_text('{"prompt": "Q", "response": "A"}\n' * 3)
    good = cached(tmp_path)
    (place,) = (tmp_path / ".swaa_cache").iterdir()
    if damage == "tokens":
        size = (place / "tokens.bin").stat().st_size // 4
        (place / "tokens.bin").write_bytes(np.full(size, 2**31 - 1, "<i4").tobytes())
    elif damage == "huge":
        header = {"descr": "<i8", "fortran_order": False, "shape": (400_000_000_000,)}
        with open(place / "lengths.npy", "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
    else:
        wrong = np.array(3) if damage == "shape" else np.array([1, 2, 3, 4])
        np.save(place / "lengths.npy", wrong)
    meta = json.loads((place / "meta.json").read_text())
    meta.pop("check")
    meta["sha256"] = {name: sha256(place / name) for name in meta["sha256"]}
    (place / "meta.json").write_text(json.dumps(meta | {"check": fingerprint(meta)}))
    again = cached(tmp_path)
    assert "is damaged" in caplog.text
    assert again.digest == good.digest
    np.testing.assert_array_equal(again[0].tokens, good[0].tokens)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluated")
    swaa.save_model(random_model(vocab_size=byte_tokenizer.VOCAB_SIZE), path / "model")
    byte_tokenizer.build().save_pretrained(path / "model")
    (path / "q.jsonl").write_text('{"prompt": "Q", "answer": "A"}\n' * 2)
    config = EvalConfig.from_dict(
        {
            "models": [str(path / "model")],
            "policies": ["full"],
            "tasks": [
                TaskEntry(name="qa", task=QaTask(files=str(path / "q.jsonl")), max_new_tokens=2)
            ],
            "output_dir": str(path / "out"),
            "dtype": "float32",
        }
    )
    evaluate(config)
    return config


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("answers", lambda d: {**d, "answers": d["answers"][:1]}),
        ("answers", lambda d: {**d, "answers": [{**one, "row": 0} for one in d["answers"]]}),
        ("answers", lambda d: {**d, "answers": [{**one, "response": 1} for one in d["answers"]]}),
        ("answers", lambda d: {**d, "timings": {**d["timings"], "decode_s": -1}}),
        ("verdicts", lambda d: {"verdicts": [{**one, "score": 99} for one in d["verdicts"]]}),
        ("verdicts", lambda d: {"verdicts": d["verdicts"] * 2}),
        ("verdicts", lambda d: {"verdicts": [[1]] * 2}),
    ],
)
def test_fault_20_kept_answers_that_no_run_wrote(evaluated, file, change):
    (path,) = pathlib.Path(evaluated.output_dir).rglob(f"{file}-*.json")
    good = path.read_text()
    try:
        path.write_text(json.dumps(change(json.loads(good))))
        with pytest.raises(ValueError, match=r"expected .*; remove the"):
            evaluate(evaluated)
    finally:
        path.write_text(good)


@pytest.mark.parametrize(
    "columns", [{"judge": None}, {"judge": ["yes"]}, {"response": [None]}, {"question_id": [[1]]}]
)
def test_fault_20_attempts_that_no_run_wrote(tmp_path, columns):
    row = {"question_id": ["a"], "attempt": [0], "prompt": ["Q"], "response": ["A"]}
    row |= {"answer": ["A"], "judge": [1], "reason": [""], "num_tokens": [1]} | columns
    path = tmp_path / "00000.parquet"
    pyarrow.parquet.write_table(pyarrow.table({k: v for k, v in row.items() if v}), path)
    with pytest.raises(ValueError, match=r"00000.parquet: expected what a run wrote"):
        distillation._read_attempts([epath.Path(path)])


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"step": 10**30, "schema_version": 1},
        {"step": -5, "schema_version": 1},
        {"step": 1, "schema_version": 1},
        {"step": 1, "schema_version": 1, "identity": []},
    ],
)
def test_fault_20_a_checkpoint_that_no_run_wrote(tmp_path, record):
    checkpoints = Checkpoints(tmp_path, keep=1, identity={})
    (tmp_path / "checkpoint.json").write_text(json.dumps({"files": {}} | record))
    with pytest.raises(CheckpointError):
        checkpoints.restore({}, resume=str(tmp_path))


def test_a_prompt_of_bytes_and_references_of_letters():
    tok = byte_tokenizer.build()
    for prompts in (b"x", [b"x"]):
        with pytest.raises(ValueError, match="prompts: expected text, messages or token ids"):
            encode_prompts(tok, prompts)
    with pytest.raises(ValueError, match="references: expected several texts"):
        Judged(question="", references="abc", response="a")
