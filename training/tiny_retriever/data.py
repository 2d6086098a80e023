"""Training data for tiny-retriever, assembled from token pieces in numpy.

A batch is rows of one width; a row is documents of equal length back to back. Kinds of document:

* ruler: the needle task exactly as `swaa_jax.eval.tasks.ruler` words it, answer included, thinking
  or not;
* dense: needles and nothing else, then many questions: lists of several sizes, or scratchpad lines;
* recall: a table of random keys and values, then its rows again in random order; what stands
  between key and value is the same in every row, so the key itself must be carried over it;
* repeat: random tokens, over and over.

Retrieval forms on the latter three: they ask for something at nearly every token. A batch depends
on (seed, stage, index) alone, so any number of worker processes gives the same run.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from swaa_jax.eval.tasks.ruler import HAYSTACKS, text
from training.tiny_retriever.pieces import (
    MAX_TAIL,
    Document,
    Facts,
    Vocabulary,
    Writer,
    columns,
    draw_facts,
    list_of_keys,
    list_of_values,
    needle_rows,
    scratchpad,
)

# What a value is counted under when exact match is measured; 0 is nothing.
GROUPS = (
    "",
    *(f"{part}/{hay}" for part in ("list", "scratchpad", "answer") for hay in HAYSTACKS),
    "dense_list",
    "dense_scratchpad",
    "recall",
    "repeat",
    "short",
)
GROUP = {name: index for index, name in enumerate(GROUPS)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the curriculum.

    Attributes:
        width: tokens of a row.
        batch_tokens: tokens of a batch.
        lengths: document length to its share of the rows.
        repeat, recall, dense: shares of those kinds; the rest is ruler.
        four_by_four: share of ruler documents with four keys and four queries.
        min_steps, max_steps: of training, whatever exact match says.
        judged: beginnings of the groups that are judged.
        advance_at: exact match, of every judged group, at which the next stage begins.
    """

    width: int
    batch_tokens: int = 65_536
    lengths: tuple[tuple[int, float], ...]
    repeat: float
    recall: float
    dense: float
    four_by_four: float
    min_steps: int
    max_steps: int
    judged: tuple[str, ...] = ("list/", "scratchpad/", "answer/")
    advance_at: float = 0.97


