"""`DataConfig`: YAML in and out, and what it refuses."""

import pytest

from swaa_jax.data import DataConfig


def test_round_trip():
    config = DataConfig(
        files=["a.parquet", "gs://b/c.jsonl"],
        columns={"response": "generated"},
        chat_template_kwargs={"enable_thinking": False},
        seq_len=4096,
        batch_size=8,
        packing="bucket",
        bucket_widths=[1024, 4096],
        num_epochs=None,
    )
    assert config.files == ("a.parquet", "gs://b/c.jsonl")
    assert DataConfig.from_yaml(config.to_yaml()) == config
    assert DataConfig.from_dict(config.to_dict()) == config
    assert DataConfig(files="a.parquet", seq_len=4, batch_size=1).files == ("a.parquet",)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"pakcing": "pack"}, r"'pakcing' \(did you mean 'packing'\?\)"),
        ({"packing": "packed"}, "packing: expected one of pack, bucket, got 'packed'"),
        ({"loss_on": "first"}, "loss_on: expected one of last, all"),
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
        ({"num_epochs": 0}, "num_epochs: expected an integer of at least 1"),
        ({"split_answers": "yes"}, "split_answers: expected true or false, got 'yes'"),
        (
            {"columns": {"answr": "x"}},
            "columns: expected keys among .*'answr' .did you mean 'answer'",
        ),
        ({"columns": ["x"]}, "columns: expected a mapping"),
        ({"files": 3}, "files: expected text or a list of texts"),
        ({"judge_column": 1}, "judge_column: expected text or null"),
        ({"max_length": 65}, "max_length: expected at most seq_len=64"),
        ({"bucket_widths": [32]}, r"the last one seq_len=64, got \[32\]"),
        ({"bucket_widths": 32}, "bucket_widths: expected a list"),
    ],
)
def test_refused(no_type_checks, fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig.from_dict({"seq_len": 64, "batch_size": 8} | fields)


def test_nothing_is_required(no_type_checks):
    """Rows are as long as the longest sample, in multiples of 128; or as the last bucket."""
    config = DataConfig.from_dict({})
    assert (config.seq_len, config.batch_size) == (None, 8)
    assert [config.with_lengths([5, size]).seq_len for size in (128, 129)] == [128, 256]
    assert DataConfig(bucket_widths=[64, 100]).seq_len == 100
    assert DataConfig(seq_len=100).with_lengths([5]).seq_len == 100
    with pytest.raises(ValueError, match="seq_len: expected a number"):
        _ = config.widths
    with pytest.raises(ValueError, match="data config: expected a mapping"):
        DataConfig.from_dict(["seq_len"])
