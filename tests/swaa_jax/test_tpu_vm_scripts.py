"""The scripts of examples/tpu_vm against a stand-in of gcloud, which notes what it is asked."""

import os
import pathlib
import shlex
import subprocess

import pytest

SCRIPTS = pathlib.Path(__file__).parents[2] / "examples" / "tpu_vm"

GCLOUD = r"""#!/bin/bash
printf '%q ' "$@" >> "$FAKE/calls"; echo >> "$FAKE/calls"
case "$*" in
  *"queued-resources describe"*)
    read -r state < "$FAKE/states" || exit 1
    sed -i 1d "$FAKE/states"
    [[ $state == NONE ]] && exit 1
    echo "$state" ;;
  *networkEndpoints*) cat "$FAKE/hosts" ;;
  *"tpu-vm describe"*) cat "$FAKE/alive" ;;
  *"storage ls"*) cat "$FAKE/done" 2>/dev/null ;;
  *swaa*train*)
    if [[ -e $FAKE/fail ]]; then exit 2; fi
    [[ -e $FAKE/preempted ]] && echo adapter > "$FAKE/done"
    touch "$FAKE/preempted" ;;
esac
"""


@pytest.fixture
def cloud(tmp_path):
    """Runs a script; gives its exit code and output, and what gcloud was asked."""
    (tmp_path / "bin").mkdir()
    for name, text in (("gcloud", GCLOUD), ("python3", '#!/bin/bash\nmkdir "$7"\n')):
        file = tmp_path / "bin" / name
        file.write_text(text)
        file.chmod(0o755)
    (tmp_path / "hosts").write_text("10.0.0.1\n")
    (tmp_path / "states").write_text("")
    (tmp_path / "alive").write_text("")

    def run(script, *args, **environ):
        environ = {"BUCKET": "gs://b/x", "POLL": "0", **environ}
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", str(SCRIPTS / script), *args],
            env={**os.environ, "PATH": path, "FAKE": str(tmp_path), **environ},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
        calls = tmp_path / "calls"
        asked = (
            [shlex.split(line) for line in calls.read_text().splitlines()] if calls.exists() else []
        )
        return done.returncode, done.stdout + done.stderr, asked

    run.folder = tmp_path
    return run


def remote(call: list[str]) -> list[str]:
    """The words of the command that a host is given."""
    return shlex.split(call[call.index("--command") + 1])


def test_a_bucket_is_asked_for(cloud):
    code, said, asked = cloud("train.sh", BUCKET="my-bucket")
    assert (code, asked) == (2, [])
    assert "BUCKET: expected gs://bucket/folder, got 'my-bucket'" in said


@pytest.mark.parametrize("hosts", [1, 4])
def test_training_takes_what_swaa_train_takes(cloud, hosts):
    (cloud.folder / "hosts").write_text(";".join(f"10.0.0.{i}" for i in range(hosts)) + "\n")
    code, said, asked = cloud("train.sh", "mine.yaml", 'policy.full_attention_layers="1::4"')
    assert code == 0, said
    words = remote(asked[-1])
    assert words[0] == "JAX_COMPILATION_CACHE_DIR=gs://b/x/compiled"
    assert words[1:4] == ["swaa-venv/bin/swaa", "train", "mine.yaml"]
    assert 'policy.full_attention_layers="1::4"' in words
    assert "output_dir=gs://b/x/runs/a" in words
    assert ("--distributed" in words) == (hosts > 1)
    assert "--worker=all" in asked[-1]


def test_a_run_goes_on_after_a_preemption(cloud):
    states = ["NONE", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "SUSPENDED", "ACTIVE"]
    (cloud.folder / "states").write_text("\n".join(states) + "\n")
    code, said, asked = cloud("train_until_done.sh", SPOT="1")
    assert code == 0, said
    assert "taken back" in said and "done: gs://b/x/runs/a" in said
    kinds = [
        kind
        for call in asked
        for kind in ("create", "delete", "doctor", "train")
        if kind in call or (call[3] == "ssh" and kind in remote(call))
    ]
    assert kinds == ["create", "doctor", "train", "delete", "create", "doctor", "train"]
    assert all("--spot" in call for call in asked if "create" in call)


def test_a_mistake_is_not_tried_again(cloud):
    (cloud.folder / "states").write_text("ACTIVE\n" * 9)
    (cloud.folder / "alive").write_text("READY\n")
    (cloud.folder / "fail").touch()
    code, said, _ = cloud("train_until_done.sh")
    assert code == 1 and "failed on a slice that is alive" in said


def test_the_others(cloud):
    for script in ("create.sh", "convert.sh", "evaluate.sh", "serve.sh", "delete.sh"):
        code, said, _ = cloud(script)
        assert code == 0, said
    *_, asked = cloud("serve.sh", "--also", "narrow=window=64,sinks=4")
    assert remote(asked[-1])[-2:] == ["--also", "narrow=window=64,sinks=4"]
    assert asked[-1][-3:] == ["-t", "-L", "8000:localhost:8000"]
