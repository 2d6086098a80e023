"""What objects show of themselves: in a line, in a notebook, as a table, as a figure."""

import html
import re

import numpy as np
import pytest

import swaa_jax as swaa
from swaa_jax.infer import Generation, Timings
from swaa_jax.policy import LayerAttention
from swaa_jax.policy.drawing import FULL, NOTHING, SINK, WINDOW, draw_layers, draw_mask
from swaa_jax.tables import Table
from tests.support.random_models import random_model

TIMINGS = Timings(
    num_rows=2, prompt_tokens=6, new_tokens=5, prefill_s=0.5, first_token_s=0.0, decode_s=1.0,
    decode_steps=4, compile_s=2.0, cache_bytes=2**20, cache_bytes_per_row=2**19,
)  # fmt: skip


def test_a_mask_by_hand():
    """The oracle is the sentence of the README, pair by pair."""
    layer = LayerAttention(window=4, num_sink_tokens=2, full_decode=True, full_attention_tail=1)
    mask = draw_mask(layer)
    assert mask.tokens == 1
    for q, line in enumerate(mask.cells):
        is_full = q >= mask.num_prompt or q == mask.num_prompt - 1
        for k, cell in enumerate(line):
            expected = NOTHING
            if k <= q:
                expected = FULL if is_full else NOTHING
                expected = SINK if k < 2 else expected
                expected = WINDOW if q - k < 4 else expected
            assert cell == expected, (q, k)


@pytest.mark.parametrize("window, sinks", [(2048, 10), (2**30, 0), (64, 4096)])
def test_any_size_is_drawn_to_scale(window, sinks):
    mask = draw_mask(LayerAttention(window=window, num_sink_tokens=sinks))
    assert len(mask.cells) <= 24
    assert len(mask.cells) * mask.tokens > window
    assert (mask.cells[-1] == WINDOW).any() and (mask.cells[-1] == NOTHING).any()
    assert (mask.cells[-1] == SINK).any() == bool(sinks)


def test_a_policy_in_a_notebook(tmp_path):
    for text in ("full", "window=64,full_layers=35", "window=64,decode=0+2,full_heads=1:0"):
        policy = swaa.load_policy(text)
        shown = policy._repr_html_()
        assert shown.count("<svg") == shown.count("</svg>") == 1 and len(shown) < 20_000
        assert str(policy) in shown and 'role="img"' in shown
        assert re.search(r'aria-label="[^"]{20,}"', shown)
    assert len(draw_layers(swaa.load_policy("window=64,full_layers=35"))) == 36
    figure = swaa.load_policy("window=64,decode=0+2").plot(tmp_path / "policy.png")
    assert len(figure.axes) == 3 and (tmp_path / "policy.png").stat().st_size > 1000
    assert figure._repr_png_()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"path: expected one that ends in one of .*'policy.doc'"):
        swaa.load_policy("full").plot("policy.doc")
    strip = swaa.load_policy("window=64,full_layers=0,full_heads=2:1").plot(num_layers=3).axes[-1]
    assert [bar.get_height() for bar in strip.patches] == [1, 1, 1, 1.0, 0.0, 0.5]


def test_recipes_and_adapters_are_drawn(tmp_path):
    found = swaa.recipes()
    figure = found.plot(tmp_path / "recipes.png")
    front = [line.get_ydata() for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    best = max(one.kept for one in found if one.main_evidence)
    assert max(map(max, front)) == pytest.approx(100 * best)
    assert (tmp_path / "recipes.png").stat().st_size > 10_000
    shown = swaa.LoraConfig(rank=4, alpha=8, dropout=0.1, target_modules="all-linear")._repr_html_()
    assert "2 x A B" in shown and "<td" in shown and "all-linear" in shown and "0.1" in shown
    assert "rslora" not in shown and "rslora" in swaa.LoraConfig(rslora=True)._repr_html_()


def test_a_model():
    model = random_model(num_hidden_layers=2).with_policy("window=4,full_layers=1")
    adapted = swaa.add_lora(model, {"rank": 2})
    for shown in (repr(adapted), str(adapted), adapted._repr_html_()):
        assert "window=4,full_layers=1" in shown and "LoRA of rank 2" in shown
        assert "qwen3" in shown and "float32" in shown
    assert len(repr(adapted)) < 400 and "\n" not in repr(adapted)
    assert "1 of 2 layers is full" in model._repr_html_()
    count = sum(np.prod(leaf.shape) for leaf in _arrays(model))
    assert f"parameters={count / 1e3:.3g}K" in repr(model)


def _arrays(model):
    import jax
    from flax import nnx

    return jax.tree.leaves(nnx.state(model))


def test_a_generation(tmp_path):
    out = Generation(
        texts=("a<b>", "x" * 5000),
        tokens=((1, 2), (3, 4, 5)),
        finish_reasons=("eos", "length"),
        timings=TIMINGS,
        logprobs=((-1.0, -0.5), (0.0, 0.0, -2.0)),
    )
    assert len(repr(out)) < 600 and "a<b>" in repr(out)
    assert out.table().records()[0] == {
        "prompt": 0, "text": "a<b>", "new_tokens": 2, "finish_reason": "eos", "logprob": -1.5,
    }  # fmt: skip
    assert "a&lt;b&gt;" in out._repr_html_() and "<b>" not in out._repr_html_()
    assert list(out.to_pandas()["new_tokens"]) == [2, 3]
    assert TIMINGS.table().records()[0]["cache_bytes"] == 2**20
    bars = out.plot(tmp_path / "time.png").axes[0].patches
    assert [bar.get_width() for bar in bars] == [2.0, 0.5, 1.0]


def test_a_table_in_a_notebook():
    """Headings and policies may wrap, at places that are no part of the text; what is still too
    wide scrolls; numbers stand to the right, and so do their headings.
    """
    lines = (("full", 1234, None), ("window=64,sinks=4", None, "a<b>"))
    table = Table(columns=("policy", "output_tokens_per_s", "error"), lines=lines, caption="A & B")
    shown = table._repr_html_()
    assert shown.startswith('<div style="overflow-x:auto"><table>')
    cells = re.findall(r'<t([hd]) style="text-align:(left|right)">(.*?)</t\1>', shown)
    assert [side for _, side, _ in cells] == ["left", "right", "left"] * 3
    texts = [html.unescape(text.replace("<wbr>", "")) for _, _, text in cells]
    assert texts == [*table.columns, "full", "1,234", "", "window=64,sinks=4", "", "a<b>"]
    assert re.findall(r"(\w+.)<wbr>", shown) == ["output_", "tokens_", "64,"], (
        "not of units, numbers"
    )
    assert "A &amp; B" in shown and "<b>" not in shown
