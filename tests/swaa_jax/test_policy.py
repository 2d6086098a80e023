"""AttentionPolicy: what it accepts, what it means for each layer, and its files.

`test_policy_heads.py` has more of full heads.
"""

import copy
import dataclasses
import itertools
import json
import pickle
import re

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swaa_jax.policy import AttentionPolicy, LayerAttention, load_policy

DEPTH = 8

# As in the reference's files, which list layers 1, 3, ... 47 for a model with 36 layers.
SWAA_CONFIG = {
    "sliding_window_size": 2000,
    "keep_first": 10,
    "force_fa_decode": True,
    "non_sliding_layers": list(range(1, 48, 2)),
}
SWAA_POLICY = AttentionPolicy(
    window=2000, num_sink_tokens=10, full_attention_layers=range(1, 36, 2), decode="full"
)


@st.composite
def layer_selections(draw):
    """Selections that are good for DEPTH layers."""
    if draw(st.booleans()):
        layers = draw(st.lists(st.integers(0, DEPTH - 1), unique=True, min_size=1))
        from_end = draw(st.booleans())
        return tuple(layer - DEPTH if from_end and layer % 2 else layer for layer in layers)
    start = draw(st.integers(0, DEPTH - 1))
    step = draw(st.sampled_from(["", ":1", ":2", ":4"]))
    return f"{start}:{draw(st.sampled_from(['', DEPTH]))}{step}"


@st.composite
def policies(draw):
    if draw(st.integers(0, 9)) == 0:
        return AttentionPolicy()
    policy = AttentionPolicy(
        window=draw(st.integers(1, 10_000)),
        num_sink_tokens=draw(st.integers(0, 200)),
        full_attention_layers=draw(st.just(()) | layer_selections()),
        decode=draw(st.sampled_from(["window", "full"]) | layer_selections()),
        full_attention_tail=draw(st.integers(0, 5)),
    )
    windowed = [i for i, layer in enumerate(policy.resolve(DEPTH)) if not layer.is_full]
    if not windowed or draw(st.booleans()):
        return policy
    heads = st.lists(st.integers(0, 7), unique=True, min_size=1)
    chosen = draw(st.dictionaries(st.sampled_from(windowed), heads, max_size=3))
    return dataclasses.replace(policy, full_attention_heads=chosen)


SLICES = st.from_regex(r"-?\d{0,2}:-?\d{0,2}(:[1-9]\d?)?", fullmatch=True).filter(
    lambda text: "-:" not in text and not text.endswith("-")
)
SELECTIONS = st.lists(st.integers(-48, 47), unique=True, max_size=48) | SLICES


@st.composite
def policies_of_any_depth(draw):
    """Every field at once: full heads in many layers, negative layers, decode in some, a tail."""
    full = draw(SELECTIONS)
    layers = st.integers(-48, 47).filter(lambda layer: isinstance(full, str) or layer not in full)
    return AttentionPolicy(
        window=draw(st.integers(1, 2**30)),
        num_sink_tokens=draw(st.integers(0, 200)),
        full_attention_layers=full,
        full_attention_heads=draw(
            st.dictionaries(layers, st.sets(st.integers(0, 63), max_size=8), max_size=48)
        ),
        decode=draw(st.sampled_from(["window", "full"]) | SELECTIONS),
        full_attention_tail=draw(st.integers(0, 5)),
    )


