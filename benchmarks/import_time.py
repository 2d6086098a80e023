"""Seconds until `import swaa_jax` is done, a help is there, and the first model can be loaded.

Each is a process of its own, the quickest of several: what is on disk is in memory by then. A
machine that does other things waits longer, so CPU seconds are shown too.
"""

import argparse
import json
import os
import subprocess
import sys
import time

import swaa_jax
from swaa_jax.tables import Table

CASES = {
    "python": "pass",
    "import swaa_jax": "import swaa_jax",
    "swaa --help": "from swaa_jax.cli.main import build_parser; build_parser().format_help()",
    "import jax": "import jax",
    "import flax.nnx": "import flax.nnx",
    "swaa_jax.load_model": "import swaa_jax; swaa_jax.load_model",
    "swaa_jax.generate": "import swaa_jax; swaa_jax.generate",
    "swaa_jax.train": "import swaa_jax; swaa_jax.train",
    "swaa_jax.evaluate": "import swaa_jax; swaa_jax.evaluate",
}
LIMITS = {"import swaa_jax": 1.5, "swaa --help": 1.5}
EPILOG = """\
examples:
  python benchmarks/import_time.py
      a table; exit code 1 where `import swaa_jax` or `swaa --help` takes more than 1.5 s

  python -X importtime -c 'import swaa_jax; swaa_jax.load_model' 2>&1 | sort -t'|' -k2 -n | tail
      what of it is whose
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="of each, default 5")
    parser.add_argument("--json", action="store_true", help="the table as JSON")
    args = parser.parse_args()
    records = []
    for name, code in CASES.items():
        runs = [measure(code) for _ in range(args.runs)]
        wall_s, cpu_s = (min(column) for column in zip(*runs, strict=True))
        limit_s = LIMITS.get(name)
        records.append({"what": name, "wall_s": wall_s, "cpu_s": cpu_s, "limit_s": limit_s})
    version = ".".join(map(str, sys.version_info[:3]))
    table = Table.of(records, caption=f"Python {version}, {os.cpu_count()} cores")
    print(table.to_json() if args.json else table)
    slow = [one["what"] for one in records if one["wall_s"] > (one["limit_s"] or float("inf"))]
    if slow:
        print(f"over the limit: {', '.join(slow)}", file=sys.stderr)
    return int(bool(slow))


def measure(code: str) -> tuple[float, float]:
    """Seconds on the clock and of CPU time, of a process that runs the code."""
    root = os.path.dirname(os.path.dirname(swaa_jax.__file__))
    watched = f"import time\n{code}\nprint(time.process_time())"
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", watched],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        check=True,
    )
    return time.perf_counter() - started, json.loads(done.stdout.split()[-1])


if __name__ == "__main__":
    sys.exit(main())
