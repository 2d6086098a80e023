"""The drawings of `docs/concepts`; `python -m docs_site.drawings` writes them.

What a drawing shows is computed by the code that it explains: masks by the formula itself, slots by
`RingCache`. `tests/docs` says when a committed drawing is no longer what this makes.
"""

import dataclasses
import html
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from docs_site.links import ROOT
from kernels_pallas.mask import visible
from swaa_jax.attention import EMPTY, RingCache

FOLDER = ROOT / "docs/concepts"

_INK, _FAINT = "#37415c", "#d9deea"
_COLOURS = {"window": "#4c6fcf", "sink": "#e09a2d", "full": "#3a9d7a", "empty": "#f3f5fa"}


@dataclasses.dataclass
class _Drawing:
    """A picture on white, so that it is read on dark pages too; lengths are pixels."""

    width: int
    height: int
    title: str
    parts: list[str] = dataclasses.field(default_factory=list)

    def box(self, x: float, y: float, w: float, h: float, fill: str, stroke: str = "none") -> None:
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="2" fill="{fill}"'
            f' stroke="{stroke}"/>'
        )

    def text(self, x: float, y: float, words: str, size: int = 12, **style: str) -> None:
        styled = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}"{styled}>{html.escape(words)}</text>'
        )

    def line(self, x: float, y: float, to_x: float, to_y: float) -> None:
        self.parts.append(
            f'<line x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}" stroke="{_INK}"'
            ' stroke-dasharray="3 3"/>'
        )

    def legend(self, x: float, y: float, entries: Iterable[tuple[str, str]]) -> None:
        for colour, words in entries:
            self.box(x, y - 10, 12, 12, _COLOURS[colour])
            self.text(x + 17, y, words)
            x += 32 + 6.6 * len(words)

    def svg(self) -> str:
        size = self.width, self.height
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}"',
                f'width="{size[0]}" height="{size[1]}" role="img" fill="{_INK}"',
                'font-family="system-ui, sans-serif">',
                f"<title>{html.escape(self.title)}</title>",
                f'<rect width="{self.width}" height="{self.height}" rx="6" fill="#fff"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


_LEGEND = (("window", "window"), ("sink", "sink token"), ("full", "seen because the row is full"))


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
    drawing = _Drawing(790, 262, "Masks of a layer under four policies")
    shown = (
        ("full", dict(window=12, sinks=0, full_answers=0)),
        ("window=4", dict(window=4, sinks=0, full_answers=0)),
        ("window=4,sinks=2", dict(window=4, sinks=2, full_answers=0)),
        ("window=4,sinks=2,decode=full", dict(window=4, sinks=2, full_answers=1)),
    )
    for number, (name, policy) in enumerate(shown):
        x = 20 + number * 186
        drawing.text(x, 28, name, 11, font_family="ui-monospace, monospace")
        _mask(drawing, x, 40, tokens=12, prompt=9, side=13.5, **policy)
    drawing.text(20, 220, "Down: queries. Across: keys. Below the dashed line are answer tokens.")
    drawing.legend(20, 245, _LEGEND)
    return drawing.svg()


def stages() -> str:
    """One row of tokens with stages, and which row predicts which token."""
    drawing = _Drawing(760, 232, "Stages of the tokens of a chat")
    words = ["<user>", "How", "many", "?", "<model>", "Four", "of", "them", "<end>"]
    prompt, side = 5, 80
    for number, word in enumerate(words):
        x = 20 + number * side
        colour = "window" if number < prompt else "full"
        drawing.box(x, 40, side - 4, 30, _COLOURS[colour])
        drawing.text(x + 6, 59, word, 12, fill="#fff")
        drawing.text(x + 6, 32, "PROMPT" if number < prompt else "ANSWER", 10)
        if prompt - 1 <= number < len(words) - 1:
            drawing.text(x + 6, 88, f"predicts {words[number + 1]}", 10)
    seen = (
        (4, "the last prompt token: sees its window and the sinks"),
        (5, "the first answer token: under decode=full it sees everything"),
    )
    for line, (query, told) in enumerate(seen):
        y = 112 + line * 56
        drawing.text(20, y, f"{words[query]}, {told}", 12)
        row = visible(
            query, np.arange(len(words)), window=2, num_sink_tokens=1, q_full=query >= prompt
        )
        near = visible(query, np.arange(len(words)), window=2)
        for key in range(len(words)):
            kind = "empty"
            if row[key]:
                kind = "window" if near[key] else "full" if key else "sink"
            drawing.box(20 + key * side, y + 8, side - 4, 16, _COLOURS[kind])
    drawing.text(20, 222, "window=2,sinks=1,decode=full", 11, font_family="ui-monospace, monospace")
    return drawing.svg()