class TestFields:
    def test_defaults_are_full_attention(self):
        policy = AttentionPolicy()
        assert policy.is_full
        assert policy.resolve(3) == (LayerAttention(),) * 3

    def test_keyword_only(self):
        with pytest.raises(TypeError, match="positional"):
            AttentionPolicy(2048)

    def test_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            AttentionPolicy(window=4).window = 5

    def test_hashable_with_lists(self):
        policy = AttentionPolicy(window=4, full_attention_layers=[1, 3], decode=[2])
        assert policy.full_attention_layers == (1, 3)
        assert policy.decode == (2,)
        assert hash(policy) == hash(
            AttentionPolicy(window=4, full_attention_layers=(1, 3), decode=(2,))
        )

    def test_equal_policies_do_not_recompile(self, no_type_checks):
        traces = 0

        def double(x, policy):
            nonlocal traces
            traces += 1
            return 2 * x

        jitted = jax.jit(double, static_argnames="policy")
        for layers in ([1, 3], (3, 1), range(1, 5, 2), np.array([3, 1])):
            jitted(1.0, policy=AttentionPolicy(window=4, full_attention_layers=layers))
        assert traces == 1

    def test_numpy_integers_become_ints(self, no_type_checks):
        policy = AttentionPolicy(window=np.int64(4), full_attention_layers=np.arange(2))
        assert type(policy.window) is int
        assert [type(layer) for layer in policy.full_attention_layers] == [int, int]
        json.dumps(policy.to_dict())

    @pytest.mark.parametrize(
        "spelling, canonical",
        [
            ("1::2", "1::2"),
            (" +1 : : 2 ", "1::2"),
            ("0:4:1", "0:4"),
            (":", ":"),
            ("::", ":"),
            ("::3", "::3"),
            ("-4:", "-4:"),
            ("01:08", "1:8"),
        ],
    )
    def test_slices_have_one_spelling(self, spelling, canonical):
        policy = AttentionPolicy(window=4, full_attention_layers=spelling, decode=spelling)
        assert policy.full_attention_layers == canonical
        assert policy.decode == canonical

    def test_decode_in_no_layers_is_window(self):
        assert AttentionPolicy(window=4, decode=[]) == AttentionPolicy(window=4)

    @pytest.mark.parametrize(
        "fields, message",
        [
            ({"window": 0}, r"window: expected an integer of at least 1, got 0 \(int\)"),
            ({"window": -1}, "window: expected an integer"),
            ({"window": True}, r"window: expected .* got True \(bool\)"),
            ({"window": 2048.0}, r"got 2048.0 \(float\)"),
            ({"window": "2048"}, r"got '2048' \(str\)"),
            ({"window": "full"}, "means full attention"),
            ({"window": 4, "num_sink_tokens": -1}, "num_sink_tokens: expected .* at least 0"),
            ({"window": 4, "num_sink_tokens": None}, "num_sink_tokens: expected"),
            ({"window": 4, "num_sink_tokens": False}, "num_sink_tokens: expected"),
            ({"window": 4, "full_attention_tail": 1.5}, "full_attention_tail: expected"),
            ({"window": 4, "full_attention_layers": None}, "got None"),
            ({"window": 4, "full_attention_layers": True}, "got True"),
            ({"window": 4, "full_attention_layers": 96}, r"quote it: a bare 1:36 is the number 96"),
            ({"window": 4, "full_attention_layers": 5}, r"for that one layer write \[5\]"),
            ({"window": 4, "full_attention_layers": {1: None}}, r"\(dict\)"),
            ({"window": 4, "full_attention_layers": b"12"}, r"\(bytes\)"),
            ({"window": 4, "full_attention_layers": [1, 1]}, "got 1 more than once"),
            ({"window": 4, "full_attention_layers": [1, True]}, r"got True \(bool\)"),
            ({"window": 4, "full_attention_layers": [1.0]}, r"got 1.0 \(float\)"),
            ({"window": 4, "full_attention_layers": ["1::2"]}, "a slice stands alone"),
            ({"window": 4, "full_attention_layers": "5"}, 'a slice in a string such as "1::2"'),
            ({"window": 4, "full_attention_layers": "odd"}, "got 'odd'"),
            ({"window": 4, "full_attention_layers": "1:2:3:4"}, "full_attention_layers: expected"),
            ({"window": 4, "full_attention_layers": "1::0"}, "a positive step"),
            ({"window": 4, "full_attention_layers": "::-1"}, "a positive step"),
            ({"window": 4, "decode": True}, "write full"),
            ({"window": 4, "decode": False}, "write window"),
            ({"window": 4, "decode": "ful"}, "did you mean 'full'"),
            ({"window": 4, "decode": 3}, r"write \[3\]"),
            ({"window": 4, "decode": None}, "decode: expected"),
        ],
    )
    def test_malformed_fields(self, no_type_checks, fields, message):
        with pytest.raises(ValueError, match=message):
            AttentionPolicy(**fields)

    @pytest.mark.parametrize(
        "fields",
        [
            {"num_sink_tokens": 10},
            {"full_attention_layers": "1::2"},
            {"decode": "full"},
            {"full_attention_tail": 1},
        ],
    )
    def test_without_window_nothing_else_may_be_set(self, fields):
        with pytest.raises(ValueError, match=f"{next(iter(fields))}.* would have no effect"):
            AttentionPolicy(**fields)

    @given(policies() | policies_of_any_depth())
    def test_text_and_parse_are_inverses(self, policy):
        text = str(policy)
        assert AttentionPolicy.parse(text) == policy
        assert re.fullmatch(r"[\w:=,+/-]+", text), "a shell takes it without quotes"
        assert load_policy(text) == policy

    @given(policies())
    def test_copies_are_equal(self, policy):
        assert copy.deepcopy(policy) == policy
        assert pickle.loads(pickle.dumps(policy)) == policy  # noqa: S301
        assert dataclasses.replace(policy) == policy


