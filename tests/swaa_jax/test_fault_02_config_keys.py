"""Faults 2, 3 and 13: a config key that is absent, null or present means what it means to
Transformers; a layer's kind is not its window; what is derived from an override is saved.
"""

import json
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import swaa_jax as swaa
from swaa_jax.infer.answerer import eos_token_ids
from swaa_jax.models import FAMILIES, convert_checkpoint
from swaa_jax.models.interop import FULL, WINDOWED
from tests.support import tiny_hf

ABSENT = object()
FAMILY_NAMES = list(tiny_hf.FAMILIES)
TOKENS = np.random.default_rng(3).integers(3, tiny_hf.COMMON["vocab_size"], (2, 24))

# A value of each optional key that differs from its default and from the tiny models'.
PRESENT = {
    "attention_bias": True,
    "attn_logit_softcapping": 1.0,
    "bos_token_id": 4,
    "decoder_sparse_step": 2,
    "eos_token_id": [5, 6],
    "final_logit_softcapping": 1.0,
    "head_dim": 12,
    "layer_types": [FULL, WINDOWED, WINDOWED],
    "max_window_layers": 1,
    "mlp_bias": True,
    "mlp_only_layers": [2],
    "norm_topk_prob": True,
    "num_key_value_heads": 1,
    "pad_token_id": 3,
    "query_pre_attn_scalar": 200,
    "rope_local_base_freq": 3.0,
    "sliding_window": 5,
    "sliding_window_pattern": 3,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": True,
    "use_sliding_window": True,
    "rope_theta": 77.0,
    "rope_scaling": {"rope_type": "linear", "factor": 5.0},
    "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 5.0},
}
# What one key alone does not switch on.
WITH = {
    ("qwen2", "sliding_window"): {"use_sliding_window": True, "max_window_layers": 0},
    ("qwen3", "sliding_window"): {"use_sliding_window": True, "max_window_layers": 0},
    ("qwen2", "max_window_layers"): {"use_sliding_window": True, "sliding_window": 5},
    ("qwen3", "max_window_layers"): {"use_sliding_window": True, "sliding_window": 5},
    ("qwen2", "layer_types"): {"use_sliding_window": True, "sliding_window": 5},
    ("qwen3", "layer_types"): {"use_sliding_window": True, "sliding_window": 5},
    ("qwen3_moe", "sliding_window"): {"use_sliding_window": True},
}

# 32 KV heads by default, for 4 query heads; ropes of Phi-3; what no causal model has.
MAY_REFUSE = {"num_key_value_heads", "rope_scaling", "rope_parameters"}
MAY_REFUSE |= {"use_bidirectional_attention", "attn_logit_softcapping"}


def optional_keys(family: str) -> list[str]:
    ropes = {"rope_theta", "rope_scaling", "rope_parameters"}
    return sorted(ropes | set(FAMILIES[family].config_class.defaults))


def edited(base: dict, family: str, key: str, state: str) -> dict:
    """The tiny model's file with one optional key in one of three states."""
    config = {**base, **WITH.get((family, key), {})}
    if WITH.get((family, key)) and key != "layer_types":
        config.pop("layer_types", None)
    if key.startswith("rope") or key == "sliding_window_pattern":  # the file's older form
        config = {k: v for k, v in config.items() if k not in ("rope_parameters", "layer_types")}
    config.pop(key, None)
    if state != "absent":
        config[key] = None if state == "null" else PRESENT[key]
    if key == "rope_parameters" and family == "gemma3_text" and state == "present":
        config[key] = {FULL: PRESENT[key], WINDOWED: {"rope_type": "default", "rope_theta": 33.0}}
    return config


def file_of(family: str) -> dict:
    """`config.json` of the tiny model, by Transformers."""
    config = tiny_hf.config_of(family)
    return {**json.loads(config.to_json_string()), "dtype": "float32"}


def windows(num_layers: int, kinds: list[str] | None, window: int | None) -> list[int | None]:
    kinds = [WINDOWED] * num_layers if kinds is None else kinds
    return [window if kind == WINDOWED else None for kind in kinds]


