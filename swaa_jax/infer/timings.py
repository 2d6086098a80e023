"""What a generation cost."""

import dataclasses
from collections.abc import Sequence

from swaa_jax.tables import Table, Tabular


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timings(Tabular):
    """Seconds, tokens and bytes of prompts answered together, or the sum over several such sets.

    Compilation is never inside the other times: every program is compiled before the call that is
    timed, and the time for that is `compile_s`. A time ends when the result is on the host. The
    first run of a program still sets up and loads what it needs; `warmup=True` takes that out, by
    running each program once beforehand.

    Args:
        num_batches: whose first tokens came together: prompts are read one by one, so as many as
            rows; batches, in results that were stored before that.
        num_rows: prompts answered.
        prompt_tokens: real prompt tokens, padding not counted.
        new_tokens: tokens returned.
        reused_tokens: of the prompts', which had been read before and were not read anew.
        prefill_s: seconds of reading all prompts; the others that end in `_s` are seconds, too.
        first_token_s: drawing first tokens, where stored results have it apart; else 0.
        decode_s: drawing tokens.
        decode_steps: of one token a row.
        compile_s: tracing and compiling, 0 where the programs existed.
        cache_bytes: key/value caches as allocated, of all slots; of the largest set.
        cache_bytes_per_row: the same of one row.

    Examples:
        >>> timings = Timings(
        ...     num_rows=2, prompt_tokens=600, new_tokens=40, prefill_s=0.5, first_token_s=0.0,
        ...     decode_s=0.4, decode_steps=20, compile_s=3.0, cache_bytes=1 << 21,
        ...     cache_bytes_per_row=1 << 20,
        ... )
        >>> timings.prefill_tokens_per_second, timings.time_per_output_token_s
        (1200.0, 0.02)
        >>> Timings.total([timings, timings]).new_tokens
        80
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
    reused_tokens: int = 0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens read a second; those that were reused do not count."""
        read = self.prompt_tokens - self.reused_tokens
        return read / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decoded_tokens(self) -> int:
        """New tokens that `decode_s` is the time of."""
        return self.new_tokens - (self.num_rows if self.first_token_s else 0)

    @property
    def time_to_first_token_s(self) -> float:
        """Seconds until a prompt is read and its first token can be drawn, the mean over them."""
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

    def table(self) -> Table:
        """The same as one line; see `to_dict`."""
        return Table.of([self.to_dict()])

    def _repr_html_(self) -> str:
        lines = [{"what": name, "value": value} for name, value in self.to_dict().items()]
        return Table.of(lines, caption=str(self))._repr_html_()

    def __str__(self) -> str:
        per_token = self.time_per_output_token_s
        read = self.prompt_tokens - self.reused_tokens
        parts = [
            f"prefill {read} tokens at {self.prefill_tokens_per_second:,.0f}/s",
            f"first token after {self.time_to_first_token_s * 1e3:,.1f} ms",
            f"{self.new_tokens} new tokens",
        ]
        if per_token is not None:
            parts.append(f"{per_token * 1e3:,.2f} ms per token")
        if self.reused_tokens:
            parts.append(f"{self.reused_tokens} prompt tokens reused")
        parts.append(f"KV cache {self.cache_bytes / 2**20:,.2f} MiB")
        if self.compile_s >= 0.05:
            parts.append(f"compiled in {self.compile_s:,.1f} s")
        return ", ".join(parts)
