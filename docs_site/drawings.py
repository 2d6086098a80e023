"""The drawings of `docs/concepts`; `python -m docs_site.drawings` writes them.

What a drawing shows is computed by the code that it explains: masks by the formula itself, slots by
`RingCache`. `tests/docs` says when a committed drawing is no longer what this makes.
"""

import dataclasses
import html

import jax.numpy as jnp
import numpy as np

from docs_site.links import ROOT
from kernels_pallas.mask import visible
from swaa_jax.attention import EMPTY, RingCache

FOLDER = ROOT / "docs/concepts"
WIDTH = 360
"""Of every drawing, in pixels: what a phone shows without making it smaller."""

_INK, _FAINT = "#37415c", "#d9deea"
_COLOURS = {"window": "#4c6fcf", "sink": "#e09a2d", "full": "#3a9d7a", "empty": "#f3f5fa"}


@dataclasses.dataclass
class _Drawing:
    """A picture on white, so that it is read on dark pages too; lengths are pixels."""

    height: int
    title: str
    parts: list[str] = dataclasses.field(default_factory=list)

    def box(self, x: float, y: float, w: float, h: float, fill: str, stroke: str = "none") -> None:
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="2" fill="{fill}"'
            f' stroke="{stroke}"/>'
        )

    def text(self, x: float, y: float, words: str, size: int = 12, **style: str) -> None:
        if not words:
            return
        styled = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}"{styled}>{html.escape(words)}</text>'
        )

    def line(self, x: float, y: float, to_x: float, to_y: float) -> None:
        self.parts.append(
            f'<line x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}" stroke="{_INK}"'
            ' stroke-dasharray="3 3"/>'
        )

    def lines(self, x: float, y: float, *lines: str, size: int = 12, **style: str) -> None:
        for number, words in enumerate(lines):
            self.text(x, y + number * (size + 4), words, size, **style)

    def legend(self, x: float, y: float, *entries: tuple[str, str]) -> None:
        for colour, words in entries:
            self.box(x, y - 10, 12, 12, _COLOURS[colour])
            self.text(x + 17, y, words)
            x += 32 + 6.6 * len(words)

    def svg(self) -> str:
        size = WIDTH, self.height
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}"',
                f'width="{size[0]}" height="{size[1]}" role="img" fill="{_INK}"',
                'font-family="system-ui, sans-serif">',
                f"<title>{html.escape(self.title)}</title>",
                f'<rect width="{WIDTH}" height="{self.height}" rx="6" fill="#fff"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


_MONO = "ui-monospace, monospace"


def _mask(
    drawing: _Drawing, x: float, y: float, *, tokens: int, prompt: int, side: float, **policy: int
) -> None:
    """One layer's mask, queries downwards, with the border before the answer."""
    window, sinks = policy["window"], policy["sinks"]
    i = np.arange(tokens)
    q_full = i >= (prompt if policy["full_answers"] else tokens)
    asked = {"q_pos": i[:, None], "k_pos": i[None]}
    alone = visible(**asked, window=window)
    with_sinks = visible(**asked, window=window, num_sink_tokens=sinks)
    seen = visible(**asked, window=window, num_sink_tokens=sinks, q_full=q_full[:, None])
    for query, key in np.ndindex(tokens, tokens):
        kind = "empty"
        if seen[query, key]:
            kind = "window" if alone[query, key] else "sink" if with_sinks[query, key] else "full"
        drawing.box(x + key * side, y + query * side, side - 1.5, side - 1.5, _COLOURS[kind])
    drawing.line(x, y + prompt * side - 1, x + tokens * side, y + prompt * side - 1)


def mask() -> str:
    """Four masks of 12 tokens: what each part of a policy adds."""
    drawing = _Drawing(464, "Masks of a layer under four policies")
    shown = (
        (("full",), dict(window=12, sinks=0, full_answers=0)),
        (("window=4",), dict(window=4, sinks=0, full_answers=0)),
        (("window=4,sinks=2",), dict(window=4, sinks=2, full_answers=0)),
        (("window=4,sinks=2,", "decode=full"), dict(window=4, sinks=2, full_answers=1)),
    )
    for number, (name, policy) in enumerate(shown):
        x, y = 12 + number % 2 * 176, 20 + number // 2 * 190
        drawing.lines(x, y, *name, size=11, font_family=_MONO)
        _mask(drawing, x, y + (8 if number < 2 else 24), tokens=12, prompt=9, side=13.5, **policy)
    told = "Down: queries. Across: keys.", "Below the dashed line are answer tokens."
    drawing.lines(12, 414, *told)
    drawing.legend(12, 454, ("window", "window"), ("sink", "sink token"), ("full", "full row"))
    return drawing.svg()