def theirs(config: dict) -> dict:
    """What Transformers makes of a file."""
    read = tiny_hf.transformers.AutoConfig.for_model(**config)
    ropes = read.rope_parameters
    by_kind = {kind: ropes.get(kind, ropes) for kind in (FULL, WINDOWED)}
    eos = read.eos_token_id
    return {
        "num_kv_heads": read.num_key_value_heads,
        "head_dim": getattr(read, "head_dim", None) or read.hidden_size // read.num_attention_heads,
        "tied": read.tie_word_embeddings,
        "bos": read.bos_token_id,
        "eos": set() if eos is None else set(np.atleast_1d(eos).tolist()),
        "pad": read.pad_token_id,
        "windows": windows(
            read.num_hidden_layers,
            # Mistral, Phi-3 and Qwen3-MoE window all layers whatever `layer_types` says.
            getattr(read, "layer_types", None) if read.model_type not in ("mistral",) else None,
            getattr(read, "sliding_window", None),
        ),
        "thetas": [
            by_kind[kind]["rope_theta"]
            for kind in (getattr(read, "layer_types", None) or [FULL] * read.num_hidden_layers)
        ],
        "attention_softcap": getattr(read, "attn_logit_softcapping", None),
        "logits_softcap": getattr(read, "final_logit_softcapping", None),
        "norm_topk_prob": getattr(read, "norm_topk_prob", None),
        "sparse_step": getattr(read, "decoder_sparse_step", None),
        "dense": list(getattr(read, "mlp_only_layers", None) or ()),
        "scalar": getattr(read, "query_pre_attn_scalar", None),
    }


def attempt(read, config: dict):
    """What it reads, or the refusal."""
    try:
        return read(config)
    except Exception as error:
        return error


def ours(config: dict) -> dict:
    """What we make of it, in the same words."""
    read = FAMILIES[config["model_type"]].config_class.from_hf(config)
    scale = read.attention_scale
    return {
        "num_kv_heads": read.num_kv_heads,
        "head_dim": read.head_dim,
        "tied": read.tie_word_embeddings,
        "bos": read.bos_token_id,
        "eos": set(read.eos_token_ids),
        "pad": read.pad_token_id,
        "windows": [layer.window for layer in read.own.resolve(read.num_layers)],
        "thetas": [read.layer_rope(index).theta for index in range(read.num_layers)],
        "attention_softcap": read.attention_softcap,
        "logits_softcap": read.logits_softcap,
        "norm_topk_prob": getattr(read, "norm_topk_prob", None),
        "sparse_step": getattr(read, "decoder_sparse_step", None),
        "dense": list(getattr(read, "mlp_only_layers", ())),
        "scalar": None if scale is None else round(scale**-2, 6),
    }


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_fault_02_absent_null_and_present_keys_are_read_as_by_transformers(family):
    base, refused = file_of(family), set()
    for key in optional_keys(family):
        for state in ("absent", "null", "present"):
            config = edited(base, family, key, state)
            got = attempt(ours, config)
            if isinstance(got, Exception):
                assert key in str(got), (key, state, got)
                refused.add((key, state))
                continue
            expected = attempt(theirs, config)
            if isinstance(expected, Exception):  # no oracle: it refuses what is "none" here
                assert (key, state) == ("num_key_value_heads", "null"), expected
            else:
                assert got == expected, (key, state)
    assert {key for key, state in refused if state != "null"} <= MAY_REFUSE


LOGITS = [
    ("gemma2", {"attn_logit_softcapping": ABSENT}),
    ("gemma2", {"final_logit_softcapping": ABSENT, "attn_logit_softcapping": None}),
    ("gemma3_text", {"rope_parameters": ABSENT, "layer_types": ABSENT}),
    ("gemma3_text", {"sliding_window": ABSENT}),
    ("llama", {"rope_parameters": ABSENT}),
]


def both_logits(directory: pathlib.Path, config: dict) -> tuple:
    """Logits by Transformers and by us; either may be the refusal."""
    (directory / "config.json").write_text(json.dumps(config))
    try:
        model = tiny_hf.transformers.AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation="eager"
        )
        expected = tiny_hf.logits(model.float().eval(), TOKENS, use_cache=False)
    except Exception as error:
        expected = error
    try:
        model = swaa.load_model(directory, dtype="float32")
        with jax.default_matmul_precision("highest"):
            got = np.asarray(model(jnp.asarray(TOKENS)))
    except (ValueError, NotImplementedError) as error:
        got = error
    return expected, got


