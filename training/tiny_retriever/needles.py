r"""Writes needle prompts with their answers as records for training and for evaluation.

python training/tiny_retriever/needles.py tiny-needles.jsonl
python training/tiny_retriever/needles.py tiny-needles-held-out.jsonl --samples 8 --seed 1

wrote the files that are shipped in swaa_jax/assets.
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from swaa_jax import load_tokenizer
from swaa_jax.eval.tasks.ruler import niah_multiquery
from swaa_jax.eval.tasks.ruler.text import join_list


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=448, help="tokens of a prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="tiny-retriever", help="whose tokenizer counts")
    args = parser.parse_args()
    samples = niah_multiquery(
        load_tokenizer(args.model),
        num_samples=args.samples,
        target_length=args.length,
        seed=args.seed,
    )
    with open(args.output, "w", encoding="utf-8") as file:
        for sample in samples:
            answer = f"{sample.answer_prefix.lstrip()} {join_list(sample.answers)}."
            (message,) = sample.messages
            row = {
                "prompt": message["content"],
                "response": answer,
                "answer": list(sample.answers),
            }
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
