"""Against the `peft` package: its adapters here, ours there, merged ones in Transformers."""

import jax.numpy as jnp
import numpy as np
import pytest

import swaa_jax as swaa
from swaa_jax.lora import LoraConfig, add_lora, load_adapter, merge_lora, save_adapter
from tests.support import tiny_hf
from tests.swaa_jax.test_lora import EVERY, drawn

torch = tiny_hf.torch
peft = pytest.importorskip("peft", reason="see requirements/torch.txt")

# Transformers' own, from inside peft.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ATTENTION = ("q_proj", "k_proj", "v_proj")
TOKENS = np.arange(1, 41).reshape(2, 20) * 3 % 131
OURS = jnp.asarray(TOKENS)
# float32 on both sides; as in test_model_parity, with the adapters' products on top.
ATOL = 1e-4


@pytest.mark.parametrize("rslora", (False, True))
@pytest.mark.parametrize(
    "family, targets",
    [
        ("qwen3", ATTENTION),
        ("llama", EVERY),
        ("qwen2", EVERY),
        ("mistral", ("o_proj",)),
        ("gemma3_text", EVERY),
    ],
)
def test_both_ways(family, targets, rslora, tmp_path):
    directory, reference = tmp_path / "base", tiny_hf.build(family)
    tiny_hf.save(reference, directory)
    settings = dict(r=4, lora_alpha=8, use_rslora=rslora, target_modules=list(targets))
    adapted = peft.get_peft_model(reference, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.eval()
    adapted.save_pretrained(str(tmp_path / "theirs"))
    model = swaa.load_model(directory, dtype="float32")
    ours = load_adapter(model, tmp_path / "theirs")
    wanted = tiny_hf.logits(adapted, TOKENS)
    np.testing.assert_allclose(ours(OURS), wanted, atol=ATOL, rtol=1e-4)
    assert np.abs(np.asarray(model(OURS)) - wanted).max() > 0.05

    config = LoraConfig(rank=3, alpha=5, rslora=rslora, target_modules=targets)
    other = drawn(add_lora(model, config), seed=7)
    save_adapter(other, tmp_path / "ours", base_model_name_or_path=str(directory))
    base = type(reference).from_pretrained(directory)
    read = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")).eval()
    np.testing.assert_allclose(tiny_hf.logits(read, TOKENS), other(OURS), atol=ATOL, rtol=1e-4)

    swaa.save_model(merge_lora(other), tmp_path / "merged")
    merged = type(reference).from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(tiny_hf.logits(merged, TOKENS), other(OURS), atol=ATOL, rtol=1e-4)


def test_fused_projections_are_refused(tmp_path):
    tiny_hf.save(tiny_hf.build("phi3"), tmp_path / "base")
    model = add_lora(swaa.load_model(tmp_path / "base", dtype="float32"), LoraConfig())
    with pytest.raises(NotImplementedError, match="phi3 holds q_proj, k_proj, v_proj fused"):
        save_adapter(model, tmp_path / "a")
