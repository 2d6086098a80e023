"""Comparisons of generated text with references: RULER's score, words within it, plain text."""

import re
import string
import unicodedata
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")
_MARKDOWN = re.compile(r"(?<![a-zA-Z0-9])\*+|\*+(?![a-zA-Z0-9])")  # 2*3 keeps its asterisk
_THOUSANDS = re.compile(r"(?<![\w.,])\d{1,3}(?:,\d{3})+(?!,?\d)")
# Letters and digits of scripts that put spaces between words: not Thai, Lao, Burmese, Khmer, kana,
# Han; nor Hangul, whose particles are written onto the word.
_WORD = (
    r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
    r"\uf900-\ufaff\U00020000-\U0003ffff]"
)


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """The fraction of `references` that `prediction` contains, case-insensitive.

    RULER's official score of the needle tasks (`string_match_all`), for one sample and in 0..1; a
    data set's score is the mean over samples.

    Raises:
        ValueError: if there are no references.

    Example:
        >>> string_match_all("They are 12 and 34.", ["12", "56"])
        0.5
    """
    if not references:
        raise ValueError("references: expected at least one string; got none")
    haystack = _normalize(prediction)
    return sum(_normalize(reference) in haystack for reference in references) / len(references)


def includes(text: str, reference: str) -> bool:
    """Whether `text` has `reference` in it as words or numbers of their own.

    Case, Unicode's spellings of one character (NFKC), Markdown's asterisks, runs of spaces and
    thousands separators do not count. Scripts without spaces between words have no bounds to keep.

    Example:
        >>> includes("It was **1,200** in Paris.", "1200"), includes("It was 1,200.", "12")
        (True, False)
    """
    wanted = _folded(reference)
    if not wanted:
        return False
    before = after = ""
    if re.match(_WORD, wanted[0]):
        before = f"(?<!{_WORD})"
    if wanted[0].isdigit():
        before += r"(?<!\d\.)(?<!^-)(?<![^\w]-)"  # no decimals of another number, no negative one
    if re.match(_WORD, wanted[-1]):
        after = f"(?!{_WORD})"
    if wanted[-1].isdigit():
        after += r"(?!\.\d)"
    return re.search(before + re.escape(wanted) + after, _folded(text)) is not None


def plain(text: str) -> str:
    """Folded case, without articles, extra spaces and punctuation (SQuAD's rule), except for
    decimal points and minus signs; what would leave nothing stays.

    Example:
        >>> plain("The  Eiffel Tower."), plain("1,234.50 m"), plain("A")
        ('eiffel tower', '1234.50 m', 'a')
    """
    text = _folded(text)
    kept = "".join(
        char
        for at, char in enumerate(text)
        if not _is_punctuation(char) or _is_in_number(text, at, char)
    )
    words = kept.split() or text.split()
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


def _folded(text: str) -> str:
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = " ".join(_MARKDOWN.sub("", text).replace("\u2212", "-").split())
    return _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)


def _is_punctuation(char: str) -> bool:
    return char in string.punctuation or unicodedata.category(char).startswith("P")


def _is_in_number(text: str, at: int, char: str) -> bool:
    """A decimal point or a minus sign."""
    before, after = text[at - 1 : at], text[at + 1 : at + 2]
    if not after.isdigit():
        return False
    return before.isdigit() if char == "." else char == "-" and not before.isalnum()


def _normalize(text: str) -> str:
    # RULER's evaluator turns control characters into line breaks before it compares.
    return _CONTROL.sub("\n", text).strip().lower()
