"""Policies in config.json: Transformers, told so, gives the logits and answers that we give."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import swaa_jax as swaa

tiny_hf = pytest.importorskip("tests.support.tiny_hf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WINDOW, MIXED, ALL_FULL = (
    swaa.AttentionPolicy(window=6),
    swaa.AttentionPolicy(window=6, full_attention_layers=(1,)),
    swaa.AttentionPolicy(),
)
EARLY_FULL = swaa.AttentionPolicy(window=6, full_attention_layers=(0,))
# Policies that the family's stock model can run.
EXPRESSED = {
    "qwen2": [WINDOW, MIXED, EARLY_FULL, ALL_FULL],
    "qwen3": [WINDOW, MIXED, EARLY_FULL, ALL_FULL],
    "qwen3_moe": [WINDOW, ALL_FULL],
    "mistral": [WINDOW, MIXED, ALL_FULL],
    "ministral": [WINDOW, MIXED, ALL_FULL],
    "phi3": [WINDOW, ALL_FULL],
    "llama": [ALL_FULL],
    "gemma2": [WINDOW, MIXED, ALL_FULL],
    "gemma3_text": [MIXED, ALL_FULL],  # its own local layers are 0 and 2
}
REFUSED = {
    "qwen3_moe": [(MIXED, r"full_attention_layers=\[1\]: it has one window")],
    "phi3": [(MIXED, r"full_attention_layers=\[1\]: it has one window")],
    "llama": [(WINDOW, "window=6: it has no window"), (MIXED, "window=6: it has no window")],
    "gemma3_text": [
        (WINDOW, r"windows on layers \[0, 1, 2\]: a layer's kind also chooses its rope")
    ],
}
# Qwen2 is written as Qwen3 is.
CASES = [
    pytest.param(family, policy, marks=[] if quick else [pytest.mark.slow])
    for family, policies in EXPRESSED.items()
    for quick, policy in (
        (family == "qwen3" or (p is policies[0] and family != "qwen2"), p) for p in policies
    )
]


def _ours(family, directory, policy):
    # A window of the checkpoint's own, so that taking it out is tested too.
    own = {"mistral": {"sliding_window": 9}, "phi3": {"sliding_window": 9}}.get(family, {})
    tiny_hf.save(tiny_hf.build(family, **own), directory)
    return swaa.load_model(directory, policy=policy, dtype="float32")


@pytest.mark.parametrize("family, policy", CASES, ids=lambda value: str(value))
def test_transformers_runs_what_was_expressed(family, policy, tmp_path, caplog):
    ours = _ours(family, tmp_path / "own", policy)
    with caplog.at_level(logging.WARNING, "swaa_jax"):
        swaa.save_model(ours, tmp_path / "out")
    assert "config.json: expected" not in caplog.text
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = np.random.default_rng(5).integers(3, 131, (2, 40))
    with jax.default_matmul_precision("highest"):
        got = np.asarray(ours(jnp.asarray(tokens)))
    # float32 through three layers, as in test_model_parity.py
    np.testing.assert_allclose(got, tiny_hf.logits(theirs, tokens), rtol=0, atol=5e-5)
    prompt = tokens[0, :20].tolist()
    with torch.no_grad():
        want = theirs.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)
    answer = swaa.generate(ours, None, [prompt], max_new_tokens=16).tokens[0]
    assert list(answer) == want[0, len(prompt) :].tolist()


def test_the_policy_matters_for_these_logits(tmp_path):
    ours = _ours("qwen3", tmp_path, None)
    tokens = jnp.asarray(np.random.default_rng(5).integers(3, 131, (2, 40)))
    seen = [np.asarray(ours.with_policy(p)(tokens)) for p in EXPRESSED["qwen3"]]
    for index, one in enumerate(seen):
        for other in seen[:index]:
            assert np.abs(one - other).max() > 0.1


@pytest.mark.parametrize(
    "family, policy, message",
    [(family, policy, message) for family, cases in REFUSED.items() for policy, message in cases],
    ids=lambda value: str(value),
)
def test_what_a_family_cannot_express_is_named(family, policy, message, tmp_path, caplog):
    ours = _ours(family, tmp_path / "own", policy)
    with pytest.raises(NotImplementedError, match=message) as error:
        policy.to_hf_config(ours.config)
    assert ours.config.architecture in str(error.value)
    with caplog.at_level(logging.WARNING, "swaa_jax"):
        swaa.save_model(ours, tmp_path / "out")
    assert "config.json: expected the model's policy" in caplog.text
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    before = json.loads((tmp_path / "own" / "config.json").read_text())
    assert stored.get("sliding_window") == before.get("sliding_window")
    assert swaa.load_model(tmp_path / "out").policy == policy  # attention_policy.json has it


def test_no_family_can_express_sinks_stages_or_a_tail(tmp_path):
    ours = _ours("qwen3", tmp_path, None)
    policy = swaa.AttentionPolicy(window=6, num_sink_tokens=2, decode="full", full_attention_tail=3)
    with pytest.raises(NotImplementedError) as error:
        policy.to_hf_config(ours.config)
    for part in ("num_sink_tokens=2", "decode", "full_attention_tail", "Qwen3ForCausalLM"):
        assert part in str(error.value)


def test_a_saved_policy_is_the_configs_own_when_loaded_without_its_file(tmp_path):
    ours = _ours("qwen3", tmp_path / "own", MIXED)
    swaa.save_model(ours, tmp_path / "out")
    (tmp_path / "out" / "attention_policy.json").unlink()
    assert swaa.load_model(tmp_path / "out").policy == MIXED


def test_a_policy_that_widens_the_checkpoints_own_windows_is_warned_of(tmp_path, caplog):
    tiny_hf.save(tiny_hf.build("gemma3_text"), tmp_path)
    with caplog.at_level(logging.WARNING, "swaa_jax"):
        swaa.load_model(tmp_path)
        swaa.load_model(tmp_path, policy=swaa.AttentionPolicy(window=3))
        assert not caplog.records
        swaa.load_model(tmp_path, policy=ALL_FULL)
    assert "at most the window of 7 that the checkpoint's config gives layers [0, 2]" in caplog.text
