"""What a generation cost."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds, tokens and bytes of one batch, or the sum over batches run one after another.

    Compilation is never inside the other times: every program is compiled before the call that is
    timed, and the time for that is `compile_s`. A time ends when the result is on the host. The
    first run of a program still sets up and loads what it needs; `warmup=True` takes that out, by
    running each program once beforehand.

    Args:
        num_batches: batches run.
        num_rows: prompts answered.
        prompt_tokens: real prompt tokens, padding not counted.
        new_tokens: tokens returned.
        prefill_s: prompt to next-token logits and caches, all batches.
        first_token_s: drawing the first token from those logits and fetching it, all batches.
        decode_s: the tokens after the first, all batches.
        decode_steps: decode calls of one token a row, all batches.
        compile_s: tracing and compiling, 0 where the programs existed.
        cache_bytes: key/value caches as allocated (padded rows and slots included), of the
            largest batch.
        cache_bytes_per_row: the same of one row.
    """

    num_batches: int = 1
    num_rows: int
    prompt_tokens: int
    new_tokens: int
    prefill_s: float
    first_token_s: float
    decode_s: float
    decode_steps: int
    compile_s: float
    cache_bytes: int
    cache_bytes_per_row: int

    @property
    def prefill_tokens_per_second(self) -> float:
        """Real prompt tokens processed a second."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def time_to_first_token_s(self) -> float:
        """Seconds from a batch's start to its first tokens, the mean over batches."""
        return (self.prefill_s + self.first_token_s) / self.num_batches

    @property
    def time_per_output_token_s(self) -> float | None:
        """Seconds a decode step takes; every row gains a token a step. None without a step."""
        return self.decode_s / self.decode_steps if self.decode_steps else None

    @classmethod
    def total(cls, parts: Sequence["Timings"]) -> "Timings":
        """The total of batches run one after another: sums, and the largest cache."""
        if not parts:
            raise ValueError("parts: expected the timings of at least one batch, got none")
        summed = {
            field.name: sum(getattr(part, field.name) for part in parts)
            for field in dataclasses.fields(cls)
            if not field.name.startswith("cache_bytes")
        }
        return cls(
            **summed,
            cache_bytes=max(part.cache_bytes for part in parts),
            cache_bytes_per_row=max(part.cache_bytes_per_row for part in parts),
        )

    def to_dict(self) -> dict[str, float | None]:
        """Fields and derived rates, for JSON."""
        return dataclasses.asdict(self) | {
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "time_to_first_token_s": self.time_to_first_token_s,
            "time_per_output_token_s": self.time_per_output_token_s,
        }

    def __str__(self) -> str:
        per_token = self.time_per_output_token_s
        parts = [
            f"prefill {self.prompt_tokens} tokens at {self.prefill_tokens_per_second:,.0f}/s",
            f"first token after {self.time_to_first_token_s * 1e3:,.1f} ms",
            f"{self.new_tokens} new tokens",
        ]
        if per_token is not None:
            parts.append(f"{per_token * 1e3:,.2f} ms per token")
        parts.append(f"KV cache {self.cache_bytes / 2**20:,.2f} MiB")
        parts.append(f"compiled in {self.compile_s:,.1f} s")
        return ", ".join(parts)
