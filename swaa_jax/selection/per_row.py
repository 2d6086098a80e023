"""Many policies as rows of one program: the mean answer NLL of each, after a single compilation.

A row of the batch is a sample under a candidate, which says for every layer whether it is full; to
the program that is a number, the window of this row in this layer (`RowWindows`)::

    row        sample   full layers     windows of layers 0 1 2 3 (S = 512 is full)
    0          0        none            64   64   64   64
    1          0        1               64   512  64   64
    2          1        none            64   64   64   64
    3          1        1               64   512  64   64

A program of its own for each candidate would be compiled L + 1 times, for minutes each.
"""

import functools
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from swaa_jax.data import Sample
from swaa_jax.infer.likelihoods import losses_at, reading_demand, row_kinds
from swaa_jax.memory import told_when_full
from swaa_jax.models import CausalLM
from swaa_jax.models.config import DecoderConfig
from swaa_jax.models.function import Structure, jit_by_structure, split_model
from swaa_jax.policy import AttentionPolicy, LayerAttention
from swaa_jax.runtime import to_host
from swaa_jax.selection.calibration import SampleGroup, check_numbers, group_samples
from swaa_jax.sharding import RULES

__all__ = ["MEMORY_BUDGET", "RowScorer", "rows_within"]

MEMORY_BUDGET = 2 << 30
"""Bytes of activations that rows may take at once, by default; a rough count."""

_MOST_ROWS = 64