class TestResolve:
    @given(policies(), st.integers(DEPTH, DEPTH + 4))
    def test_against_python_indexing(self, policy, num_layers):
        """Each layer against list indexing, which defines what slices and negative ints mean."""

        def selected(layers):
            every = list(range(num_layers))
            if layers in ("window", "full"):
                return every if layers == "full" else []
            if isinstance(layers, str):
                return eval(f"every[{layers}]", {"every": every})
            return [every[layer] for layer in layers]

        try:
            resolved = policy.resolve(num_layers)
        except ValueError:
            # Two ints may name one layer at another depth than DEPTH.
            both = [policy.full_attention_layers, policy.decode]
            twice = any(len(selected(layers)) != len(set(selected(layers))) for layers in both)
            full = set(selected(policy.full_attention_layers))
            assert twice or full & dict(policy.full_attention_heads).keys()
            return
        assert len(resolved) == num_layers
        for index, layer in enumerate(resolved):
            if policy.window is None or index in selected(policy.full_attention_layers):
                assert layer == LayerAttention()
                assert layer.is_full
                assert layer.needs_full_cache
            else:
                assert layer.window == policy.window
                assert layer.num_sink_tokens == policy.num_sink_tokens
                assert layer.full_attention_tail == policy.full_attention_tail
                assert layer.full_decode == (index in selected(policy.decode))
                assert layer.full_heads == dict(policy.full_attention_heads).get(index, ())
                assert layer.needs_full_cache == layer.full_decode

    @pytest.mark.parametrize("field", ["full_attention_layers", "decode"])
    @pytest.mark.parametrize(
        "layers, message",
        [
            ([36], "layers of the model, which has 36, 0 to 35, got layer 36, out of range"),
            ([1, 40, 47], "layers 40,47, out of range"),
            ([-37], "layer -37, out of range"),
            ([35, -1], "35 twice in 35,-1; the model has 36 layers"),
            ("40::2", "the model, which has 36, .* out of range"),
            ("1:48:2", "out of range"),
            ("-37:", "out of range"),
            ("36:", "selects none"),
            ("10:5", "selects none"),
        ],
    )
    def test_out_of_range(self, field, layers, message):
        policy = AttentionPolicy(window=4, **{field: layers})
        with pytest.raises(ValueError, match=f"{field}.*{message}"):
            policy.resolve(36)

    @pytest.mark.parametrize("depth", [0, -1, 2.0, True, None, "8"])
    def test_depth(self, no_type_checks, depth):
        with pytest.raises(ValueError, match="num_layers: expected"):
            AttentionPolicy().resolve(depth)


class TestLayerAttention:
    def test_full_layers_are_canonical(self):
        layer = LayerAttention(
            window=None, num_sink_tokens=10, full_decode=True, full_attention_tail=2
        )
        assert layer == LayerAttention()
        assert hash(layer) == hash(LayerAttention())

    @pytest.mark.parametrize(
        "fields",
        [
            {"window": 0},
            {"window": 1.5},
            {"window": 4, "num_sink_tokens": -1},
            {"window": 4, "full_decode": 1},
            {"window": 4, "full_attention_tail": -1},
        ],
    )
    def test_malformed(self, no_type_checks, fields):
        with pytest.raises(ValueError, match=list(fields)[-1]):
            LayerAttention(**fields)