def haystack_units(
    rng: np.random.Generator, vocab: Vocabulary, haystack: str, budget: int, distractors: Facts
) -> tuple[np.ndarray, np.ndarray]:
    """Filler of at most `budget` tokens: flat tokens, and the n + 1 bounds of its n units."""
    if haystack == "essay":
        draw = rng.integers(0, len(vocab.sentence_lengths), budget // 8 + 4)
        ends = np.cumsum(vocab.sentence_lengths[draw])
        count = int(np.searchsorted(ends, budget, side="right"))
        left = budget - (int(ends[count - 1]) if count else 0)
        draw = draw[:count]
        if left < MAX_TAIL and len(fitting := vocab.sentences_of_length[left]):
            draw, left = np.append(draw, fitting[rng.integers(len(fitting))]), 0
        lengths = vocab.sentence_lengths[draw]
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        offsets = np.repeat(vocab.sentence_starts[draw] - bounds[:-1], lengths)
        flat = vocab.sentence_tokens[offsets + np.arange(bounds[-1])]
        separator = " "
    else:
        separator = "\n"
        if haystack == "noise":
            count = budget // len(vocab.noise)
            flat, size = np.tile(vocab.noise, count), len(vocab.noise)
        else:
            rows = needle_rows(vocab, distractors, separator)
            count, size = len(rows), rows.shape[1]
            flat = rows.ravel()
        bounds = np.arange(count + 1) * size
        left = budget - len(flat)
    tail = vocab.tails[separator][min(left, MAX_TAIL - 1)]
    if len(tail):
        flat = np.concatenate([flat, tail])
        bounds = np.append(bounds, len(flat))
    return flat, bounds


DEPTHS = np.array(text.DEPTHS)
LIST_SIZES = (1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 5, 6, 7, 8)


def ruler_document(
    rng: np.random.Generator,
    vocab: Vocabulary,
    *,
    length: int,
    haystack: str,
    thinking: bool,
    num_keys: int,
    num_queries: int,
    counted: bool = True,
) -> Document:
    """One sample of the needle task of `length` tokens (or a few less), answer included."""
    separator = text.HAYSTACK_SEPARATORS[haystack]
    needle_size = len(vocab.needle[separator]) + 10
    room = length - ruler_size(vocab, num_queries, thinking) - num_keys * needle_size
    room -= separator == " "  # the first sentence stands after a line break, which is a token more
    if room < 0:
        raise ValueError(f"length: {num_keys} needles do not fit into {length} tokens")
    num_distractors = room // needle_size if haystack == "needle" else 0
    everything = draw_facts(rng, vocab, num_keys + num_distractors)
    facts, distractors = everything.take(slice(num_keys)), everything.take(slice(num_keys, None))
    flat, bounds = haystack_units(rng, vocab, haystack, room, distractors)

    depths = DEPTHS[rng.permutation(len(DEPTHS))[:num_keys]]
    if num_keys > len(DEPTHS):
        depths = DEPTHS[rng.integers(0, len(DEPTHS), num_keys)]
    cuts = bounds[(len(bounds) - 1) * np.sort(depths) // 100]
    needles = needle_rows(vocab, facts, separator)
    pieces = [flat[: cuts[0]]]
    for needle, start, end in zip(needles, cuts, [*cuts[1:], len(flat)], strict=True):
        pieces += [needle, flat[start:end]]
    context = np.concatenate(pieces)
    if separator == " ":
        first = vocab.unspaced[int(context[0])]
        context = np.concatenate([vocab.newline, [first], context[1:]])

    asked = facts.take(rng.permutation(num_keys)[:num_queries])
    query = list_of_keys(vocab, asked)
    listed, list_starts = list_of_values(vocab, asked)
    names = ("scratchpad", "answer") if thinking else ("list", "list")
    groups = [GROUP[f"{name}/{haystack}"] if counted else GROUP["short"] for name in names]

    out = Writer()
    out.add(vocab.head, context, vocab.question, query, vocab.question_end, vocab.turn[thinking])
    answer = (vocab.answer[thinking], query, vocab.answer_end)
    if thinking:
        out.add_values(*scratchpad(vocab, asked), group=groups[0])
        out.add(vocab.think_end, *answer, weight=0.5)
    else:
        out.add(*answer)
    out.add_values(listed, list_starts, group=groups[1])
    out.add(vocab.end, weight=1.0)
    return out.finish()


@functools.lru_cache(maxsize=4096)
def ruler_size(vocab: Vocabulary, num_queries: int, thinking: bool) -> int:
    """Tokens of a ruler document without its haystack and needles."""
    listed = 4 * num_queries - 1 + (num_queries > 1)
    values = 5 * num_queries + (num_queries > 1)
    size = len(vocab.head) + len(vocab.question) + len(vocab.question_end)
    size += len(vocab.turn[thinking]) + 2 * listed + values + len(vocab.end)
    size += len(vocab.answer[thinking]) + len(vocab.answer_end)
    return size + (12 * num_queries + len(vocab.think_end) if thinking else 0)


def dense_document(
    rng: np.random.Generator, vocab: Vocabulary, *, length: int, listed: bool
) -> Document:
    """Needles, full or cut short, then questions about them until the length is reached.

    The questions are lists, or scratchpad lines. A needle may be asked for twice or never, so that
    nothing is to be gained by answering with whatever is left.
    """
    short = rng.random() < 0.5
    needle_size = 11 if short else 18
    count = max(2, int(length * rng.uniform(0.3, 0.65)) // needle_size)
    facts = draw_facts(rng, vocab, count)
    out = Writer()
    if short:
        rows = columns(count, facts.keys, vocab.is_, facts.values, vocab.period, vocab.newline)
        out.add(rows.ravel())
    else:
        out.add(needle_rows(vocab, facts, "\n").ravel(), vocab.newline)
    if not listed:
        out.add(vocab.think)
        asked = facts.take(rng.integers(0, count, (length - out.size - 1) // 12))
        start = out.size
        lines, starts = scratchpad(vocab, asked)
        out.add_values(lines, starts, group=GROUP["dense_scratchpad"])
        # Which key comes next nobody can know.
        guesses = (starts[:, None] + np.array([-6, -4])).ravel() + start
        out.weigh(guesses, 0.01)
    overhead = len(vocab.answer[False]) + len(vocab.answer_end) + 4
    while listed and (most := (length - out.size - overhead) // 9) >= 1:
        num_asked = int(min(LIST_SIZES[rng.integers(len(LIST_SIZES))], most, count))
        asked = facts.take(rng.permutation(count)[:num_asked])
        out.add(vocab.answer[False], list_of_keys(vocab, asked), vocab.answer_end)
        out.add_values(*list_of_values(vocab, asked), group=GROUP["dense_list"])
        out.add(vocab.newline, weight=0.1)
    if out.size < length:
        out.add(vocab.end, weight=0.1)
    return out.finish()


def repeat_document(rng: np.random.Generator, vocab: Vocabulary, *, length: int) -> Document:
    """Random tokens, over and over; the loss is on the repeats."""
    size = int(rng.integers(8, length // 2 + 1))
    pools = (np.arange(5, vocab.size, dtype=np.int32), vocab.three_digits, vocab.sentence_tokens)
    pool = pools[rng.integers(len(pools))]
    block = pool[rng.integers(0, len(pool), size)]
    tokens = np.resize(block, length)
    weights = np.where(np.arange(length) < size, 0.001, 0.2).astype(np.float32)
    groups = np.zeros(length, np.int8)
    groups[size : length - 3 : 3] = GROUP["repeat"]
    return Document(tokens=tokens, weights=weights, groups=groups)


def recall_document(rng: np.random.Generator, vocab: Vocabulary, *, length: int) -> Document:
    """Rows of key, gap, value, end, then the same rows in random order, over and over."""
    words = np.arange(5, vocab.size, dtype=np.int32)
    key_size, gap = int(rng.integers(1, 4)), int(rng.integers(0, 11))
    size = key_size + gap + 4
    count = int(rng.integers(2, max(3, min(32, length // (2 * size)) + 1)))
    keys = rng.choice(words, (count, key_size), replace=False)
    if key_size > 1 and rng.random() < 0.5:
        # First and last token only together say which row is meant, as in adjective-noun.
        side = int(np.ceil(np.sqrt(2 * count)))
        some = rng.choice(words, (2, side), replace=False)
        pick = rng.permutation(side * side)[:count]
        keys[:] = keys[0]
        keys[:, 0], keys[:, -1] = some[0, pick // side], some[1, pick % side]
    pool = words if rng.random() < 0.5 else vocab.three_digits
    values = pool[rng.integers(0, len(pool), (count, 3))]
    between, end = words[rng.integers(0, len(words), gap)], words[rng.integers(0, len(words), 1)]
    rows = columns(count, keys, between, values, end)
    num_asked = length // size - count
    orders = [rng.permutation(count) for _ in range(-(-num_asked // count))]
    asked = rows[np.concatenate(orders)[:num_asked]]
    row_weights = np.repeat(np.float32([0.01, 0.1, 0.5, 0.1]), [key_size, gap, 3, 1])
    weights = np.concatenate([np.full(rows.size, 0.001), np.tile(row_weights, num_asked)])
    groups = np.zeros(rows.size + asked.size, np.int8)
    groups[rows.size + key_size + gap :: size] = GROUP["recall"]
    return Document(
        tokens=np.concatenate([rows.ravel(), asked.ravel()]),
        weights=weights.astype(np.float32),
        groups=groups,
    )


def random_document(
    rng: np.random.Generator, vocab: Vocabulary, stage: Stage, length: int
) -> Document:
    """A document of a stage's mix."""
    kind = rng.random()
    if kind < stage.repeat:
        return repeat_document(rng, vocab, length=length)
    if kind < stage.repeat + stage.recall:
        return recall_document(rng, vocab, length=length)
    thinking = bool(rng.random() < 0.5)
    smallest = ruler_size(vocab, 1, thinking) + 18 + 1
    if kind < stage.repeat + stage.recall + stage.dense or length < smallest:
        return dense_document(rng, vocab, length=length, listed=thinking)
    haystack = HAYSTACKS[rng.integers(len(HAYSTACKS))]
    num_keys = num_queries = 4
    if rng.random() >= stage.four_by_four:
        num_keys = int(rng.integers(1, 33))
        num_queries = int(rng.integers(1, rng.integers(1, min(num_keys, 24) + 1) + 1))
    while (size := ruler_size(vocab, num_queries, thinking) + 18 * num_keys + 1) > length:
        num_keys = max(1, num_keys - 1 - (size - length) // 60)
        num_queries = min(num_queries, num_keys)
    return ruler_document(
        rng,
        vocab,
        length=length,
        haystack=haystack,
        thinking=thinking,
        num_keys=num_keys,
        num_queries=num_queries,
        counted=length == stage.width,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of one width; small types, because they cross process borders."""

    tokens: np.ndarray  # [B, T] uint16
    weights: np.ndarray  # [B, T] float16, of predicting this token
    groups: np.ndarray  # [B, T] int8, `GROUPS` index at the first token of each value
    filled: float  # share of tokens that are not padding


def make_batch(vocab: Vocabulary, stage: Stage, *, seed: Sequence[int]) -> Batch:
    """A batch of `batch_tokens // width` rows; the same one for the same arguments."""
    rng = np.random.default_rng(list(seed))
    rows, width = stage.batch_tokens // stage.width, stage.width
    tokens = np.full((rows, width), vocab.pad, np.uint16)
    weights = np.zeros((rows, width), np.float16)
    groups = np.zeros((rows, width), np.int8)
    lengths, shares = zip(*stage.lengths, strict=True)
    chosen = rng.choice(lengths, rows, p=np.array(shares) / sum(shares))
    filled = 0
    for row in range(rows):
        length = int(chosen[row])
        for start in range(0, width, length):
            document = random_document(rng, vocab, stage, length)
            end = start + len(document.tokens)
            tokens[row, start:end] = document.tokens
            weights[row, start:end] = document.weights
            groups[row, start:end] = document.groups
            filled += len(document.tokens)
    return Batch(tokens=tokens, weights=weights, groups=groups, filled=filled / tokens.size)
