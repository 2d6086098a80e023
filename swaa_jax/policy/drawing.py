"""A policy drawn: who sees whom in its layers, and which layers they are.

    keys ->                              layers
    P  x . . . . . . .    x window       [full][win ][full][win ]
    P  s x x . . . . .    s sink
    A  f f f f f f f .    f full row

The mask is that of `kernels_pallas.mask.visible`, looked up for blocks of tokens where a policy's
window is longer than a picture has lines. A cell is drawn where any pair of its corners is seen.
"""

import dataclasses
import html
from typing import TYPE_CHECKING

import numpy as np

from kernels_pallas.layout import next_power_of_two
from kernels_pallas.mask import visible
from swaa_jax.fields import plural
from swaa_jax.figures import new_figure, save_figure
from swaa_jax.policy.policy import AttentionPolicy, LayerAttention
from swaa_jax.typing import PathLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Mask", "draw_layers", "draw_mask", "policy_figure", "policy_html"]

NOTHING, WINDOW, SINK, FULL = range(4)
"""What a cell of a mask is, and why it is seen."""

# Okabe and Ito's, which differ for every kind of sight, on white and on black.
_COLOURS = {WINDOW: "#0072B2", SINK: "#E69F00", FULL: "#009E73"}
_MOST_CELLS = 24
_DEPTHS = (8, 12, 16, 24, 28, 32, 36, 40, 48, 64, 80, 96, 128, 256, 512, 1024)
_STRIP = 480  # pixels
_CELL = 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """What a layer lets be seen, for a text of prompt and answer.

    Attributes:
        layer: whose mask it is.
        cells: `[n, n]` of NOTHING, WINDOW, SINK and FULL, a line a block of queries.
        tokens: of a cell's side.
        num_prompt: lines of the prompt; those behind are the answer's.
    """

    layer: LayerAttention
    cells: np.ndarray
    tokens: int
    num_prompt: int


