"""Logging, the main process, the compilation cache."""

import logging
import re
import subprocess
import sys

import jax
import pytest

from swaa_jax import runtime


@pytest.fixture
def cache_setting():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def loggers():
    packages = [logging.getLogger(name) for name in ("swaa_jax", "kernels_pallas")]
    before = [(p.level, p.propagate, list(p.handlers)) for p in packages]
    yield packages
    for package, (level, propagate, handlers) in zip(packages, before, strict=True):
        package.setLevel(level)
        package.propagate = propagate
        package.handlers[:] = handlers


def test_the_cache_follows_xdg(tmp_path, monkeypatch, cache_setting):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = str(tmp_path / "swaa_jax" / "compiled")
    assert runtime.enable_compilation_cache() == expected
    assert jax.config.jax_compilation_cache_dir == expected
    assert (tmp_path / "swaa_jax" / "compiled").is_dir()
    # Set already, by us or by JAX_COMPILATION_CACHE_DIR: left as it is.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert runtime.enable_compilation_cache() == expected


def test_a_relative_xdg_is_ignored(tmp_path, monkeypatch, cache_setting):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert runtime.enable_compilation_cache() == str(tmp_path / ".cache/swaa_jax/compiled")


def test_a_cache_that_cannot_be_made(tmp_path, monkeypatch, cache_setting):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"directory: expected .* got .*file/cache"):
        runtime.enable_compilation_cache(tmp_path / "file" / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert runtime.enable_compilation_cache() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_one_handler_however_often(loggers, capsys):
    runtime.setup_logging("INFO", rich=False)
    runtime.setup_logging("WARNING", rich=False)
    logging.getLogger("swaa_jax.models").info("quiet")
    logging.getLogger("swaa_jax.models").warning("once")
    logging.getLogger("kernels_pallas").warning("twice")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("once") == err.count("twice") == 1
    assert "quiet" not in err


def test_rich_logging_goes_to_stderr(loggers, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    runtime.setup_logging()
    assert [type(one).__name__ for one in logging.getLogger("swaa_jax").handlers] == ["RichHandler"]
    logging.getLogger("swaa_jax").info("hello")
    out, err = capsys.readouterr()
    assert out == ""
    assert "hello" in err


def test_a_line_of_the_log_is_one_line_where_there_is_no_terminal(loggers, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    runtime.setup_logging()
    logging.getLogger("swaa_jax").warning("word " * 60 + "[bold]%d", 1)
    (line,) = capsys.readouterr().err.splitlines()
    line_of = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING (word ){60}\[bold\]1"
    assert re.fullmatch(line_of, line)


def test_other_processes_are_silent(loggers, capsys, monkeypatch):
    assert runtime.is_main_process()
    runtime.setup_logging(rich=False)
    monkeypatch.setattr(runtime.jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(runtime.jax, "process_index", lambda: 1)
    assert not runtime.is_main_process()
    logging.getLogger("swaa_jax").error("not mine to say")
    assert capsys.readouterr().err == ""


def test_asking_does_not_start_a_backend():
    program = (
        "from swaa_jax import runtime; assert runtime.is_main_process(); runtime.setup_logging();"
        "import logging; logging.getLogger('swaa_jax').debug('x');"
        "import jax; jax.config.update('jax_num_cpu_devices', 3); assert jax.device_count() == 3"
    )
    environment = {"JAX_PLATFORMS": "cpu", "PATH": ""}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=".")


_KEPT_BLOCKS = """
import sys
import numpy as np
from swaa_jax.runtime import return_freed_arrays

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 // 2**20

if sys.argv[1] == "return":
    assert return_freed_arrays()
first = np.ones((26 << 20,), np.uint8)
del first  # glibc has seen one of this size freed, and keeps the next ones
blocks = [np.ones((25 << 20,), np.uint8) for _ in range(10)]
last = [np.ones((1 << 14,), np.uint8) for _ in range(200)]  # behind them in the store
before = resident()
del blocks
print(before - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_freed_arrays_go_back_to_the_system():
    def freed_mib(how: str) -> int:
        command = [sys.executable, "-c", _KEPT_BLOCKS, how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert freed_mib("return") >= 240  # of 250
    assert freed_mib("keep") < 120
