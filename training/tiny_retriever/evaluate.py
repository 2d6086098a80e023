"""Scores a model on the needle task under full attention, as it answers by itself.

    python training/tiny_retriever/evaluate.py --lengths 512 1024 --samples 16

Prints, for each prompt length, mode and haystack, the mean fraction of values found and the share
of samples with all of them. `swaa demo` compares attention policies; this is about the model.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import swaa_jax
from swaa_jax.eval.judging import string_match_all, strip_thinking
from swaa_jax.eval.tasks.ruler import HAYSTACKS, niah_multiquery
from training.tiny_retriever.config import ASSETS


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=str(ASSETS), help="a directory in Hugging Face layout")
    add("--lengths", type=int, nargs="+", default=[1024], help="tokens of the prompts")
    add("--samples", type=int, default=16, help="of each length, mode and haystack")
    add("--batch-size", type=int, default=8)
    add("--dtype", default="float32")
    add("--seed", type=int, default=42)
    arguments = parser.parse_args()

    model = swaa_jax.load_model(
        arguments.model, policy=swaa_jax.AttentionPolicy(), dtype=arguments.dtype
    )
    tokenizer = swaa_jax.load_tokenizer(arguments.model)
    print(f"{'length':>6} {'mode':<12} {'haystack':<8} {'found':>6} {'all':>6}")
    for length in arguments.lengths:
        for thinking in (False, True):
            for haystack in HAYSTACKS:
                samples = niah_multiquery(
                    tokenizer,
                    num_samples=arguments.samples,
                    target_length=length,
                    seed=arguments.seed,
                    haystack=haystack,
                    enable_thinking=thinking,
                )
                generated = swaa_jax.generate(
                    model,
                    tokenizer,
                    [list(sample.prompt_ids) for sample in samples],
                    max_new_tokens=128,  # as in RULER
                    batch_size=arguments.batch_size,
                )
                scores = [
                    string_match_all(strip_thinking(text, thinking=thinking).text, sample.answers)
                    for text, sample in zip(generated.texts, samples, strict=True)
                ]
                mode = "thinking" if thinking else "non-thinking"
                found, complete = sum(scores), sum(score == 1 for score in scores)
                print(
                    f"{length:>6} {mode:<12} {haystack:<8} "
                    f"{found / len(scores):6.1%} {complete / len(scores):6.1%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