@pytest.mark.parametrize("family, edits", LOGITS)
def test_fault_02_logits_with_absent_keys_equal_transformers(family, edits, tmp_path):
    tiny_hf.save(tiny_hf.build(family), tmp_path)
    base = json.loads((tmp_path / "config.json").read_text())
    config = {key: value for key, value in {**base, **edits}.items() if value is not ABSENT}
    expected, got = both_logits(tmp_path, config)
    np.testing.assert_allclose(got, expected, rtol=0, atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_fault_02_logits_of_every_key_and_state_equal_transformers(family, tmp_path):
    tiny_hf.save(tiny_hf.build(family), tmp_path)
    base = json.loads((tmp_path / "config.json").read_text())
    for key in optional_keys(family):
        for state in ("absent", "null", "present"):
            expected, got = both_logits(tmp_path, edited(base, family, key, state))
            if isinstance(got, Exception):
                assert key in str(got), (key, state, got)
            elif not isinstance(expected, Exception):
                np.testing.assert_allclose(
                    got, expected, rtol=0, atol=5e-5, err_msg=f"{key} {state}"
                )
            else:
                # Phi-3's padding token by default is beyond the tiny vocabulary.
                no_oracle = {("sliding_window", "null"), ("head_dim", "null")}
                assert (key, state) in no_oracle | {("pad_token_id", "absent")}, expected


def test_fault_03_a_local_layer_without_a_window_keeps_its_rope(tmp_path):
    tiny_hf.save(tiny_hf.build("gemma3_text", sliding_window=64), tmp_path)  # beyond all tokens
    model = swaa.load_model(tmp_path, dtype="float32")
    wide = swaa.load_model(tmp_path, dtype="float32", config_overrides={"sliding_window": None})
    assert wide.policy.is_full and wide.config.local_layers == (0, 2)
    np.testing.assert_array_equal(model(jnp.asarray(TOKENS)), wide(jnp.asarray(TOKENS)))
    # Saved, Transformers runs it with a window that nothing reaches, and with the local ropes.
    swaa.save_model(wide, tmp_path / "wide")
    theirs = tiny_hf.transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "wide", attn_implementation="eager"
    )
    expected = tiny_hf.logits(theirs.eval(), TOKENS)
    np.testing.assert_allclose(wide(jnp.asarray(TOKENS)), expected, rtol=0, atol=5e-4)


