"""Training data for tiny-retriever, assembled from token pieces in numpy.

A batch is rows of one width; a row is documents of equal length back to back. Kinds of document:

* ruler: the needle task exactly as `swaa_jax.eval.ruler` words it, answer included, thinking or
not;
* dense: needles and nothing else, then every one of them asked for: a scratchpad's lines, or a
list;
* recall: a table of random keys and values, then its rows again in random order; what stands
  between key and value is the same in every row, so the key itself must be carried over it;
* repeat: random tokens, over and over.

Retrieval forms on the latter three: they ask for something at nearly every token. A batch depends
on (seed, stage, index) alone, so any number of worker processes gives the same run.
"""

import dataclasses
import functools
import itertools
import multiprocessing
import pathlib
import queue
import random
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from swaa_jax.eval.ruler import HAYSTACKS, text  # noqa: E402
from swaa_jax.eval.ruler.essay import essay_sentence  # noqa: E402
from swaa_jax.eval.ruler.words import ADJECTIVES, NOUNS  # noqa: E402

TOKENIZER = ROOT / "swaa_jax" / "assets" / "tiny-retriever" / "tokenizer.json"
NUM_SENTENCES = 20_000  # in the pool that essays are drawn from
MAX_TAIL = 64  # tokens of noise sentences that may fill up a haystack

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """Token ids with what each is worth in the loss and what it is counted under."""

    tokens: np.ndarray  # [n] int32
    weights: np.ndarray  # [n] float32, of predicting this token
    groups: np.ndarray  # [n] int8, at the first token of a value