class TestFiles:
    @given(policies())
    def test_round_trips(self, policy):
        assert AttentionPolicy.from_dict(policy.to_dict()) == policy
        assert AttentionPolicy.from_json(policy.to_json()) == policy
        assert AttentionPolicy.from_yaml(policy.to_yaml()) == policy
        assert AttentionPolicy.from_yaml(policy.to_json()) == policy  # JSON is YAML

    @pytest.mark.parametrize("name", ["policy.yaml", "policy.yml", "policy.json"])
    def test_load_and_save(self, tmp_path, name):
        policy = AttentionPolicy(window=4, full_attention_layers="1:36", decode=[0, -1])
        policy.save(tmp_path / name)
        assert AttentionPolicy.load(tmp_path / name) == policy
        assert AttentionPolicy.load(str(tmp_path / name)) == policy
        assert [path.name for path in tmp_path.iterdir()] == [name]

    def test_slices_are_written_with_quotes(self):
        text = AttentionPolicy(window=4, full_attention_layers="1:36").to_yaml()
        assert 'full_attention_layers: "1:36"' in text

    @pytest.mark.parametrize(
        "text, message",
        [
            ("{window: 4, full_attention_layers: 1:36}", 'line 1: 1:36 .* quote a slice.*"1:36"'),
            ("window: 4\nfull_attention_layers: [1:36]", "line 2: 1:36 without quotes"),
            ("window: 4\ndecode: 1:10:20", "base sixty"),
            ("window: 4\nfull_attention_layers: 1:30.5", "base sixty"),
            ("window: 4\nwindow: 5", "line 2: expected each key once, got 'window'"),
            (
                "{sinks: 4}",
                "attention policy: expected keys among window, num_.*got 'sinks'",
            ),
            (
                "{windows: 4, sink_tokens: 1}",
                "'windows' .did you mean 'window'.*, 'sink_tokens'",
            ),
            ("{num_sink_token: 4}", "did you mean 'num_sink_tokens'"),
            ("{sliding_window_size: 4}", "from_swaa_config"),
            ("{swaa_config: {}}", "from_swaa_config"),
            ("{schema_version: 1, policy: {window: 4}}", "only what is under 'policy'"),
            ("{1: 2}", "got 1"),
            ("{1, 3}", "got 1, 3"),
            ("window: [", "YAML: "),
            ("", "expected a mapping, got None"),
            ("[1, 2]", r"expected a mapping, got \[1, 2\] \(list\)"),
            ("2048", "expected a mapping, got 2048"),
            ("? [1, 2]\n: 3", "YAML: "),
            ("!!python/object:os.system {}", "YAML: "),
        ],
    )
    def test_malformed_yaml(self, no_type_checks, tmp_path, text, message):
        with pytest.raises(ValueError, match=message):
            AttentionPolicy.from_yaml(text)
        path = tmp_path / "policy.yaml"
        path.write_text(text)
        with pytest.raises(ValueError, match=f"policy.yaml: .*({message})"):
            AttentionPolicy.load(path)

    def test_malformed_json(self):
        with pytest.raises(ValueError, match="JSON: Expecting"):
            AttentionPolicy.from_json("{window: 4}")

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            AttentionPolicy.load(tmp_path / "none.yaml")

    def test_notes_are_left_out(self):
        text = "{description: a, source: b, needs: {training: true}, evidence: [], window: 4}"
        assert AttentionPolicy.from_yaml(text) == AttentionPolicy(window=4)
        with pytest.raises(ValueError, match="expected keys among"):
            AttentionPolicy.from_dict({"description": "a", "window": 4})