OLD_SWITCHES = {"use_sliding_window": True, "layer_types": None, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("family", "fields", "overrides", "idle"),
    [
        ("qwen3", {}, {"sliding_window": 8}, "sliding_window"),
        ("qwen3", {}, {"max_window_layers": 1}, "max_window_layers"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 9, "layer_types": [FULL] * 3},
            {"sliding_window": 8},
            "sliding_window",
        ),
        ("qwen3", {}, {"sliding_window": None, "rms_norm_eps": 1e-5}, None),
        ("mistral", {}, {"sliding_window": 8}, None),
        ("qwen3", OLD_SWITCHES, {"sliding_window": 8}, None),
        ("qwen3", OLD_SWITCHES | {"max_window_layers": 3}, {"sliding_window": 8}, "sliding_window"),
    ],
)
def test_fault_02_an_override_that_changes_nothing_is_refused(
    family, fields, overrides, idle, tmp_path
):
    tiny_hf.save(tiny_hf.build(family, num_hidden_layers=3), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    if idle is None:
        model = swaa.load_model(tmp_path, dtype="float32", config_overrides=overrides)
        assert model.policy.window == overrides["sliding_window"]
        return
    told = f"config_overrides.{idle}: expected a value that changes the model, got "
    with pytest.raises(ValueError, match=f"{told}{overrides[idle]}"):
        swaa.load_model(tmp_path, dtype="float32", config_overrides=overrides)


def test_fault_02_overrides_of_windows_do_not_lose_to_the_saved_policy(tmp_path):
    overrides = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    told = r"sliding_window: expected none, .*attention_policy.json \(full\).* got 8; give a policy"
    with pytest.raises(ValueError, match=told):
        swaa.load_model("tiny-retriever", config_overrides=overrides)
    with pytest.raises(ValueError, match=told):
        convert_checkpoint("tiny-retriever", tmp_path / "out", config_overrides=overrides)
    both = swaa.load_model("tiny-retriever", config_overrides=overrides, policy="window=8")
    assert both.config.own == both.policy


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_fault_05_an_override_of_a_token_that_the_model_lacks(name):
    with pytest.raises(ValueError, match=f"{name}: expected ids below vocab_size=2304, got 99999"):
        swaa.load_model("tiny-retriever", config_overrides={name: 99999})


@pytest.mark.parametrize("how", ["load", "save_model", "convert"])
def test_fault_05_a_token_that_an_override_makes_the_last_ends_answers(how, tmp_path):
    """The generation config, which goes before the config, says another."""
    source, overrides = tmp_path / "model", {"eos_token_id": 7}
    tiny_hf.save(tiny_hf.build("qwen3", num_hidden_layers=1), source)
    (source / "generation_config.json").write_text('{"eos_token_id": [3, 4], "top_k": 5}')
    model = swaa.load_model(source, dtype="float32", config_overrides=overrides)
    if how == "save_model":
        swaa.save_model(model, tmp_path / "again")
    elif how == "convert":
        convert_checkpoint(source, tmp_path / "again", config_overrides=overrides)
    if how != "load":
        model = swaa.load_model(tmp_path / "again", dtype="float32")
        kept = json.loads((tmp_path / "again" / "generation_config.json").read_text())
        assert kept == {"eos_token_id": 7, "top_k": 5}
    assert eos_token_ids(model, None) == (7,)
    assert eos_token_ids(swaa.load_model(source, dtype="float32"), None) == (3, 4)


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize("how", ["save_model", "convert"])
def test_fault_13_a_context_that_an_override_lengthens_is_saved(how, tmp_path):
    tiny_hf.save(tiny_hf.build("qwen3", num_hidden_layers=1), tmp_path / "model")
    overrides = {"rope_scaling": YARN}
    model = swaa.load_model(tmp_path / "model", dtype="float32", config_overrides=overrides)
    assert model.config.max_position_embeddings == 2048
    if how == "save_model":
        swaa.save_model(model, tmp_path / "again")
    else:
        convert_checkpoint(tmp_path / "model", tmp_path / "again", config_overrides=overrides)
    again = swaa.load_model(tmp_path / "again", dtype="float32")
    assert again.config.max_position_embeddings == 2048
    assert (
        again.config.rope == model.config.rope
    )  # the original context is 512, not a quarter of it
    theirs = tiny_hf.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert theirs.config.max_position_embeddings == 2048
    expected = tiny_hf.logits(theirs.eval(), TOKENS)
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(again(jnp.asarray(TOKENS)), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_fault_13_a_rope_of_the_older_form_is_saved(family, key, tmp_path):
    tiny_hf.save(tiny_hf.build(family), tmp_path / "model")
    scaling = {key: "linear", "factor": 5.0}
    model = swaa.load_model(
        tmp_path / "model", dtype="float32", config_overrides={"rope_scaling": scaling}
    )
    swaa.save_model(model, tmp_path / "again")
    again = swaa.load_model(tmp_path / "again", dtype="float32")
    assert again.config.rope == model.config.rope != again.config.local_rope
    theirs = tiny_hf.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    with jax.default_matmul_precision("highest"):
        logits = again(jnp.asarray(TOKENS))
    np.testing.assert_allclose(logits, tiny_hf.logits(theirs, TOKENS), rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    "family, fields, named",
    [
        ("llama", {"sliding_window": 5}, "sliding_window=5"),
        ("mistral", {"layer_types": [FULL] * 3}, "layer_types"),
        ("qwen3", {"residual_multiplier": 0.2}, "residual_multiplier=0.2"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved=True"),
        ("phi3", {"attention_bias": True}, "attention_bias=True"),
        ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual chunk attention"),
    ],
)
def test_fault_02_a_field_that_is_not_read_is_warned_of(family, fields, named, caplog):
    config_class = FAMILIES[family].config_class
    with caplog.at_level(logging.WARNING, logger="swaa_jax"):
        config_class.from_hf(file_of(family))
        assert not caplog.records
        config_class.from_hf({**file_of(family), **fields})
    assert named in caplog.text and len(caplog.text) < 700


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_fault_02_a_model_that_is_not_causal_is_refused(family):
    """Transformers gives any decoder with `is_causal: false` bidirectional attention."""
    read = FAMILIES[family].config_class.from_hf
    file = file_of(family)
    assert read({**file, "is_causal": True}).own == read(file).own
    assert read({**file, "is_causal": False}, {"is_causal": True}).own == read(file).own
    for value in (False, None):  # null is no more than false to Transformers
        with pytest.raises(NotImplementedError, match=r"config\.is_causal: expected true"):
            read({**file, "is_causal": value})


def test_fault_02_many_unread_fields_give_one_bounded_warning(caplog):
    config = file_of("llama") | {f"field_{n}": "x" * 1000 for n in range(1000)}
    with caplog.at_level(logging.WARNING, logger="swaa_jax"):
        FAMILIES["llama"].config_class.from_hf(config)
    assert "and 992 more are not read" in caplog.text and len(caplog.text) < 1500