def caches() -> str:
    """A full cache and a ring after 6, 9 and 12 tokens; the ring's slots are `RingCache`'s own."""
    drawing = _Drawing(700, 250, "A full cache and a ring, as tokens come")
    empty = jnp.zeros((1, 6, 1, 1))
    nothing = jnp.full((1, 6), EMPTY)
    ring = RingCache(k=empty, v=empty, slot_positions=nothing, num_sink_tokens=2)
    drawing.text(20, 26, "full layer: slot = position", 12)
    drawing.text(480, 26, "windowed layer: 2 sinks, ring of 4", 12)
    for line, tokens in enumerate((6, 9, 12)):
        y = 40 + line * 56
        for slot in range(12):
            kind, name = ("full", str(slot)) if slot < tokens else ("empty", "")
            drawing.box(20 + slot * 36, y, 33, 28, _COLOURS[kind], _FAINT)
            drawing.text(28 + slot * 36, y + 18, name, 12, fill="#fff")
        written = jnp.zeros((1, tokens, 1, 1))
        held = ring.write(written, written, jnp.array([0]))
        positions = np.asarray(held.positions(jnp.array([tokens])))[0]
        for slot, position in enumerate(positions.tolist()):
            kind = "sink" if slot < 2 else "window"
            drawing.box(480 + slot * 34, y, 31, 28, _COLOURS[kind], _FAINT)
            drawing.text(488 + slot * 34, y + 18, str(position), 12, fill="#fff")
        drawing.text(20, y + 43, f"after {tokens} tokens", 11)
    drawing.legend(20, 232, (("full", "every key"), ("sink", "sinks"), ("window", "the window")))
    return drawing.svg()


def engine() -> str:
    """Three slots over time: prompts in chunks, answers, and the next request in a free slot."""
    drawing = _Drawing(700, 232, "Slots of the engine over time")
    rows = (
        (("r0", 2, 8), ("r4", 1, 3)),
        (("r1", 6, 7),),
        (("r2", 1, 3), ("r3", 3, 6)),
    )
    starts = ((0, 10), (1,), (2, 6))
    side = 44
    for slot, requests in enumerate(rows):
        y = 34 + slot * 50
        drawing.text(20, y + 20, f"slot {slot}")
        for (name, chunks, steps), start in zip(requests, starts[slot], strict=True):
            for number in range(chunks + steps):
                if start + number >= 14:
                    break
                x = 74 + (start + number) * side
                kind = "sink" if number < chunks else "full"
                drawing.box(x, y, side - 3, 30, _COLOURS[kind])
                drawing.text(x + 5, y + 19, name if not number else "", 12, fill="#fff")
    drawing.line(74, 22, 74 + 14 * side, 22)
    drawing.text(74, 16, "rounds", 11)
    drawing.legend(20, 200, (("sink", "a chunk of the prompt is read"), ("full", "decode steps")))
    drawing.text(20, 222, "A request that waits takes the first slot that is free: r3 after r2.")
    return drawing.svg()


ALL = {"mask": mask, "stages": stages, "caches": caches, "engine": engine}

if __name__ == "__main__":
    for name, draw in ALL.items():
        (FOLDER / f"{name}.svg").write_text(draw())
