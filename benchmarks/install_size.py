"""What `pip install` of this package takes: seconds and bytes, in a fresh environment.

    python benchmarks/install_size.py            # the wheel, with locked versions
    python benchmarks/install_size.py --extra tpu

Builds the wheel, makes an empty environment, installs the wheel there with what it depends on, and
lists what is heavy. Fails where it took more than `--seconds` or `--gigabytes`. The time depends on
the network and on pip's cache: `--no-cache` downloads everything anew.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/install_size.json"
TAG = f"py{sys.version_info.major}{sys.version_info.minor}"


def run(*command: str | os.PathLike, cwd: pathlib.Path) -> None:
    """Runs a command that knows nothing of this checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run(command, cwd=cwd, env=kept, check=True, stdout=subprocess.DEVNULL)


def size(path: pathlib.Path) -> int:
    """Bytes of a file or of a folder's files, links not followed."""
    if not path.is_dir():
        return path.lstat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())


def by_package(site: pathlib.Path) -> dict[str, int]:
    """Bytes of each distribution's files, compiled Python included, the largest first."""
    sizes = {}
    for found in importlib.metadata.distributions(path=[str(site)]):
        files = (site / str(file) for file in found.files or ())
        sizes[found.metadata["Name"]] = sum(map(size, filter(pathlib.Path.exists, files)))
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def locked_versions(folder: pathlib.Path) -> pathlib.Path:
    """A file of this Python's locked versions, without hashes, which the new wheel has not yet."""
    lock = (ROOT / f"requirements/lock-{TAG}.txt").read_text()
    versions = re.findall(r"^[\w.-]+==[^ \\\n]+", lock, re.MULTILINE)
    file = folder / "constraints.txt"
    file.write_text("\n".join(versions))
    return file


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--extra", action="append", default=[], help="such as tpu; may be repeated")
    parser.add_argument("--no-cache", action="store_true", help="download everything anew")
    parser.add_argument("--seconds", type=float, default=90, help="most that it may take")
    parser.add_argument("--gigabytes", type=float, default=1.2, help="most that it may fill")
    parser.add_argument("--top", type=int, default=15, help="packages to list")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
        (wheel,) = place.glob("*.whl")
        extras = f"[{','.join(given.extra)}]" if given.extra else ""
        started = time.perf_counter()
        run(sys.executable, "-m", "venv", place / "new", cwd=place)
        empty, empty_s = size(place / "new"), time.perf_counter() - started
        pip = [place / "new/bin/python", "-m", "pip", "install", "--quiet"]
        pip += ["--disable-pip-version-check", *(["--no-cache-dir"] if given.no_cache else [])]
        run(*pip, "-c", locked_versions(place), f"{wheel}{extras}", cwd=place)
        seconds = time.perf_counter() - started - empty_s
        total = size(place / "new") - empty
        (site,) = (place / "new").glob("lib/python*/site-packages")
        sizes = by_package(site)
        print(f"python {sys.version.split()[0]}, {os.cpu_count()} cores: pip install took ", end="")
        print(f"{seconds:.0f} s and {total / 1e9:.2f} GB; the wheel is {size(wheel) / 1e6:.1f} MB")
        for name, number in list(sizes.items())[: given.top]:
            print(f"{number / 1e6:8.0f} MB  {name}")
        record = {
            "command": "python benchmarks/install_size.py",
            "python": sys.version.split()[0],
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "seconds": round(seconds, 1),
            "bytes": total,
            "wheel_bytes": size(wheel),
            "packages": sizes,
        }
    if not given.extra:
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    if seconds > given.seconds or total > given.gigabytes * 1e9:
        sys.exit(f"expected at most {given.seconds:g} s and {given.gigabytes:g} GB")


if __name__ == "__main__":
    main()
