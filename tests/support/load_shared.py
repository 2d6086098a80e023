"""One process of several: loads a model split over all of them, and says what it read.

    python tests/support/load_shared.py MODEL OUTPUT MESH...      MESH such as fsdp=2

For each mesh: the logits in OUTPUT/<mesh>-<process>.npy, the model saved again in OUTPUT/<mesh>, a
line of JSON.
"""

import json
import pathlib
import sys

import jax
import numpy as np
from flax import nnx

import swaa_jax as swaa
from swaa_jax import runtime
from swaa_jax.cli.process_args import parse_mesh
from swaa_jax.models import auto
from swaa_jax.train.feed import make_feed
from swaa_jax.train.report import SaveClock

TOKENS = np.arange(48).reshape(4, 12)


class SpyReader(auto.WeightReader):
    """Counts each slice that it hands out by its own size, beside the reader's own count."""

    opened: "SpyReader"

    def __init__(self, *args, **keywords):
        super().__init__(*args, **keywords)
        self.handed_out = 0
        SpyReader.opened = self

    def read(self, *args, **keywords):
        value = super().read(*args, **keywords)
        self.handed_out += value.nbytes
        return value


def main() -> None:
    model_path, output, *meshes = sys.argv[1:]
    assert runtime.initialize_distributed(timeout_s=60)
    auto.WeightReader = SpyReader
    for text in meshes:
        model = swaa.load_model(model_path, dtype="float32", mesh=parse_mesh(text))
        reader = SpyReader.opened
        params = jax.tree.leaves(nnx.state(model, nnx.Param))
        own = sum(shard.data.nbytes for p in params for shard in unique_shards(p))
        logits = runtime.to_host(nnx.jit(lambda model, tokens: model(tokens))(model, TOKENS))
        process = jax.process_index()
        np.save(pathlib.Path(output) / f"{text}-{process}.npy", logits)
        swaa.save_model(model, pathlib.Path(output) / text)
        feed = make_feed(model.mesh, batch_size=4, rows_per_device=2)
        record = {
            "mesh": text,
            "processes": jax.process_count(),
            "bytes_read": reader.bytes_read,
            "handed_out": reader.handed_out,
            "own_bytes": own,
            "all_bytes": sum(p.nbytes for p in params),
            "total": float(feed.total(process + 1)),
            "due": saves(process),
        }
        print(json.dumps(record), flush=True)


def saves(process: int) -> list[bool]:
    """After which of four steps to save, where process 1 alone is late at the first."""
    clock = SaveClock(None, 1e-9 if process else 1e9)
    found = []
    for step in range(1, 5):
        found.append(clock.is_due(step))
        if found[-1]:
            clock.saved()
            clock = SaveClock(None, 1e9)
    return found


def unique_shards(array: jax.Array) -> list[jax.Shard]:
    """The parts that lie here, replicas once."""
    return list({str(shard.index): shard for shard in array.addressable_shards}.values())


if __name__ == "__main__":
    main()
