"""`swaa completion`: shells run the script, and complete with it."""

import pathlib
import shutil
import subprocess

import pytest

from swaa_jax.cli import completion, main
from swaa_jax.configs import list_configs

BASH = """
source {script}
COMP_WORDS=({words}) COMP_CWORD={last} COMP_LINE={line!r}
_shtab_swaa
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("completion") / "swaa.bash"
    path.write_text(completion.script("bash"))
    return path


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["ev"], ["eval"]),
        (["se"], ["select", "serve"]),
        (["completion", ""], list(completion.SHELLS)),
        (["generate", "tiny-retriever", "--sin"], ["--sinks"]),
        (["generate", "tiny"], ["tiny-retriever"]),
        (["generate", "tiny-retriever", "--full-attention"], [""]),  # an old name
        (["generate", "tiny-retriever", "--dtype", "bfl"], ["bfloat16"]),
        (["generate", "tiny-retriever", "--file", "que"], ["questions.jsonl"]),
        (["serve", "models"], ["models"]),
        (["generate", "tiny-retriever", "--policy", "thinking"], "policies"),
        (["generate", "tiny-retriever", "--policy", "min"], ["mine.yaml"]),
        (["eval", "paper"], "eval"),
        (["train", "paper"], "train"),
        (["train", "mine"], ["mine.yaml"]),
        (["recipes", "trained-q"], ["trained-quality", "trained-quality-sinks"]),
    ],
)
def test_bash_completes(script, tmp_path, typed, offered):
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "questions.jsonl").touch()
    (tmp_path / "models").mkdir()
    words = " ".join(f"'{word}'" for word in ["swaa", *typed])
    code = BASH.format(script=script, words=words, last=len(typed), line="swaa")
    done = subprocess.run(
        ["bash", "--norc", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    if isinstance(offered, str):
        offered = [name for name in list_configs(offered) if name.startswith(typed[-1])]
        assert offered
    assert done.stdout.splitlines() == offered


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_shell_takes_its_script(shell, capsys, tmp_path):
    assert main.main(["completion", shell]) == 0
    text = capsys.readouterr().out
    for word in ("generate", "tiny-retriever", "thinking-no-train-quality", "full-layers"):
        assert word in text
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    path = tmp_path / "script"
    path.write_text(text)
    check = [shell, *([] if shell == "tcsh" else ["-n"]), str(path)]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
