"""Builds tiny-retriever's tokenizer: byte-level BPE whose vocabulary is the needle task's own
words.

A pre-token that is in the vocabulary is one token (`ignore_merges`, as in Llama 3), so every word
of a key, every word of the generated essays and every number of one to three digits is one token;
anything else falls back to a few merges and then to bytes, so that any text encodes.

    python training/tiny_retriever/build_tokenizer.py [OUTPUT_DIRECTORY]
"""

import argparse
import collections
import json
import pathlib
import random
import sys

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from swaa_jax.eval.tasks.ruler import text  # noqa: E402
from swaa_jax.eval.tasks.ruler.essay import essay_sentence  # noqa: E402
from swaa_jax.eval.tasks.ruler.words import ADJECTIVES, NOUNS  # noqa: E402

DEFAULT_OUTPUT = ROOT / "swaa_jax" / "assets" / "tiny-retriever"
VOCAB_SIZE = 2304
NUM_SENTENCES = 40_000  # enough for every word of the grammar to occur at each place where it can
SEED = 0

# Words with the space before them, numbers in groups of three from the left, punctuation apart from
# words (a key reads [ adjective][-][noun]), line breaks apart from what follows.
SPLIT = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"

# <think> is text to a reader, so it survives skip_special_tokens, as in Qwen3.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXT_TOKENS = ("<think>", "</think>")

MAX_LENGTH = 8192

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
"""Qwen3's, without tools; after `enable_thinking=False` the thinking is there and empty."""


def corpus() -> list[str]:
    """Everything that the model reads or writes, in the shapes in which it does."""
    rng = random.Random(SEED)
    lines = [essay_sentence(rng) for _ in range(NUM_SENTENCES)]
    lines += [" " + line for line in lines]
    keys = [f"{a}-{n}" for a, n in zip(ADJECTIVES, NOUNS, strict=True)]
    lines += [f" {key}," for key in keys] * 10
    for sentence in (*text.NOISE_SENTENCES, text.NEEDLE.format(key=keys[0], value="")):
        lines += [sentence, " " + sentence] * 10
    query = text.join_list(keys[:3])
    lines += [text.PROMPT_HEAD, text.PROMPT_TAIL.format(query=query)] * 10
    lines += [text.ANSWER_PREFIX.format(query=query) + " 1, 2, and 3."] * 10
    lines += [text.ANSWER_PREFIX.format(query=query)[1:]] * 10
    lines += ["user\n", "assistant\n", "system\n", "\n\n", f"- {keys[0]} is: 1.\n"] * 10
    return lines


def build() -> Tokenizer:
    """The tokenizer; the same one on every run."""
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])

    lines = corpus()
    words: collections.Counter[str] = collections.Counter()
    for line in lines:
        words.update(piece for piece, _ in pre_tokenizer.pre_tokenize_str(line))
    numbers = [str(n) for n in range(10)]
    numbers += [f"{n:02d}" for n in range(100)] + [f"{n:03d}" for n in range(1000)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())

    vocab = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *TEXT_TOKENS))}
    for token in (*alphabet, *numbers, *sorted(words, key=lambda word: (-words[word], word))):
        vocab.setdefault(token, len(vocab))
    if len(vocab) > VOCAB_SIZE:
        raise SystemExit(f"{len(vocab)} tokens are needed; VOCAB_SIZE is {VOCAB_SIZE}: raise it")

    # The rest of the room goes to merges, learned on the same corpus, for words from elsewhere.
    merges: list[tuple[str, str]] = []
    for left, right in _learn_merges(lines, pre_tokenizer, alphabet):
        if left + right not in vocab and len(vocab) == VOCAB_SIZE:
            break
        vocab.setdefault(left + right, len(vocab))
        merges.append((left, right))

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in TEXT_TOKENS])
    return tokenizer


def _learn_merges(
    lines: list[str], pre_tokenizer: pre_tokenizers.PreTokenizer, alphabet: list[str]
) -> list[tuple[str, str]]:
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizer
    learner.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False, min_frequency=1
        ),
    )
    return [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]


def tokenizer_config() -> dict[str, object]:
    """What AutoTokenizer reads beside tokenizer.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_LENGTH,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }


def main() -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", nargs="?", type=pathlib.Path, default=DEFAULT_OUTPUT)
    output: pathlib.Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = build()
    # Without indentation the file is half the size; it ships in the wheel.
    (output / "tokenizer.json").write_text(
        json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
        + "\n",
        encoding="utf-8",
    )
    config = json.dumps(tokenizer_config(), indent=2)
    (output / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
    (output / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    print(f"{tokenizer.get_vocab_size()} tokens written to {output}")


if __name__ == "__main__":
    main()