def stages() -> str:
    """One row of tokens with stages, and which row predicts which token."""
    drawing = _Drawing(238, "Stages of the tokens of a chat")
    words = ["<user>", "How", "many", "?", "<bot>", "Four", "of", "them"]
    prompt, side = 5, 42
    drawing.text(12, 20, "PROMPT", 11)
    drawing.text(12 + prompt * side, 20, "ANSWER", 11)
    for number, word in enumerate(words):
        x = 12 + number * side
        colour = "window" if number < prompt else "full"
        drawing.box(x, 28, side - 3, 28, _COLOURS[colour])
        middle = dict(size=10, text_anchor="middle")
        drawing.text(x + 19.5, 46, word, **middle, fill="#fff")
        if prompt - 1 <= number < len(words) - 1:
            drawing.text(x + 19.5, 74, words[number + 1], **middle)
    drawing.text(12, 74, "each row predicts:", 11)
    seen = (
        (4, ("the last prompt token:", "sees its window and the sink")),
        (5, ("the first answer token:", "under decode=full it sees everything")),
    )
    for line, (query, told) in enumerate(seen):
        y = 108 + line * 62
        drawing.lines(12, y, f"{words[query]}, {told[0]}", told[1])
        row = visible(
            query, np.arange(len(words)), window=2, num_sink_tokens=1, q_full=query >= prompt
        )
        near = visible(query, np.arange(len(words)), window=2)
        for key in range(len(words)):
            kind = "empty"
            if row[key]:
                kind = "window" if near[key] else "full" if key else "sink"
            drawing.box(12 + key * side, y + 23, side - 3, 14, _COLOURS[kind])
    drawing.text(12, 228, "window=2,sinks=1,decode=full", 11, font_family=_MONO)
    return drawing.svg()


def caches() -> str:
    """A full cache and a ring after 6, 9 and 12 tokens; the ring's slots are `RingCache`'s own."""
    drawing = _Drawing(304, "A full cache and a ring, as tokens come")
    empty = jnp.zeros((1, 6, 1, 1))
    nothing = jnp.full((1, 6), EMPTY)
    ring = RingCache(k=empty, v=empty, slot_positions=nothing, num_sink_tokens=2)
    drawing.text(12, 22, "full layer: slot = position", 12)
    drawing.text(12, 154, "windowed layer: 2 sinks, a ring of 4", 12)

    def cell(slot: int, y: int, kind: str, name: str) -> None:
        x = 78 + slot * 23
        drawing.box(x, y, 21, 26, _COLOURS[kind], _FAINT)
        drawing.text(x + 10.5, y + 17, name, 11, fill="#fff", text_anchor="middle")

    for line, tokens in enumerate((6, 9, 12)):
        y = 32 + line * 32
        for slot in range(12):
            kind, name = ("full", str(slot)) if slot < tokens else ("empty", "")
            cell(slot, y, kind, name)
        written = jnp.zeros((1, tokens, 1, 1))
        held = ring.write(written, written, jnp.array([0]))
        positions = np.asarray(held.positions(jnp.array([tokens])))[0]
        for slot, position in enumerate(positions.tolist()):
            cell(slot, y + 132, "sink" if slot < 2 else "window", str(position))
        for above in (0, 132):
            drawing.text(12, y + above + 17, f"{tokens} tokens", 11)
    drawing.legend(12, 286, ("full", "every key"), ("sink", "sinks"), ("window", "the window"))
    return drawing.svg()


def engine() -> str:
    """Three slots over time: prompts in chunks, answers, and the next request in a free slot."""
    drawing = _Drawing(206, "Slots of the engine over time")
    rows = (
        (("r0", 2, 8), ("r4", 1, 3)),
        (("r1", 6, 7),),
        (("r2", 1, 3), ("r3", 3, 6)),
    )
    starts = ((0, 10), (1,), (2, 6))
    side, left = 21, 54
    for slot, requests in enumerate(rows):
        y = 32 + slot * 38
        drawing.text(12, y + 19, f"slot {slot}")
        for (name, chunks, steps), start in zip(requests, starts[slot], strict=True):
            for number in range(chunks + steps):
                if start + number >= 14:
                    break
                x = left + (start + number) * side
                kind = "sink" if number < chunks else "full"
                drawing.box(x, y, side - 2, 28, _COLOURS[kind])
                drawing.text(x + 3, y + 18, name if not number else "", 11, fill="#fff")
    drawing.line(left, 24, left + 14 * side, 24)
    drawing.text(left, 18, "rounds", 11)
    drawing.legend(12, 160, ("sink", "a chunk of the prompt"), ("full", "decode steps"))
    told = "A request that waits takes the first slot", "that is free: r3 after r2."
    drawing.lines(12, 181, *told)
    return drawing.svg()


ALL = {"mask": mask, "stages": stages, "caches": caches, "engine": engine}

if __name__ == "__main__":
    for name, draw in ALL.items():
        (FOLDER / f"{name}.svg").write_text(draw())
