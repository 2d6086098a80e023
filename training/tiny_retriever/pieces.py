"""The needle task's pieces as arrays of token ids, and how they are put together."""

import dataclasses
import itertools
import pathlib
import random
import sys
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from swaa_jax.eval.tasks.ruler import text  # noqa: E402
from swaa_jax.eval.tasks.ruler.essay import essay_sentence  # noqa: E402
from swaa_jax.eval.tasks.ruler.words import ADJECTIVES, NOUNS  # noqa: E402

TOKENIZER = ROOT / "swaa_jax" / "assets" / "tiny-retriever" / "tokenizer.json"
NUM_SENTENCES = 20_000  # in the pool that essays are drawn from
MAX_TAIL = 64  # tokens of noise sentences that may fill up a haystack


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """Token ids with what each is worth in the loss and what it is counted under."""

    tokens: np.ndarray  # [n] int32
    weights: np.ndarray  # [n] float32, of predicting this token
    groups: np.ndarray  # [n] int8, at the first token of a value


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
