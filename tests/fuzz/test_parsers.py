"""Hypothesis over what reads files: a value or our own error, whatever the bytes."""

import json

import jaxtyping
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swaa_jax.checkpoint import WeightReader
from swaa_jax.documents import parse_json, parse_yaml
from swaa_jax.eval.judging.language_model import read_verdict
from swaa_jax.lora import LoraConfig
from swaa_jax.policy import load_policy
from swaa_jax.redact import redact
from swaa_jax.remote import retry_after

pytestmark = pytest.mark.usefixtures("_as_users_call_them")


@pytest.fixture(scope="module")
def _as_users_call_them():
    """Wrong types reach our own messages."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def told(call):
    """What it gives, or None where it says what is wrong."""
    message = ""
    try:
        return call()
    except (ValueError, NotImplementedError) as error:
        message = str(error)
    assert len(message) < 4000
    return None


@given(st.text(max_size=60))
def test_documents(text):
    told(lambda: parse_yaml(text))
    told(lambda: parse_json(text))


@given(JSON)
def test_values(value):
    if not isinstance(value, str):  # a file's name
        told(lambda: load_policy(value))
    if isinstance(value, dict):
        told(lambda: LoraConfig.from_dict(value))


@given(
    st.dictionaries(st.sampled_from(["window", "decode", "full_attention_layers", "sinks"]), JSON)
)
def test_policies(fields):
    told(lambda: load_policy(fields))


@given(
    st.dictionaries(
        st.sampled_from(["rank", "alpha", "target_modules", "rank_pattern", "dropout"]), JSON
    )
)
def test_adapters(fields):
    told(lambda: LoraConfig.from_dict(fields))


@given(
    header=JSON
    | st.dictionaries(
        st.text(max_size=4),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "X"]) | JSON,
                "shape": st.lists(st.integers(-2, 1 << 62), max_size=3) | JSON,
                "data_offsets": st.lists(st.integers(-2, 1 << 62), max_size=3) | JSON,
            }
        ),
        max_size=3,
    ),
    data=st.binary(max_size=16),
)
def test_headers(header, data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("weights")
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    told(lambda: WeightReader(directory))


@given(st.text(max_size=60))
def test_servers(text):
    assert read_verdict(text) in (True, False, None)
    assert 0 <= retry_after(text, default=1.0) <= 600
    assert "secret" not in redact(f"{text} http://u:secret@host/?k=secret")
