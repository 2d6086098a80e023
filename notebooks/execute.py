"""Execute the notebooks, from top to bottom on this machine's CPU, and keep what they print.

    python notebooks/execute.py                # all of them
    python notebooks/execute.py 01_quickstart  # some
    python notebooks/execute.py --no-run       # only what the notebooks share is written anew

Before that each notebook gets what all of them share: the head with its badges, made from the
notebook's own metadata, and the cell `SETUP`. Change these here, never in a notebook. The
repository's address is `repository-code` of CITATION.cff.
"""

import argparse
import os
import pathlib
import re
import string
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"

HEAD = string.Template("""\
# $title

[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]($colab) \
[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]($kaggle)

$summary

**Hardware:** $hardware **Time:** $time""")

SETUP = string.Template("""\
# @title Setup: installs what is missing, finds a token, the device and its memory
import importlib.util
import os
import shutil
import sys

if importlib.util.find_spec("swaa_jax") is None:
    tpu = os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0")
    extra = "[tpu]" if tpu else "[cuda]" if shutil.which("nvidia-smi") else ""
    %pip install --quiet "swaa-jax{extra} @ git+$repository"

import jax

import swaa_jax as swaa  # an older JAX in this session? Then it says to restart the runtime


def secret(name):
    \"\"\"A secret of Colab or Kaggle, or a variable of the environment; None: there is none.\"\"\"
    try:
        if "google.colab" in sys.modules:
            from google.colab import userdata

            return userdata.get(name)
        if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
            from kaggle_secrets import UserSecretsClient

            return UserSecretsClient().get_secret(name)
    except Exception as error:
        print(f"No secret {name}: {type(error).__name__}")
    return os.environ.get(name)


if token := secret("HF_TOKEN"):  # only for models that ask for it, and to upload
    os.environ["HF_TOKEN"] = token

device = jax.devices()[0]
memory_gib = (device.memory_stats() or {}).get("bytes_limit", 0) / 2**30  # 0: a CPU
if MODEL is None:  # the largest of three that fits beside its caches
    MODEL = "tiny-retriever" if memory_gib < 6 else "Qwen/Qwen3-0.6B"
    MODEL = MODEL if memory_gib < 14 else "Qwen/Qwen3-4B"
is_tiny = MODEL == "tiny-retriever"
print(f"swaa_jax {swaa.__version__}, JAX {jax.__version__}, {device.device_kind}: {MODEL}")""")


def repository() -> str:
    """The address of the repository, `https://github.com/OWNER/NAME`."""
    found = re.search(r'(?m)^repository-code: "?(\S+?)"?$', (ROOT / "CITATION.cff").read_text())
    if found is None:
        raise ValueError("CITATION.cff: expected a line `repository-code: URL`, found none")
    return found[1]


def paths() -> list[pathlib.Path]:
    """All notebooks, in order."""
    return sorted(FOLDER.glob("*.ipynb"))


def read(path: pathlib.Path) -> NotebookNode:
    """A notebook, checked against the format."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def tagged(notebook: NotebookNode, tag: str) -> NotebookNode:
    """The cell with this tag."""
    found = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]
    if len(found) != 1:
        raise ValueError(f"expected one cell tagged {tag!r}, got {len(found)}")
    return found[0]


def links(name: str) -> dict[str, str]:
    """Where a notebook of this name opens in Colab and in Kaggle."""
    path = f"blob/main/notebooks/{name}.ipynb"
    at = repository()
    return {
        "colab": f"https://colab.research.google.com/github/{at.split('github.com/')[1]}/{path}",
        "kaggle": f"https://kaggle.com/kernels/welcome?src={at}/{path}",
    }


def share(notebook: NotebookNode, name: str) -> None:
    """Writes what all notebooks share into this one."""
    about = notebook.metadata["swaa"]
    tagged(notebook, "head").source = HEAD.substitute(about, **links(name))
    setup = tagged(notebook, "setup")
    setup.source = SETUP.substitute(repository=repository())
    setup.metadata["cellView"] = "form"  # Colab shows its title alone
    notebook.metadata = NotebookNode(
        {
            "accelerator": "TPU",
            "colab": {"gpuType": "V5E1", "provenance": []},
            "kaggle": {"isInternetEnabled": True, "language": "python", "sourceType": "notebook"},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "swaa": about,
        }
    )
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"  # the same at every writing


def run(
    notebook: NotebookNode,
    *,
    folder: pathlib.Path | str,
    packages: Sequence[pathlib.Path | str],
    variables: Mapping[str, str] | None = None,
    timeout: float = 600,
) -> float:
    """Executes a notebook in place, in a kernel of its own on the CPU.

    Args:
        notebook: its outputs are replaced.
        folder: the kernel's working directory.
        packages: where it looks for packages before its own.
        variables: more of its environment.
        timeout: seconds a cell may take.

    Returns:
        Seconds that all of it took.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; names it and the error.
    """
    dropped = ("JAX_", "HF_", "SWAA_", "KAGGLE_", "COLAB_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    environment = {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(map(str, packages)),
        **(variables or {}),
    }
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=timeout,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    started = time.perf_counter()
    client.execute(env=environment)
    return time.perf_counter() - started


def tidy(notebook: NotebookNode, folder: pathlib.Path | str) -> None:
    """Takes out of the outputs what is of this machine: its folders, and tqdm's want of widgets."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if "TqdmWarning" not in one.get("text", "")]
        for output in cell.get("outputs", []):
            for holder, key in _texts(output):
                holder[key] = holder[key].replace(f"{folder}/", "").replace(f"{ROOT}/", "")


def _texts(output: Any) -> list[tuple[Any, str]]:
    """The places of an output that hold text."""
    holders = [(output, "text")] if "text" in output else []
    data = output.get("data", {})
    return holders + [(data, kind) for kind in data if kind.startswith("text/")]


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="such as 01_quickstart; none: all")
    parser.add_argument("--no-run", action="store_true", help="write what is shared, run nothing")
    given = parser.parse_args(arguments)
    known = {path.stem: path for path in paths()}
    for name in given.names or known:
        if name not in known:
            parser.error(f"{name}: expected one of {', '.join(known)}")
        notebook = read(known[name])
        share(notebook, name)
        if not given.no_run:
            with tempfile.TemporaryDirectory() as folder:
                seconds = run(notebook, folder=folder, packages=[ROOT])
                tidy(notebook, folder)
            share(notebook, name)  # running writes metadata of its own
            print(f"{name}: {seconds:.0f} s")
        nbformat.validate(notebook)
        nbformat.write(notebook, known[name])


if __name__ == "__main__":
    sys.exit(main())
