"""A `config.json` or policy file with anything anywhere: a named error or a model, never a
traceback of another type, a hang, or a value that nobody checked."""

import json
import random

import pytest

import swaa_jax as swaa
from swaa_jax.cli.errors import is_user_error
from swaa_jax.models.config_types import check_config_types
from tests.support.random_models import random_model

VALUES = [None, -1, 0, 1, 2**40, 1.5, float("inf"), float("nan"), "x", "", "32", True, False]
VALUES += [[], [1, "a"], [[]], {}, {"rope_type": "yarn"}, {"rope_type": 3, "factor": "x"}]
SEEDS = 150


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "model"
    swaa.save_model(random_model(swaa.AttentionPolicy(window=4), num_hidden_layers=1), path)
    return path


@pytest.mark.parametrize("name", ["config.json", "attention_policy.json"])
def test_any_value_anywhere(directory, no_type_checks, name):
    path = directory / name
    whole = path.read_text()
    loaded = []
    for seed in range(SEEDS):
        rng = random.Random(seed)
        record = json.loads(whole)
        place = rng.choice([record, record.get("policy", record)])
        key = rng.choice(sorted(place))
        place[key] = rng.choice(VALUES)
        path.write_text(json.dumps(record))
        failure = None
        try:
            swaa.load_model(directory)
        except (ValueError, NotImplementedError) as error:
            failure = error
        if failure is None:
            loaded.append((key, place[key]))
        else:
            assert is_user_error(failure), (key, place[key])
            assert "\n" not in str(failure)
    path.write_text(whole)
    # Numbers, null and lists can be meant; these cannot, where the field is read.
    unread = ("initializer_range", "architectures", "dtype", "policy")
    wrong = [(k, v) for k, v in loaded if isinstance(v, float | str | dict) and k not in unread]
    assert wrong == []


def test_every_field_that_is_wrong_is_named():
    config = {
        "vocab_size": "32k",
        "num_hidden_layers": 2**30,  # would be built, layer by layer
        "rope_theta": -1.0,
        "tie_word_embeddings": "false",  # is true as a Python value
        "layer_types": "full_attention",
        "eos_token_id": [1, "2"],
        "rope_parameters": {"full_attention": {"factor": "8", "rope_type": None}},
        "hidden_size": None,
        "something_else": object(),
    }
    with pytest.raises(ValueError) as caught:
        check_config_types(config)
    message = str(caught.value)
    for field in (
        "vocab_size: expected a positive integer, got '32k'",
        "num_hidden_layers: expected an integer from 1 to 10000",
        "rope_theta: expected a positive number, got -1.0",
        "tie_word_embeddings: expected true or false, got 'false'",
        "layer_types: expected a list of texts",
        "eos_token_id: expected a token id or a list of them",
        "rope_parameters.full_attention.factor: expected a positive number, got '8'",
    ):
        assert field in message
    assert "hidden_size" not in message and "something_else" not in message


def test_overrides_are_checked_too(directory):
    with pytest.raises(
        ValueError, match=r"config.vocab_size: expected a positive integer, got '61'"
    ):
        swaa.load_model(directory, config_overrides={"vocab_size": "61"})
