"""Prints how fast one process makes data, stage by stage.

python training/tiny_retriever/measure_data.py
"""

import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from training.tiny_retriever.config import STAGES
from training.tiny_retriever.data import make_batch
from training.tiny_retriever.pieces import Vocabulary


def main(num_batches: int = 10) -> None:
    """Tokens a second and padding of each stage."""
    vocab = Vocabulary()
    for number, stage in enumerate(STAGES):
        started = time.perf_counter()
        batches = [make_batch(vocab, stage, seed=(0, number, i)) for i in range(num_batches)]
        rate = num_batches * stage.batch_tokens / (time.perf_counter() - started)
        padding = 1 - sum(batch.filled for batch in batches) / num_batches
        print(
            f"stage {number} T {stage.width:>4}: {rate / 1e6:.2f}M tokens/s, padding {padding:.1%}"
        )


if __name__ == "__main__":
    main()