class TestSwaaConfig:
    """The reference's format."""

    def test_layers_beyond_the_model_are_dropped_with_one_warning(self):
        with pytest.warns(UserWarning, match="dropped layers 37,39,41,43,45,47") as caught:
            policy = AttentionPolicy.from_swaa_config(SWAA_CONFIG, num_layers=36)
        assert len(caught) == 1
        assert policy == SWAA_POLICY
        assert policy.resolve(36) == SWAA_POLICY.resolve(36)

    def test_one_warning_for_both_lists(self):
        config = SWAA_CONFIG | {"force_fa_decode": [0, 37, 50]}
        with pytest.warns(UserWarning, match="dropped layers 37,.*,47,50,") as caught:
            policy = AttentionPolicy.from_swaa_config(config, num_layers=36)
        assert len(caught) == 1
        assert policy.decode == (0,)

    def test_without_depth_resolve_raises(self):
        policy = AttentionPolicy.from_swaa_config(SWAA_CONFIG)
        assert policy.full_attention_layers[-1] == 47
        with pytest.raises(ValueError, match="layers 37,39,41,43,45,47, out of range"):
            policy.resolve(36)

    @pytest.mark.parametrize("wrapped", [False, True])
    @pytest.mark.parametrize("listed", [False, True])
    def test_file(self, tmp_path, wrapped, listed):
        config = SWAA_CONFIG | {"non_sliding_layers": list(range(1, 36, 2))}
        document = {"swaa_config": config, "model_list": ["Qwen3-4B"]} if wrapped else config
        path = tmp_path / "settings.json"
        path.write_text(json.dumps([document] if listed else document))
        assert AttentionPolicy.from_swaa_config(path) == SWAA_POLICY
        assert AttentionPolicy.from_swaa_config(str(path), num_layers=36) == SWAA_POLICY

    @pytest.mark.parametrize(
        "document, message",
        [
            ("{", "settings.json: JSON: Expecting"),
            ("3", "settings.json: .*mapping"),
            ("[{}, {}]", "settings.json: .* a list of 2"),
            ("[]", "got a list of 0"),
            ('{"sliding_window_size": "2k"}', "settings.json: sliding_window_size: expected"),
        ],
    )
    def test_malformed_file(self, tmp_path, document, message):
        path = tmp_path / "settings.json"
        path.write_text(document)
        with pytest.raises(ValueError, match=message):
            AttentionPolicy.from_swaa_config(path)

    @pytest.mark.parametrize(
        "config, message",
        [
            ({"window": 4}, "SWAA config: expected keys .*'window'"),
            ({"sliding_window": 4}, "did you mean 'sliding_window_size'"),
            ({"swaa_config": {}, "models": []}, "SWAA setting: expected keys .*'models'"),
            ({"swaa_config": 3}, "mapping"),
            ({"sliding_window_size": 0}, "sliding_window_size: expected .* at least 1"),
            ({"sliding_window_size": 4, "keep_first": -1}, "keep_first: expected"),
            (
                {"sliding_window_size": 4, "force_fa_decode": "yes"},
                "force_fa_decode: expected a list",
            ),
            ({"sliding_window_size": 4, "force_fa_decode": 1}, "force_fa_decode: expected a list"),
            (
                {"sliding_window_size": 4, "non_sliding_layers": "1::2"},
                "non_sliding_layers: expected",
            ),
            ({"sliding_window_size": 4, "non_sliding_layers": [-1]}, "from 0 up"),
        ],
    )
    def test_malformed(self, no_type_checks, config, message):
        with pytest.raises(ValueError, match=message):
            AttentionPolicy.from_swaa_config(config)

    def test_defaults(self):
        assert AttentionPolicy.from_swaa_config({}) == AttentionPolicy()
        window = AttentionPolicy.from_swaa_config({"sliding_window_size": 4})
        assert window == AttentionPolicy(window=4)

    def test_null_window_is_full_attention(self):
        """One of the reference's settings: no window, and FA decode beside it."""
        config = {"sliding_window_size": None, "keep_first": 0, "force_fa_decode": True}
        assert AttentionPolicy.from_swaa_config(config) == AttentionPolicy()

    @pytest.mark.parametrize(
        "decode, layers",
        list(itertools.product([True, False, [], [0, 2], [1, 3, 5]], [[], [1, 3], [0]])),
    )
    def test_round_trip(self, decode, layers):
        config = {
            "sliding_window_size": 64,
            "keep_first": 3,
            "force_fa_decode": decode,
            "non_sliding_layers": layers,
        }
        exported = AttentionPolicy.from_swaa_config(config).to_swaa_config()
        assert exported == {"swaa_config": config | {"force_fa_decode": decode or False}}
        json.dumps(exported)

    @given(policies())
    def test_export_means_the_same(self, policy):
        policy = dataclasses.replace(policy, full_attention_heads=(), full_attention_tail=0)
        exported = policy.to_swaa_config(num_layers=DEPTH)
        back = AttentionPolicy.from_swaa_config(exported)
        assert back.resolve(DEPTH) == policy.resolve(DEPTH)

    def test_export_needs_the_depth(self):
        for layers in ("1::2", [-1]):
            policy = AttentionPolicy(window=4, full_attention_layers=layers)
            with pytest.raises(ValueError, match="pass num_layers"):
                policy.to_swaa_config()

    def test_export_names_what_it_cannot_express(self):
        policy = AttentionPolicy(window=4, full_attention_tail=2)
        with pytest.raises(ValueError, match=r"full_attention_tail: expected none, .* got 2"):
            policy.to_swaa_config(num_layers=4)
