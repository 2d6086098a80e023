"""AttentionPolicy.full_attention_heads: what it accepts, what it means, and its files."""

import dataclasses
import json

import numpy as np
import pytest

from swaa_jax.policy import AttentionPolicy, LayerAttention


def policy_of(heads, **fields):
    return AttentionPolicy(window=4, full_attention_heads=heads, **fields)


def test_one_spelling(no_type_checks):
    canonical = ((3, (0, 2)), (5, (1,)), (-1, (4,)))
    for heads in (
        {5: [1], -1: [4], 3: [2, 0]},
        {"3": [0, 2], "5": [1], "-1": [4], "0": []},
        {np.int64(3): np.array([2, 0]), 5: {1}, -1: range(4, 5)},
        canonical,
        [[-1, [4]], [5, [1]], [3, [0, 2]]],
    ):
        assert policy_of(heads).full_attention_heads == canonical
        assert hash(policy_of(heads)) == hash(policy_of(canonical))
    assert policy_of({3: []}) == AttentionPolicy(window=4)


@pytest.mark.parametrize(
    "heads, message",
    [
        (None, "expected layers and their lists of KV heads, .* got None"),
        ("3:0", "expected layers .* got '3:0'"),
        ([3], r"expected layers .* got \[3\]"),
        ({1.0: [0]}, "a layer: expected an integer, got 1.0"),
        ({True: [0]}, "a layer: expected an integer, got True"),
        ({"1::2": [0]}, "a layer: expected an integer, got '1::2'"),
        ({1: 2}, r"layer 1: .* write \[2\]"),
        ({1: "0"}, "list of KV heads, got '0'"),
        ({1: [-1]}, "a KV head: expected .* at least 0"),
        ({1: [True]}, "a KV head: expected .* got True"),
        ({1: [2, 0, 2]}, "each KV head once, got 2 more than once"),
        ({1: [0], "1": [2]}, "each layer once, got 1 more than once"),
    ],
)
def test_malformed(no_type_checks, heads, message):
    with pytest.raises(ValueError, match=f"full_attention_heads.*{message}"):
        policy_of(heads)


@pytest.mark.parametrize("heads", [(-1,), (1, 1)])
def test_malformed_in_a_layer(heads):
    with pytest.raises(ValueError, match="full_heads"):
        LayerAttention(window=4, full_heads=heads)


def test_without_effect():
    with pytest.raises(ValueError, match=r"full_attention_heads=.* would have no effect"):
        AttentionPolicy(full_attention_heads={1: [0]})
    with pytest.raises(ValueError, match=r"heads: expected .* got layer 3, which full_att"):
        policy_of({2: [0], 3: [1]}, full_attention_layers=[1, 3])
    assert LayerAttention(full_heads=(1,)) == LayerAttention()


@pytest.mark.parametrize(
    "heads, fields, message",
    [
        ({36: [0]}, {}, "full_attention_heads: .* layer 36, out of range"),
        ({35: [0], -1: [1]}, {}, "got 35 twice in 35,-1"),
        ({2: [7, 8, 9]}, {}, "layer 2: expected KV heads .* got 8,9, out of range"),
        ({-1: [8]}, {}, "KV heads of the model, which has 8, 0 to 7, got 8"),
        ({1: [0], -1: [0]}, {"full_attention_layers": "1::2"}, "got layers 1,35, which"),
        ({-1: [0]}, {"full_attention_layers": [35]}, "got layer 35, which"),
    ],
)
def test_out_of_range(heads, fields, message):
    with pytest.raises(ValueError, match=message):
        policy_of(heads, **fields).resolve(36, num_kv_heads=8)


def test_layers():
    policy = policy_of({0: [1, 0], -1: [2]}, num_sink_tokens=3, decode=[-1])
    windowed = LayerAttention(window=4, num_sink_tokens=3)
    assert policy.resolve(3, num_kv_heads=3) == (
        dataclasses.replace(windowed, full_heads=(0, 1)),
        windowed,
        dataclasses.replace(windowed, full_heads=(2,), full_decode=True),
    )
    assert policy.resolve(3) == policy.resolve(3, num_kv_heads=3)


def test_where_all_heads_are_full_the_layer_is():
    policy = policy_of({0: [1, 0]})
    assert policy.resolve(2, num_kv_heads=2) == (LayerAttention(), LayerAttention(window=4))
    assert policy.resolve(2)[0].full_heads == (0, 1)


def test_files(tmp_path):
    policy = policy_of({3: [0, 2], -1: [1]})
    text = "{window: 4, full_attention_heads: {3: [0, 2], -1: [1]}}"
    assert AttentionPolicy.from_yaml(text) == policy
    assert 'full_attention_heads: {"3": [0, 2], "-1": [1]}\n' in policy.to_yaml()
    for name in ("policy.yaml", "policy.json"):
        policy.save(tmp_path / name)
        assert AttentionPolicy.load(tmp_path / name) == policy
    fields = policy.to_dict()
    assert json.loads(json.dumps(fields)) == fields
    assert AttentionPolicy.from_dict(fields) == policy
    with pytest.raises(ValueError, match="each key once, got 3"):
        AttentionPolicy.from_yaml("{window: 4, full_attention_heads: {3: [0], 3: [1]}}")


def test_readers_that_do_not_know_the_field_can_read_a_policy_without_it():
    fields = AttentionPolicy(window=4).to_dict()
    assert list(fields) == [
        "window",
        "num_sink_tokens",
        "full_attention_layers",
        "decode",
        "full_attention_tail",
    ]


def test_the_references_configuration_cannot_express_it():
    with pytest.raises(ValueError, match=r"full_attention_heads: expected none, .* cannot express"):
        policy_of({1: [0]}).to_swaa_config(num_layers=4)
