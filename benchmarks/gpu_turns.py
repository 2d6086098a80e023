"""Parts of a GPU benchmark, each in a process of its own: they compile side by side, and then are
timed one at a time.

    part A   [ import | compile ] ready  [ time ]
    part B   [ import | compile ......... ] ready [ time ]
    part C   [ import | compile .. ] ready        .....   [ time ]
                                          ^ none compiles any more

A part that fails, hangs or runs out of memory takes nothing with it: its rows hold the reason.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gpu_arguments
import gpu_timing

READY = "ready to be timed"
PEAKS = "peaks"

Rows = list[dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser, *, jobs: int) -> None:
    """The arguments that all benchmarks have which run in parts."""
    add = parser.add_argument
    count, limit = gpu_arguments.count, gpu_arguments.seconds
    add("--jobs", type=count, default=jobs, help=f"parts that compile side by side; default {jobs}")
    told = "seconds for a part to compile, and again to be timed; default %(default)g"
    add("--limit", type=limit, default=240, help=told)
    gpu_arguments.add_results(parser)
    add("--part", help=argparse.SUPPRESS)  # in a process of its own


def run(
    arguments: argparse.Namespace,
    script: str,
    parts: Sequence[str],
    *,
    measure: Callable[[argparse.Namespace], None],
    finish: Callable[[Mapping[str, Any], Rows], None],
    report: Callable[[Rows], None],
    plot: Callable[[Mapping[str, Any], Path], None],
    about: Mapping[str, Any],
) -> int:
    """A benchmark's whole run, or one of its parts in this process; the exit status.

    Rows are written after each part, so that a run that is ended early keeps what it has, beside
    the results of the one before; a whole run's take their place. The status is 1 where sides
    differ, a part has failed, or nothing was timed.

    Args:
        arguments: with those of `add_arguments`.
        script: the benchmark's file.
        parts: what `--part` may be.
        measure: of a part: compiles, calls `take_turn`, and tells its rows.
        finish: adds to the rows what follows from others, and from the card's peaks.
        report: prints rows.
        plot: of a result, as a file holds it.
        about: written beside the rows.
    """
    output = arguments.output
    if arguments.part == PEAKS:
        _tell_peaks(is_small=arguments.smoke)
        return 0
    if arguments.part:
        measure(arguments)
        return 0
    if arguments.redraw:
        content = gpu_timing.read(output)
        plot(content, output.with_suffix(".png"))
        return int(gpu_timing.differ(content["rows"]))
    rows: Rows = []
    peaks: dict[str, Any] = {}
    turns = in_turns(
        script, [PEAKS, *parts], sys.argv[1:], limit=arguments.limit, jobs=arguments.jobs
    )
    with gpu_timing.ended_by_sigterm(output), contextlib.closing(turns):
        for part, found in turns:
            if part == PEAKS:
                peaks = found[0]
                if "reason" in peaks:  # results of a card without a name would say little
                    sys.exit(f"the card could not be measured: {peaks['reason']}")
                print(peaks, flush=True)
                continue
            rows += [{"part": part, **row} for row in found]
            finish(peaks, rows)
            report(rows[-len(found) :])
            if output is not None:
                about = {**peaks, **about}
                gpu_timing.write(output, command=Path(script).name, about=about, rows=rows)
    is_kept = output is None or gpu_timing.keep(output, plot)
    has_failed = any("side" not in row for row in rows)
    return int(gpu_timing.differ(rows) or has_failed or not is_kept)


def _tell_peaks(*, is_small: bool) -> None:
    gpu_timing.share_card()
    gpu_timing.check_card(smoke=is_small)
    take_turn()
    tell(gpu_timing.peaks(is_small=is_small))


def in_turns(
    script: str, parts: Sequence[str], argv: Sequence[str], *, limit: float, jobs: int
) -> Generator[tuple[str, Rows]]:
    """Each part's name and the rows that it printed, as they come, or one with a `reason`.

    Args:
        script: is run as `python script *argv --part PART`. It calls `take_turn` once it has
            compiled, and prints its rows with `tell`.
        parts: their names.
        argv: the other arguments.
        limit: seconds that a part may take until it is ready, and again while it is timed.
        jobs: parts that compile side by side, and share the card's memory.
    """
    for first in range(0, len(parts), jobs):
        some = [_Part(script, part, argv) for part in parts[first : first + jobs]]
        readers = ThreadPoolExecutor(len(some))
        try:
            list(readers.map(lambda part: part.wait_until_ready(limit), some))
            for part in some:
                yield part.name, part.timed(limit)
        finally:
            for part in some:
                part.end()
            readers.shutdown()  # after the parts: a reader waits for what its part prints


class _Part:
    """A process."""

    def __init__(self, script: str, name: str, argv: Sequence[str]):
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (`end` closes it)
        self._process = subprocess.Popen(
            [sys.executable, script, *argv, "--part", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._late = ""

    def wait_until_ready(self, limit: float) -> None:
        self._read(limit, until=READY)

    def timed(self, limit: float) -> Rows:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended before its turn
            self._process.stdin.write("now\n")
            self._process.stdin.close()
        lines = self._read(limit)
        rows = [json.loads(line) for line in lines if line.startswith("{")]
        if self._process.wait() == 0 and rows:
            return rows
        self._errors.seek(0)
        errors = self._errors.read().strip()
        print(f"{self.name}: {self._late or errors[-1500:]}", file=sys.stderr, flush=True)
        last = (errors.splitlines() or ["it printed nothing"])[-1]
        return [*rows, {"reason": self._late or last[:300]}]

    def _read(self, limit: float, *, until: str | None = None) -> list[str]:
        """What it prints, up to a line or the end; past the limit it is ended."""

        def end() -> None:
            self._late = f"took more than {limit:.0f} s"
            self._process.kill()

        timer = threading.Timer(limit, end)
        timer.start()
        lines: list[str] = []
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                if until is not None and line.strip() == until:
                    break
                lines.append(line)
        finally:  # a run that is ended does not wait for it
            timer.cancel()
        return lines

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()


def take_turn() -> None:
    """In a part: all is compiled; waits until the others are, and are not being timed."""
    print(READY, flush=True)
    if not sys.stdin.readline():
        sys.exit("the benchmark has ended")


def tell(row: Mapping[str, Any]) -> None:
    """In a part: a row of the results."""
    print(json.dumps(row), flush=True)
