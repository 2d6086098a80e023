"""`swaa doctor`: what it finds here, and each fault that it knows, made on purpose."""

import json
import os
import sys

import pytest

from swaa_jax.cli import doctor, doctor_checks, doctor_devices, main


def test_this_machine(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")  # other tests are without
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("SWAA_BACKND", "xla")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert main.main(["doctor", "--json"]) == 0
    captured = capsys.readouterr()
    assert "secret" not in captured.out
    found = {(one["section"], one["name"]): one for one in json.loads(captured.out)}
    assert found["versions", "python"]["value"].startswith(sys.version.split()[0])
    assert found["devices", "devices"]["value"] == "1 x cpu (cpu)"
    assert "as the reference has it" in found["devices", "windowed attention"]["value"]
    for name, op in (("prompts", "swa_prefill"), ("new tokens", "swa_decode")):
        assert found["devices", name]["value"] == f"{op}: xla"
    assert found["devices", "experts"]["value"] == "grouped_matmul: xla"
    assert found["caches and disk", "hub token"]["value"] == "there"
    cache = found["caches and disk", "compilation cache"]
    assert cache["status"] == "ok" and str(tmp_path) in cache["value"]
    unknown = found["settings", "SWAA_BACKND"]
    assert unknown["status"] == "note" and "did you mean 'SWAA_BACKEND'" in unknown["value"]


def test_as_text(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "ask_jax", lambda timeout_s: ({"stage": "import"}, "Oh.\n", 1))
    assert main.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert [line for line in text.splitlines() if line in doctor._SECTIONS]
    assert "ended (exit code 1) while importing JAX: Oh.;" in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("code", "timeout_s", "told", "advice"),
    [
        ("import time; time.sleep(60)", 1, "no answer in 1 s while importing", "--timeout"),
        (
            'print(\'{"stage": "devices"}\', flush=True); import time; time.sleep(60)',
            2,
            "no answer in 2 s while asking for the devices",
            "another process",
        ),
        (
            "import os; os.write(2, b'F0101 Unknown flag in XLA_FLAGS: --xla_no\\n'); os.abort()",
            30,
            "ended (signal 6) while importing JAX: F0101 Unknown flag in XLA_FLAGS",
            "leave that flag out",
        ),
        (
            "raise RuntimeError('The TPU is already in use by process with pid 7.')",
            30,
            "already in use by process with pid 7",
            "end the one that is named",
        ),
    ],
)
def test_a_jax_that_does_not_answer(tmp_path, monkeypatch, code, timeout_s, told, advice):
    (tmp_path / "of_a_test.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    answer = doctor.ask_jax(timeout_s, module="of_a_test")
    (finding,) = doctor._of_jax(*answer, timeout_s=timeout_s)
    assert finding.status == "wrong"
    assert told in finding.value and advice in finding.advice


def test_backends_that_are_named(monkeypatch):
    """Where one cannot compute an operation, the others are told all the same."""
    monkeypatch.setenv("SWAA_BACKEND", "swa_prefill=cudnn,swa_decode=reference")
    found = doctor_devices._backends()
    assert found["new tokens"] == ["swa_decode: reference, as asked for"]
    assert found["experts"] == ["grouped_matmul: xla"]
    (told,) = found["packed rows"]
    assert told.startswith("swa_prefill: backend 'cudnn' expects platform 'gpu', got 'cpu'")
    said = f"NotImplementedError: {told}\n--------------------\nFor simplicity, JAX has removed\n"
    (finding,) = doctor._of_jax({"stage": "compute"}, said, 1, timeout_s=1)
    assert told in finding.value and "SWAA_BACKEND" in finding.advice
    told = "ValueError: SWAA_BACKEND: expected one of 'auto', 'xla' for swa_prefill, got 'nope'"
    said = said.replace(said.splitlines()[0], told)
    (finding,) = doctor._of_jax({"stage": "compute"}, said, 1, timeout_s=1)
    assert told in finding.value and "name one of these" in finding.advice


def test_what_its_answers_mean(monkeypatch, tmp_path):
    device = {"id": 0, "kind": "TPU v6 lite", "memory_bytes": 32 << 30, "used_bytes": 1 << 30}
    answer = {"stage": "done", "jax": "0.4.1", "jax_file": "/old/jax", "cache": None}
    answer |= {"cache_enabled": True, "platform": "tpu", "devices": [device] * 8}
    answer |= {"error": float("nan"), "compute_s": 1.0}
    found = {one.name: one for one in doctor._of_jax(answer, "", 0, timeout_s=1)}
    assert found["devices"].value == "8 x TPU v6 lite (tpu), 32.0 GiB each, 1.0 used"
    assert found["mesh"].value == "fsdp=8 by --mesh auto"
    wrong = [name for name, one in found.items() if one.status == "wrong"]
    assert wrong == ["jax", "compilation cache", "windowed attention"]
    assert "/old/jax" in found["jax"].value

    monkeypatch.setattr(doctor, "accelerators", lambda: {"tpu": [], "gpu": [tmp_path]})
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    on_cpu = {"platform": "cpu", "devices": [device | {"memory_bytes": None}]}
    found = {one.name: one for one in doctor._devices(on_cpu)}
    assert found["gpu"].status == "wrong" and "swaa-jax[cuda]" in found["gpu"].advice
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    found = {one.name: one for one in doctor._devices(on_cpu)}
    assert found["gpu"].status == "note" and "JAX_PLATFORMS=cpu" in found["gpu"].value


def test_who_has_the_tpu(tmp_path):
    def put(path, text=""):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    vfio = put("dev/vfio/0")
    assert doctor_checks.accelerators(str(tmp_path)) == {"tpu": [], "gpu": []}
    put("sys/bus/pci/devices/0000:00:05.0/vendor", "0x1ae0\n")
    put("sys/bus/pci/devices/0000:00:05.0/device", "0x0042\n")
    assert doctor_checks.accelerators(str(tmp_path))["tpu"] == [], "a network card"
    put("sys/bus/pci/devices/0000:00:05.0/device", "0x006f\n")
    assert doctor_checks.accelerators(str(tmp_path))["tpu"] == [vfio]

    put("proc/71/cmdline", "python\0train.py\0")
    put("proc/72/cmdline", "bash\0")
    for pid, target in ((71, vfio), (72, "/dev/null")):
        (tmp_path / f"proc/{pid}/fd").mkdir()
        os.symlink(target, tmp_path / f"proc/{pid}/fd/3")
    (holder,) = doctor_checks._tpu_holders(str(tmp_path))
    assert (holder.name, holder.value) == ("process 71", "holds the TPU: python train.py")
    assert holder.status == "wrong" and "kill 71" in holder.advice

    lock = put("tmp/libtpu_lockfile")
    *_, told = doctor_checks._tpu_holders(str(tmp_path))
    assert told.status == "ok" and "does no harm" in told.value
    import fcntl

    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        *_, told = doctor_checks._tpu_holders(str(tmp_path))
    assert told.status == "wrong" and "held" in told.value


def test_settings():
    environ = {
        "XLA_FLAGS": "--xla_dump_to=/tmp/x --xla_other=1",
        "JAX_DISABLE_JIT": "1",
        "JAX_ENABLE_X64": "0",
        "JAX_PROCESS_ID": "1",
        "SWAA_SERVE_KEY": "abc",
    }
    found = {one.name: one for one in doctor_checks._settings(environ)}
    status = {name: one.status for name, one in found.items()}
    assert status == {
        "XLA_FLAGS --xla_dump_to=/tmp/x": "note",
        "XLA_FLAGS --xla_other=1": "ok",
        "JAX_DISABLE_JIT": "note",
        "JAX_PROCESS_ID": "wrong",
        "SWAA_SERVE_KEY": "note",
    }
    assert "JAX_NUM_PROCESSES" in found["JAX_PROCESS_ID"].value
    assert "abc" not in found["SWAA_SERVE_KEY"].value


def test_packages_that_do_not_fit(monkeypatch):
    versions = {"jax": "0.10.2", "jaxlib": "0.10.2", "jax-cuda12-plugin": "0.10.0", "flax": "0.1"}
    monkeypatch.setattr(doctor_checks, "_version", versions.get)
    monkeypatch.setattr(
        "importlib.metadata.requires",
        lambda name: ["jax>=0.10", "flax>=0.12.8", "optax", "lm-eval; extra == 'harness'"],
    )
    found = {one.name: one for one in doctor_checks._versions() if one.status == "wrong"}
    assert list(found) == ["flax", "optax", "jax-cuda12-plugin"]
    assert found["flax"].value == "0.1; >=0.12.8 is needed"
    assert found["jax-cuda12-plugin"].advice == 'pip install -U "jax-cuda12-plugin==0.10.2"'


def test_caches(tmp_path):
    (tmp_path / "a-program").write_bytes(b"x" * (3 << 20))
    (told,) = doctor_checks.cache_findings(str(tmp_path), is_enabled=True)
    assert "1 files, 3.0 MiB" in told.value
    (told,) = doctor_checks.cache_findings(str(tmp_path), is_enabled=False)
    assert told.status == "note"
    (told,) = doctor_checks.cache_findings("gs://b/c", is_enabled=True)
    assert (told.status, told.value) == ("ok", "gs://b/c")