class Vocabulary:
    """The tokenizer's pieces as arrays."""

    def __init__(self, path: pathlib.Path = TOKENIZER, num_sentences: int = NUM_SENTENCES):
        self._tokenizer = Tokenizer.from_file(str(path))
        encode = self.encode
        self.size = self._tokenizer.get_vocab_size()
        self.pad = int(encode("<|endoftext|>")[0])
        self.adjectives = np.concatenate([encode(f" {word}") for word in ADJECTIVES])
        self.nouns = np.concatenate([encode(word) for word in NOUNS])
        self.three_digits = np.concatenate([encode(f"{n:03d}") for n in range(1000)])
        self.one_digit = np.concatenate([encode(str(n)) for n in range(10)])
        self.hyphen, self.comma, self.and_, self.space, self.period, self.newline = (
            encode(piece) for piece in ("-", ",", " and", " ", ".", "\n")
        )
        self.is_ = encode(" is: ")

        head, tail = text.NEEDLE.split("{key}")[0].rstrip(), text.NEEDLE.split("{value}")[1]
        self.needle = {"\n": encode("\n" + head), " ": encode(" " + head)}
        assert tail == "."
        # The head's own line break is the separator of what follows, so it is not in it.
        self.head = encode("<|im_start|>user\n" + text.PROMPT_HEAD)[:-1]
        before, after = text.PROMPT_TAIL.split(" {query}")
        self.question, self.question_end = encode(before), encode(after)
        turn = "<|im_end|>\n<|im_start|>assistant\n<think>\n"
        self.turn = {True: encode(turn), False: encode(turn + "\n</think>\n\n")}
        self.think = encode("<think>\n")
        self.think_end = encode("</think>\n\n")
        before, after = text.ANSWER_PREFIX.split(" {query}")
        self.answer = {True: encode(before.lstrip()), False: encode(before)}
        self.answer_end = encode(after)
        self.end = encode("<|im_end|>")

        # An essay's sentence after a space, and how its first word reads after a line break.
        rng = random.Random(20_000)
        sentences = sorted({" " + essay_sentence(rng) for _ in range(num_sentences)})
        pieces = [np.array(e.ids, np.int32) for e in self._tokenizer.encode_batch(sentences)]
        self.sentence_lengths = np.array([len(piece) for piece in pieces])
        self.sentence_starts = np.cumsum(self.sentence_lengths) - self.sentence_lengths
        self.sentence_tokens = np.concatenate(pieces)
        self.sentences_of_length = [
            np.flatnonzero(self.sentence_lengths == n) for n in range(MAX_TAIL)
        ]
        firsts = {sentence.split()[0] for sentence in sentences} | {"One"}
        firsts |= {sentence.split()[0] for sentence in text.NOISE_SENTENCES}
        self.unspaced = {int(encode(f" {w}")[0]): int(encode(w)[0]) for w in sorted(firsts)}
        self.noise = encode("\n" + " ".join(text.NOISE_SENTENCES))
        self.tails = {separator: self._tails(separator) for separator in ("\n", " ")}

    def encode(self, piece: str) -> np.ndarray:
        """Token ids of a piece of text."""
        return np.array(self._tokenizer.encode(piece, add_special_tokens=False).ids, np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        return self._tokenizer.decode([int(t) for t in tokens], skip_special_tokens=False)

    def _tails(self, separator: str) -> list[np.ndarray]:
        """For each number of tokens, the noise sentences that come nearest to it from below."""
        exact: dict[int, np.ndarray] = {0: np.zeros(0, np.int32)}
        sentences = text.NOISE_SENTENCES * 3
        for count in range(1, len(sentences) + 1):
            for skipped in range(len(text.NOISE_SENTENCES)):
                chosen = sentences[skipped : skipped + count]
                piece = self.encode(separator + " ".join(chosen))
                exact.setdefault(len(piece), piece)
        for first, second in itertools.product(text.NOISE_SENTENCES, repeat=2):
            piece = self.encode(separator + f"{first} {second}")
            exact.setdefault(len(piece), piece)
        return [exact[max(n for n in exact if n <= size)] for size in range(MAX_TAIL)]


def columns(count: int, *parts: np.ndarray) -> np.ndarray:
    """Rows `[count, sum]` of parts side by side: `[k]` parts repeat, `[count, k]` parts vary."""
    sizes = [part.shape[-1] for part in parts]
    out = np.empty((count, sum(sizes)), np.int32)
    start = 0
    for part, size in zip(parts, sizes, strict=True):
        out[:, start : start + size] = part
        start += size
    return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """Distinct keys and values as token columns."""

    keys: np.ndarray  # [n, 3]: adjective, hyphen, noun
    values: np.ndarray  # [n, 3]: three digits, three digits, one digit

    def take(self, rows: np.ndarray | slice) -> "Facts":
        """Some of them, in that order."""
        return Facts(keys=self.keys[rows], values=self.values[rows])

    def __len__(self) -> int:
        return len(self.keys)


def draw_facts(rng: np.random.Generator, vocab: Vocabulary, count: int) -> Facts:
    """`count` keys and values, distinct each.

    One draw in four is hard: keys that share adjectives and nouns, and values that share their
    first digits, so that no part of them will do alone.
    """
    hard = rng.random() < 0.25
    if hard:
        side = int(np.ceil(np.sqrt(2 * count)))
        some_adjectives = rng.choice(len(ADJECTIVES), min(side, 200), replace=False)
        some_nouns = rng.choice(len(NOUNS), min(side, 200), replace=False)
        pick = rng.permutation(len(some_adjectives) * len(some_nouns))[:count]
        adjectives = some_adjectives[pick // len(some_nouns)]
        nouns = some_nouns[pick % len(some_nouns)]
        heads = rng.integers(100, 1000, max(2, count // 3))
        values = heads[rng.integers(0, len(heads), count)] * 10_000
        values += rng.choice(10_000, count, replace=False)
    else:
        pick = rng.choice(len(ADJECTIVES) * len(NOUNS), count, replace=False)
        adjectives, nouns = pick // len(NOUNS), pick % len(NOUNS)
        values = 1_000_000 + rng.choice(9_000_000, count, replace=False)
    keys = columns(
        count, vocab.adjectives[adjectives][:, None], vocab.hyphen, vocab.nouns[nouns][:, None]
    )
    digits = (
        vocab.three_digits[values // 10_000],
        vocab.three_digits[values // 10 % 1000],
        vocab.one_digit[values % 10],
    )
    return Facts(keys=keys, values=np.stack(digits, axis=1))


class Writer:
    """Collects pieces with their weights and groups."""

    def __init__(self) -> None:
        self._pieces: list[np.ndarray] = []
        self._spans: list[tuple[int, int, float]] = []
        self._marks: list[tuple[np.ndarray, int]] = []
        self.size = 0

    def add(self, *pieces: np.ndarray, weight: float = 0.0) -> None:
        """Appends pieces; `weight` 0 leaves them to the language-model weight."""
        start = self.size
        for piece in pieces:
            self._pieces.append(piece)
            self.size += len(piece)
        if weight:
            self._spans.append((start, self.size, weight))

    def add_values(
        self, piece: np.ndarray, starts: np.ndarray, *, group: int, weight: float = 1.0
    ) -> None:
        """Appends a piece in which values begin at `starts`."""
        self._marks.append((starts + self.size, group))
        self.add(piece, weight=weight)

    def weigh(self, positions: np.ndarray, weight: float) -> None:
        """Sets the weight of single positions after all spans."""
        self._spans.append((positions, None, weight))

    def finish(self, *, background: float = 0.1) -> Document:
        """The document; everything unweighted shares `background` of the weighted sum."""
        tokens = np.concatenate(self._pieces)
        weights = np.zeros(len(tokens), np.float32)
        for start, end, weight in self._spans:
            if end is None:
                weights[start] = weight
            else:
                weights[start:end] = weight
        rest = weights == 0
        count = int(rest.sum())
        if count:
            weights[rest] = min(0.05, background * float(weights.sum()) / count)
        groups = np.zeros(len(tokens), np.int8)
        for positions, group in self._marks:
            groups[positions] = group
        return Document(tokens=tokens, weights=weights, groups=groups)


def list_of_keys(vocab: Vocabulary, facts: Facts) -> np.ndarray:
    """Tokens of ` a, b, and c`."""
    flat = columns(len(facts), facts.keys, vocab.comma).ravel()
    if len(facts) == 1:
        return flat[:-1]
    return np.concatenate([flat[:-4], vocab.and_, flat[-4:-1]])


def list_of_values(vocab: Vocabulary, facts: Facts) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of ` 1, 2, and 3.`, and where each value begins."""
    flat = columns(len(facts), vocab.space, facts.values, vocab.comma).ravel()
    starts = np.arange(len(facts)) * 5 + 1
    if len(facts) == 1:
        return np.concatenate([flat[:-1], vocab.period]), starts
    starts[-1] += 1
    return np.concatenate([flat[:-5], vocab.and_, flat[-5:-1], vocab.period]), starts


def scratchpad(vocab: Vocabulary, facts: Facts) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of lines `- key is: value.`, and where each value begins."""
    rows = columns(
        len(facts), vocab.hyphen, facts.keys, vocab.is_, facts.values, vocab.period, vocab.newline
    )
    return rows.ravel(), np.arange(len(facts)) * rows.shape[1] + 7


def needle_rows(vocab: Vocabulary, facts: Facts, separator: str) -> np.ndarray:
    """Tokens `[n, 18 or 17]` of needles, each with its separator before it."""
    return columns(
        len(facts), vocab.needle[separator], facts.keys, vocab.is_, facts.values, vocab.period
    )


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


class Loader:
    """Batches from worker processes, in an order that does not depend on their number.

    Use as a context manager; `set_stage` says which stage the next batch is of.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        seed: int,
        num_workers: int,
        depth: int = 4,
    ):
        self._stages, self._seed = tuple(stages), seed
        self._stage, self._index = 0, 0
        context = multiprocessing.get_context("spawn")
        self._orders = [context.Queue() for _ in range(num_workers)]
        self._batches = [context.Queue(depth) for _ in range(num_workers)]
        self._workers = [
            context.Process(
                target=_work,
                args=(self._stages, seed, rank, num_workers, orders, batches),
                daemon=True,
            )
            for rank, (orders, batches) in enumerate(zip(self._orders, self._batches, strict=True))
        ]
        self._vocab = None if num_workers else Vocabulary()

    def __enter__(self) -> "Loader":
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.terminate()

    def set_stage(self, stage: int, index: int) -> None:
        """The next batch is batch `index` of stage `stage`."""
        self._stage, self._index = stage, index
        for orders in self._orders:
            orders.put((stage, index))

    def __next__(self) -> Batch:
        stage, index = self._stage, self._index
        self._index += 1
        if self._vocab is not None:
            return make_batch(
                self._vocab,
                self._stages[stage],
                seed=(self._seed, stage, index),
            )
        batches = self._batches[index % len(self._workers)]
        while True:
            made_for, batch = batches.get(timeout=120)
            if made_for == (stage, index):
                return batch

    def __iter__(self) -> Iterator[Batch]:
        return self


def _work(
    stages: tuple[Stage, ...],
    seed: int,
    rank: int,
    num_workers: int,
    orders: "multiprocessing.Queue[tuple[int, int]]",
    batches: "multiprocessing.Queue[tuple[tuple[int, int], Batch]]",
) -> None:
    vocab = Vocabulary()
    stage, index = orders.get()
    index += (rank - index) % num_workers
    while True:
        try:
            while True:
                stage, index = orders.get_nowait()
                index += (rank - index) % num_workers
        except queue.Empty:
            pass
        made = make_batch(vocab, stages[stage], seed=(seed, stage, index))
        batches.put(((stage, index), made))
        index += num_workers
