"""Faults 21 and 32: numbers that JAX cannot hold are refused by name before anything computes."""

import jax.numpy as jnp
import pytest

import swaa_jax as swaa
from swaa_jax.cli.main import main
from swaa_jax.models.config_types import check_config_types
from swaa_jax.models.rope import parse_rope
from tests.support.random_models import random_model


@pytest.mark.parametrize("value", [2**30 + 1, 2**31, 2**40, 10**400])
@pytest.mark.parametrize("field", ["window", "num_sink_tokens", "full_attention_tail"])
def test_fault_21_keys_beyond_int32_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}: expected an integer") as caught:
        swaa.AttentionPolicy(**{"window": 4, field: value})
    assert len(str(caught.value)) < 500
    swaa.AttentionPolicy(**{"window": 4, field: 2**30})


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 10**400},
        {"rope_theta": 1e-300},
        {"rope_theta": 1},
        {"rope_local_base_freq": 1.0},
        {"rms_norm_eps": 10**400},
        {"rms_norm_eps": 1e-300},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": "x"}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale_all_dim": [1]}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 10**400}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1, "truncate": 3}},
        {"max_position_embeddings": 2**24 + 1},
    ],
)
def test_fault_21_config_numbers_are_those_that_float32_has(config):
    (field,) = config
    with pytest.raises(ValueError, match=field) as caught:
        check_config_types(config)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_fault_21_llama_3_factors_in_the_wrong_order_are_refused():
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}
    with pytest.raises(ValueError, match="high_freq_factor above low_freq_factor"):
        parse_rope({"rope_scaling": rope, "max_position_embeddings": 64})


@pytest.mark.parametrize("override", ["rope_theta=1", "rope_theta=1e-300", "rms_norm_eps=1e400"])
def test_fault_21_the_command_says_it_in_a_paragraph(override, capsys):
    assert main(["generate", "tiny-retriever", "x", "--config-override", override]) == 2
    assert override.partition("=")[0] in capsys.readouterr().err


def test_fault_32_positions_that_share_angles_are_refused():
    model = random_model(swaa.AttentionPolicy(), num_hidden_layers=1)
    tokens = jnp.zeros((1, 2), jnp.int32)
    for last in (2**24, 2**26):
        with pytest.raises(ValueError, match="positions: expected less than 16777216"):
            model(tokens, positions=jnp.array([[0, last]]))
    model(tokens, positions=jnp.array([[0, 2**24 - 1]]))
