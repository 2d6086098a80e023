"""Work in a process apart: it ends in time, is asked by one at a time, and outlives nobody."""

import concurrent.futures
import os
import subprocess
import sys
import time

import pytest

from swaa_jax import patterns
from swaa_jax.apart import Worker

BOMB = ["((a+)+)+$", "fullmatch", ["a" * 40 + "b"]]


@pytest.fixture
def worker():
    worker = Worker("swaa_jax.patterns")
    yield worker
    worker.stop()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_child_that_computes_too_long_ends_and_another_one_starts(worker):
    started = time.monotonic()
    assert worker.ask(BOMB, seconds=0.5, memory=1 << 29) is None
    assert time.monotonic() - started < 5
    assert worker.ask(["b", "fullmatch", ["b"]], seconds=3, memory=1 << 29).answer is True


def test_threads_get_their_own_answers(worker):
    def ask(number):
        text = "y" * number
        reply = worker.ask(["y*", "fullmatch", [text, "z"]], seconds=3, memory=1 << 29)
        other = worker.ask(["y" * (number + 1), "fullmatch", [text]], seconds=3, memory=1 << 29)
        return reply.answer, other.answer

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(40))) == {(True, False)}


def test_a_fork_has_a_child_of_its_own(worker):
    assert worker.ask(["a", "fullmatch", ["a"]], seconds=3, memory=1 << 29).answer
    with worker._child as ours:  # closes its pipes, and waits
        worker._pid -= 1  # as a fork would see it
        assert worker.ask(["a", "fullmatch", ["a"]], seconds=3, memory=1 << 29).answer
        assert worker._child.pid != ours.pid and ours.poll() is None
        ours.kill()


def test_a_busy_child_ends_though_its_parent_was_killed():
    code = (
        "from swaa_jax.apart import Worker\n"
        "import sys, threading\n"
        "worker = Worker('swaa_jax.patterns')\n"
        "worker.ask(['a', 'fullmatch', ['a']], seconds=1, memory=1 << 29)\n"
        "print(worker._child.pid, flush=True)\n"
        f"worker.ask({BOMB!r}, seconds=1, memory=1 << 29)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        child = int(parent.stdout.readline())
        time.sleep(0.3)
        parent.kill()
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(child)


def test_a_module_that_cannot_be_run_is_told():
    with pytest.raises(RuntimeError, match=r"no_such: expected .* to start a process"):
        Worker("no_such").ask([], seconds=1, memory=1 << 29)


def test_patterns_go_through_it():
    assert patterns.find_groups("p", "(x)", "axb") == ["x"]