def draw_mask(layer: LayerAttention) -> Mask:
    r"""The mask of a layer, at a scale at which its window can be seen.

    Examples:
        >>> mask = draw_mask(LayerAttention(window=3, num_sink_tokens=1, full_decode=True))
        >>> print("\n".join("".join(".xsf"[cell] for cell in line) for line in mask.cells))
        x...........
        xx..........
        xxx.........
        sxxx........
        s.xxx.......
        s..xxx......
        s...xxx.....
        s....xxx....
        s.....xxx...
        sffffffxxx..
        sfffffffxxx.
        sffffffffxxx
    """
    window = layer.window or 4
    needed = max(3 * window, window + 2 * layer.num_sink_tokens, 12)
    tokens = 1 if needed <= _MOST_CELLS else next_power_of_two(-(-needed // _MOST_CELLS))
    size = -(-needed // tokens)
    num_prompt = size - max(1, size // 4)
    first = np.arange(size, dtype=np.int64) * tokens
    corners = (first, first + tokens - 1)
    is_answer = np.arange(size) >= num_prompt
    in_tail = first + tokens > num_prompt * tokens - layer.full_attention_tail
    has_tail = layer.full_attention_tail > 0
    full = (is_answer & layer.full_decode) | (~is_answer & in_tail & has_tail)

    def seen(window: int | None, sinks: int = 0) -> np.ndarray:
        pairs = [
            visible(q[:, None], k[None, :], window=window, num_sink_tokens=sinks)
            for q in corners
            for k in corners
        ]
        return np.logical_or.reduce(pairs)

    cells = np.full((size, size), NOTHING)
    cells[seen(None) & (full[:, None] | layer.is_full)] = FULL
    if not layer.is_full:
        cells[seen(layer.window, layer.num_sink_tokens)] = SINK
        cells[seen(layer.window)] = WINDOW
    return Mask(layer=layer, cells=cells, tokens=tokens, num_prompt=num_prompt)


def draw_layers(
    policy: AttentionPolicy, num_layers: int | None = None, num_kv_heads: int | None = None
) -> tuple[LayerAttention, ...]:
    """What each layer sees, in a model of this depth, or in one that the policy fits; () if none.

    >>> len(draw_layers(AttentionPolicy(window=64, full_attention_layers=[35]))), len(
    ...     draw_layers(AttentionPolicy()))
    (36, 8)
    """
    for depth in _DEPTHS if num_layers is None else (num_layers,):
        try:
            return policy.resolve(depth, num_kv_heads=num_kv_heads)
        except ValueError:
            continue
    return ()


def policy_html(
    policy: AttentionPolicy, num_layers: int | None = None, num_kv_heads: int | None = None
) -> str:
    """The policy's text over an SVG of its masks and layers, for a notebook.

    Args:
        policy: the policy.
        num_layers, num_kv_heads: of the model; None: of none in particular.
    """
    layers = draw_layers(policy, num_layers, num_kv_heads)
    masks = _masks(policy, layers)
    parts, left = [], 0
    for title, mask in masks:
        parts.append(f'<g transform="translate({left},0)">{_mask_svg(title, mask)}</g>')
        left += (len(mask.cells) + 4) * _CELL
    height = max(len(mask.cells) for _, mask in masks) * _CELL + 52
    width = max(left, 300)
    parts.append(f'<g transform="translate(0,{height})">{_legend_svg(policy, masks)}</g>')
    height += 24
    if layers:
        strip, deep = _strip_svg(layers, num_kv_heads, is_model=num_layers is not None)
        parts.append(f'<g transform="translate(0,{height})">{strip}</g>')
        width, height = max(width, _STRIP + 20), height + deep
    label = html.escape(_in_words(policy, masks, layers), quote=True)
    return (
        f"<div><code>{html.escape(str(policy))}</code><br>"
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'style="max-width:100%;height:auto" font-family="sans-serif" font-size="11" '
        f'fill="currentColor"><title>{label}</title>{"".join(parts)}</svg></div>'
    )


def policy_figure(
    policy: AttentionPolicy,
    path: PathLike | None = None,
    num_layers: int | None = None,
    num_kv_heads: int | None = None,
) -> "Figure":
    """The same as a figure of matplotlib.

    Args:
        policy: the policy.
        path: where to save it; the ending says as what.
        num_layers, num_kv_heads: of the model; None: of none in particular.
    """
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    layers = draw_layers(policy, num_layers, num_kv_heads)
    masks = _masks(policy, layers)
    width, height = 3.6 * len(masks) + 0.6, 4.4 if layers else 3.8
    figure = new_figure(width=width, height=height, layout="constrained")
    heights = [12, 1] if layers else [1]
    grid = figure.add_gridspec(len(heights), len(masks), height_ratios=heights)
    colours = ListedColormap(["#f2f2f2", *(_COLOURS[kind] for kind in (WINDOW, SINK, FULL))])
    norm = BoundaryNorm(np.arange(-0.5, 4), 4)
    for at, (title, mask) in enumerate(masks):
        axes = figure.add_subplot(grid[0, at])
        extent = (0, len(mask.cells) * mask.tokens, len(mask.cells) * mask.tokens, 0)
        axes.imshow(mask.cells, cmap=colours, norm=norm, extent=extent, interpolation="nearest")
        axes.axhline(mask.num_prompt * mask.tokens, color="black", linewidth=0.8, linestyle=":")
        axes.set(title=title, xlabel="key", ylabel="query (answer below the line)")
    used = [kind for kind in _COLOURS if any((mask.cells == kind).any() for _, mask in masks)]
    handles = [Patch(color=_COLOURS[kind], label=_meaning(policy, kind)) for kind in used]
    figure.axes[0].legend(handles=handles, loc="upper right", fontsize="small")
    if layers:
        axes = figure.add_subplot(grid[1, :])
        places = range(len(layers))
        shares = [_full_share(layer, num_kv_heads) for layer in layers]
        axes.bar(places, 1, width=0.9, color=_COLOURS[WINDOW], alpha=0.45)
        axes.bar(places, shares, width=0.9, color=_COLOURS[FULL])
        axes.set(yticks=[], xlabel="layer", xlim=(-0.5, len(layers) - 0.5), ylim=(0, 1))
        if any(layer.full_heads for layer in layers):
            axes.set(xlabel="layer; half full: full attention in some KV heads")
    figure.suptitle(str(policy), fontsize="medium")
    return save_figure(figure, path)


def _masks(policy: AttentionPolicy, layers: tuple[LayerAttention, ...]) -> list[tuple[str, Mask]]:
    """A mask of each kind of windowed layer, two at most; of a full one where there is none."""
    kinds = dict.fromkeys(
        dataclasses.replace(layer, full_heads=()) for layer in layers if not layer.is_full
    )
    if not kinds:
        title = "every layer" if policy.is_full else "windowed layers"
        return [(title, draw_mask(LayerAttention(window=policy.window)))]
    titles = ["windowed layers"]
    if len(kinds) > 1:
        titles = [
            f"windowed layers, {'full' if kind.full_decode else 'windowed'} decoding"
            for kind in kinds
        ]
    return [(title, draw_mask(kind)) for title, kind in zip(titles, kinds, strict=True)]


def _mask_svg(title: str, mask: Mask) -> str:
    size = len(mask.cells)
    side = size * _CELL
    scale = "a token" if mask.tokens == 1 else f"{mask.tokens:,} tokens"
    where = f'x="{side / 2 + 16}" y="26" text-anchor="middle" font-size="9"'
    parts = [
        f'<text x="0" y="12" font-weight="bold">{html.escape(title)}</text>',
        f"<text {where}>keys, {scale} a cell</text>",
        '<g transform="translate(16,32)">',
        f'<rect width="{side}" height="{side}" fill-opacity="0.07"/>',
    ]
    for line, row in enumerate(mask.cells):
        for kind, colour in _COLOURS.items():
            # One path a kind and line: a notebook keeps every picture.
            steps = "".join(f"M{at * _CELL} 0h8v8h-8z" for at in np.flatnonzero(row == kind))
            if steps:
                parts.append(
                    f'<path transform="translate(0,{line * _CELL})" fill="{colour}" d="{steps}"/>'
                )
    y = mask.num_prompt * _CELL - 0.5
    parts.append(
        f'<line x1="-12" x2="{side}" y1="{y}" y2="{y}" stroke="currentColor" '
        'stroke-dasharray="2 2"/>'
    )
    for words, middle in (("prompt", y / 2), ("answer", (y + side) / 2)):
        parts.append(
            f'<text transform="translate(-4,{middle}) rotate(-90)" text-anchor="middle" '
            f'font-size="9">{words}</text>'
        )
    return "".join([*parts, "</g>"])


def _legend_svg(policy: AttentionPolicy, masks: list[tuple[str, Mask]]) -> str:
    parts, left = [], 16
    for kind, colour in _COLOURS.items():
        if any((mask.cells == kind).any() for _, mask in masks):
            words = _meaning(policy, kind)
            parts.append(
                f'<rect x="{left}" y="0" width="10" height="10" fill="{colour}"/>'
                f'<text x="{left + 14}" y="9">{words}</text>'
            )
            left += 34 + 6 * len(words)
    return "".join(parts)


def _meaning(policy: AttentionPolicy, kind: int) -> str:
    sinks = policy.num_sink_tokens
    return {
        WINDOW: f"window {policy.window:,}" if policy.window else "",
        SINK: f"{sinks:,} sink {plural('token', sinks)}",
        FULL: "sees all" if policy.is_full else "full rows",
    }[kind]


def _strip_svg(
    layers: tuple[LayerAttention, ...], num_kv_heads: int | None, *, is_model: bool
) -> tuple[str, int]:
    """A box a layer, and the height of the strip: as full as the share of it that is full."""
    pitch = min(18.0, _STRIP / len(layers))
    num_full = sum(layer.is_full for layer in layers)
    words = f"{num_full} of {len(layers)} layers {'is' if num_full == 1 else 'are'} full"
    words = words if is_model else f"in a model of {len(layers)} layers, say, {words}"
    if with_heads := sum(bool(layer.full_heads) for layer in layers):
        words += f", {with_heads} in some KV heads"
    parts = [f'<text x="0" y="12" font-weight="bold">{words}</text>']
    for at, layer in enumerate(layers):
        share = _full_share(layer, num_kv_heads)
        box = f'x="{at * pitch:.1f}" width="{max(1.0, pitch - 1):.1f}"'
        name = "full" if layer.is_full else _layer_words(layer)
        parts.append(
            f"<g><title>layer {at}: {name}</title>"
            f'<rect {box} y="18" height="20" fill="{_COLOURS[WINDOW]}" fill-opacity="0.45"/>'
            f'<rect {box} y="{38 - 20 * share:.1f}" height="{20 * share:.1f}" '
            f'fill="{_COLOURS[FULL]}"/></g>'
        )
    last = len(layers) - 1
    parts.append('<text x="0" y="50" font-size="9">0</text>')
    parts.append(f'<text x="{last * pitch:.1f}" y="50" font-size="9">{last}</text>')
    return "".join(parts), 56


def _full_share(layer: LayerAttention, num_kv_heads: int | None) -> float:
    """The part of a layer's KV heads that are full; a half where their number is not known."""
    if layer.is_full:
        return 1.0
    if not layer.full_heads:
        return 0.0
    return 0.5 if num_kv_heads is None else len(layer.full_heads) / num_kv_heads


def _layer_words(layer: LayerAttention) -> str:
    words = [f"window {layer.window}"]
    if layer.num_sink_tokens:
        words.append(f"{layer.num_sink_tokens} sinks")
    if layer.full_decode:
        words.append("answers see all")
    if layer.full_heads:
        words.append(f"full KV heads {', '.join(map(str, layer.full_heads))}")
    return ", ".join(words)


def _in_words(
    policy: AttentionPolicy, masks: list[tuple[str, Mask]], layers: tuple[LayerAttention, ...]
) -> str:
    """What the picture shows, for those who do not see it."""
    if policy.is_full:
        return "Full attention: every token sees all tokens before it, in every layer."
    full = [at for at, layer in enumerate(layers) if layer.is_full]
    words = [f"Attention policy {policy}."]
    words += [f"In {title} a token sees: {_layer_words(mask.layer)}." for title, mask in masks]
    words.append(f"Full layers: {', '.join(map(str, full)) or 'none'} of {len(layers)}.")
    return " ".join(words)