class RowScorer:
    """Scores sets of full layers: all of a batch in one program, one for each width of samples.

    Args:
        model: its own policy does not matter.
        samples: checked ones (`check_samples`).
        policy: window, sinks and decoding of the layers that are not full.
        rows_at_once: rows of a batch; None: as many as `memory_budget` holds.
        memory_budget: bytes.

    Attributes:
        num_compiles: programs that it has had compiled: one for each width of samples, and none
            where another scorer of this process had the same.

    Examples:
        >>> import swaa_jax as swaa
        >>> from swaa_jax.selection import read_calibration
        >>> model, tok = swaa.load_model("tiny-retriever"), swaa.load_tokenizer("tiny-retriever")
        >>> samples = read_calibration([{"prompt": "1 + 1?", "response": "</think>2"}], tok)
        >>> scorer = RowScorer(model, samples, policy=AttentionPolicy(window=4), rows_at_once=8)
        >>> scorer.num_layers, scorer.candidates_at_once()  # for scorer([(), (1, 3), ...])
        (8, 8)
    """

    def __init__(
        self,
        model: CausalLM,
        samples: Sequence[Sample],
        *,
        policy: AttentionPolicy,
        rows_at_once: int | None = None,
        memory_budget: int = MEMORY_BUDGET,
    ):
        if rows_at_once is not None and rows_at_once < 1:
            raise ValueError(f"rows_at_once: expected at least 1, got {rows_at_once}")
        # Under one policy whatever the model's is, so that its program is one, too.
        self._split = split_model(model.with_policy(AttentionPolicy()))
        self._mesh = model.mesh
        self._groups = group_samples(samples, context=model.config.max_position_embeddings)
        self._policy, self._rows_at_once = policy, rows_at_once
        self._memory_budget = memory_budget
        self.num_layers = model.config.num_layers
        self.num_samples = len(samples)
        self._layers = policy.resolve(self.num_layers)
        self.num_compiles = 0

    def __call__(
        self, candidates: Sequence[Sequence[int]]
    ) -> Float[np.ndarray, "candidates samples"]:
        """The mean NLL of each sample's answer tokens, by candidate: its full layers.

        Raises:
            ValueError: a layer that the model does not have.
        """
        for layers in candidates:
            if any(not 0 <= layer < self.num_layers for layer in layers):
                raise ValueError(
                    f"candidates: expected layers of 0 to {self.num_layers - 1}, got {layers}"
                )
        found = np.full((len(candidates), self.num_samples), np.nan, np.float64)
        before = _row_losses.num_compiled(self._split.structure)
        for group in self._groups:
            self._score_group(group, candidates, found)
        self.num_compiles += _row_losses.num_compiled(self._split.structure) - before
        return found

    def of_policy(self, policy: AttentionPolicy) -> Float[np.ndarray, " samples"]:
        """The mean NLL of each sample's answer tokens under any policy, in a program of its own."""
        layers = policy.resolve(self.num_layers, num_kv_heads=self._split.config.num_kv_heads)
        found = np.full(self.num_samples, np.nan, np.float64)
        for group in self._groups:
            count = self._num_rows(group)
            for start in range(0, len(group.numbers), count):
                part = list(range(start, min(start + count, len(group.numbers))))
                rows = group.rows(part + [-1] * (count - len(part)))
                losses = self._losses(None, rows, layers, real=len(part))
                found[[group.numbers[row] for row in part]] = losses
        return found

    def candidates_at_once(self) -> int:
        """Candidates that fill the batches of the widest samples."""
        widest = self._groups[-1]
        return max(1, self._num_rows(widest) // len(widest.numbers))

    def _num_rows(self, group: SampleGroup) -> int:
        rows = self._rows_at_once
        if rows is None:
            rows = rows_within(self._memory_budget, config=self._split.config, width=group.width)
            # A method's first look is at about so many; further rows would be padding.
            rows = min(rows, len(group.numbers) * (self.num_layers + 1))
        parts = 1
        if self._mesh is not None:
            parts = math.prod(self._mesh.shape.get(name, 1) for name in RULES["batch"])
        return -(-rows // parts) * parts

    def _score_group(
        self, group: SampleGroup, candidates: Sequence[Sequence[int]], found: np.ndarray
    ) -> None:
        count = self._num_rows(group)
        work = [(c, s) for c in range(len(candidates)) for s in range(len(group.numbers))]
        for start in range(0, len(work), count):
            part = work[start : start + count]
            rows = [sample for _, sample in part] + [-1] * (count - len(part))
            windows = np.full((self.num_layers, count), group.width, np.int32)
            for row, (candidate, _) in enumerate(part):
                windowed = np.isin(np.arange(self.num_layers), candidates[candidate], invert=True)
                windows[windowed, row] = min(self._policy.window or group.width, group.width)
            losses = self._losses(windows, group.rows(rows), self._layers, real=len(part))
            for loss, (candidate, sample) in zip(losses, part, strict=True):
                found[candidate, group.numbers[sample]] = loss

    def _losses(
        self,
        windows_LR: np.ndarray | None,
        rows: dict[str, np.ndarray],
        layers: tuple[LayerAttention, ...],
        *,
        real: int,
    ) -> np.ndarray:
        """Of the first `real` rows; the others fill the batch."""
        count, width = rows["tokens"].shape
        options = {"row_option": "rows_at_once", "token_option": "max_length"}
        with told_when_full(
            lambda: reading_demand(self._split, rows=count, tokens=width, **options)
        ):
            losses = to_host(
                _row_losses(
                    self._split.arrays,
                    windows_LR,
                    rows,
                    structure=self._split.structure,
                    layers=layers,
                )
            )
        losses = losses[:real]
        check_numbers("answer NLL", losses)
        return losses


def rows_within(budget: int, *, config: DecoderConfig, width: int) -> int:
    """Rows of that width whose activations fit, roughly: at least 1, at most 64.

    Counted are residual stream, queries, keys and values with their copies, and the inner
    activations of the feed-forward block, in float32.
    """
    heads = (config.num_heads + config.num_kv_heads) * config.head_dim
    row = 4 * width * (6 * config.hidden_size + 3 * heads + 2 * config.intermediate_size)
    return max(1, min(_MOST_ROWS, budget // row))


@functools.partial(jit_by_structure, static_argnames=("layers",))
def _row_losses(
    arrays: dict[str, Array],
    windows_LR: Int[Array, "L R"] | None,
    rows: dict[str, Array],
    *,
    structure: Structure[CausalLM],
    layers: tuple[LayerAttention, ...],
) -> Float[Array, " R"]:
    """The mean NLL of every row's targets; without windows all rows are under `layers`."""
    each = losses_at(
        structure.build(arrays),
        rows["tokens"],
        lengths=rows["lengths"],
        stage_ids=rows["stage_ids"],
        at=rows["at"],
        targets=rows["targets"],
        layers=layers if windows_LR is None else row_kinds(layers, windows_LR),
    )
    return jnp.sum(each.nll * rows["weights"], axis=1)
