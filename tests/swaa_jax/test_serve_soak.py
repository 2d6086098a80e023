"""`swaa serve` as a process under many clients, killed once, and for ten minutes: all holds."""

import collections
import contextlib
import dataclasses
import os
import pathlib
import random
import subprocess
import sys
import threading
import time

import httpx2
import numpy as np
import pytest

import swaa_jax as swaa
from swaa_jax.engine import EngineOptions
from tests.support import processes
from tests.support.serve_clients import KEY, WANTED, Clients, asked, held, right_answers

pytest.importorskip("starlette")
# The bare engine answers some thousand requests once more.
pytestmark = pytest.mark.usefixtures("no_type_checks")

ADAPTER = pathlib.Path(swaa.__file__).parent / "assets" / "tiny-retriever-lora"
POLICIES = {"narrow": "window=32,sinks=4", "every": "window=32,full_layers=1::2,decode=full"}
NAMES = ("tiny-retriever", "tiny-retriever:narrow", "tiny-retriever:every", "tiny-retriever@lora")
ROOM = EngineOptions(num_slots=4, max_tokens=256, chunk_size=32, page_size=32)
NUM_CLIENTS, MINUTES, EVERY_S = 32, 10, 15
MIB = 1 << 20


def models():
    """What is behind the server's names."""
    base = swaa.load_model("tiny-retriever", dtype="float32")
    found = {f"tiny-retriever:{label}": base.with_policy(one) for label, one in POLICIES.items()}
    tuned = swaa.load_adapter(base, ADAPTER, with_policy=True)
    return {"tiny-retriever": base, **found, "tiny-retriever@lora": tuned}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """What a process takes of the machine: bytes in memory, threads, open files."""

    rss: int
    threads: int
    files: int

    @classmethod
    def of(cls, pid: int) -> "Usage":
        """The process's, now."""
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return cls(
            rss=int(fields["VmRSS"].split()[0]) * 1024,
            threads=int(fields["Threads"]),
            files=len(os.listdir(f"/proc/{pid}/fd")),
        )


class ServerProcess:
    """`swaa serve tiny-retriever` on one port, which can be killed and started again.

    Args:
        directory: for its keys and its log.
    """

    def __init__(self, directory: pathlib.Path):
        self.port = processes.free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = directory / "log.txt"
        (directory / "keys.txt").write_text(f"# of the tests\n{KEY}\n")
        also = [f"--also={label}={policy}" for label, policy in POLICIES.items()]
        self._command = [
            sys.executable, "-m", "swaa_jax.cli.main", "serve", "tiny-retriever",
            "--dtype", "float32", "--slots", "4", "--max-tokens", "256", "--chunk-size", "32",
            "--max-snapshots", "4", "--port", str(self.port), *also, f"--adapter=lora={ADAPTER}",
            "--api-keys", str(directory / "keys.txt"), "--most-requests", "64",
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        """Starts it, and waits until it takes requests."""
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self._command, env=processes.environment(), stdout=subprocess.PIPE, stderr=log
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        assert line.startswith("serving tiny-retriever, "), self.log.read_text()

    def usage(self) -> Usage:
        """What the process takes now."""
        return Usage.of(self.process.pid)

    def wait_until_empty(self) -> None:
        """No request, no slot and no page is held."""
        for _ in range(300):
            found = held(httpx2.get(f"{self.url}/metrics", trust_env=False).text)
            assert len(found) == 3 * len(NAMES)
            if not any(found.values()):
                return
            time.sleep(0.1)
        raise AssertionError(found)


@pytest.fixture
def server(tmp_path):
    with contextlib.ExitStack() as stack:
        served = ServerProcess(tmp_path)
        stack.callback(lambda: (served.process.kill(), served.process.communicate()))
        yield served


def check(outcomes, bodies):
    """Every request came to what it must, every answer is the bare engine's; gives counts."""
    assert sorted(outcomes) == list(range(len(bodies)))
    wrong = {number: one for number, one in outcomes.items() if not one.is_right}
    assert not wrong
    numbers = [number for number, one in outcomes.items() if one.kind == "answer"]
    tok = swaa.load_tokenizer("tiny-retriever")
    want = right_answers(models(), tok, [bodies[number] for number in numbers], ROOM)
    found = [outcomes[number].text for number in numbers]
    assert found == want
    kinds = collections.Counter(one.kind for one in outcomes.values())
    assert set(kinds) == set(WANTED)
    return kinds


def check_some_with_generate(outcomes, bodies, rng, *, count):
    """The bare engine's answers are those of `generate`, too, which is the promise."""
    tok, under = swaa.load_tokenizer("tiny-retriever"), models()
    answers = [number for number, one in outcomes.items() if one.kind == "answer"]
    for number in rng.sample(answers, count):
        body = bodies[number]
        want = swaa.generate(
            under[body["model"]],
            tok,
            [body["prompt"]],
            max_new_tokens=body["max_tokens"],
            temperature=body["temperature"],
            seed=body["seed"],
        )
        assert outcomes[number].text == want.texts[0]


def check_flat(before, after):
    """Both after all clients have gone: a connection or a feed that stays would show.

    Memory may grow by what allocators keep of pieces, far less than 1,000 requests' bodies, rows
    and tokens would be if they were kept.
    """
    assert after.threads <= before.threads
    assert after.files <= before.files + 2, "but for who has just asked for the figures"
    assert after.rss - before.rss < 16 * MIB


@pytest.mark.slow
def test_a_server_that_is_killed_loses_nothing_without_an_error(server):
    rng = random.Random(0)
    bodies = [asked(rng, number, NAMES) for number in range(1000)]
    clients = Clients(server.url, bodies)
    start = time.perf_counter()
    thread = threading.Thread(target=clients.run, args=(NUM_CLIENTS,))
    thread.start()
    while thread.is_alive() and len(clients.outcomes) < 500:
        time.sleep(0.01)
    server.process.kill()
    server.process.communicate()
    done = len(clients.outcomes)
    server.start()
    thread.join()
    seconds = time.perf_counter() - start
    server.wait_until_empty()
    breaks = sum(one.breaks > 0 for one in clients.outcomes.values())
    kinds = check(clients.outcomes, bodies)
    check_some_with_generate(clients.outcomes, bodies, rng, count=8)
    assert 500 <= done < 700
    assert 1 <= breaks <= NUM_CLIENTS  # those that were under way, and no other
    print(f"{seconds:.0f} s, {1000 / seconds:.1f} requests/s, {breaks} broke, {dict(kinds)}")


@pytest.mark.slow
def test_memory_threads_and_files_are_flat_over_1000_requests(server):
    rng = random.Random(1)
    bodies = [asked(rng, number, NAMES) for number in range(1200)]
    warm = Clients(server.url, bodies[:200]).run(NUM_CLIENTS)
    server.wait_until_empty()
    before, start = server.usage(), time.perf_counter()
    outcomes = Clients(server.url, bodies[200:]).run(NUM_CLIENTS)
    seconds = time.perf_counter() - start
    server.wait_until_empty()
    after = server.usage()
    print(f"{1000 / seconds:.1f} requests/s, {before}, {after}")
    outcomes = warm | {200 + number: one for number, one in outcomes.items()}
    assert not any(one.breaks for one in outcomes.values())
    check(outcomes, bodies)
    check_flat(before, after)


def growth(sizes):
    """Of samples: from first to last, and the median of a minute of the second half.

    Allocators grow by steps, at peaks; what is lost with each request grows at all times.
    """
    minute = 60 // EVERY_S
    later = np.array(sizes[len(sizes) // 2 :])
    return sizes[-1] - sizes[0], float(np.median(later[minute:] - later[:-minute]))


def test_what_grows_with_each_request_is_seen():
    steps = [900.0 + at // 12 for at in range(33)]
    assert growth(steps)[1] == 0
    assert growth([900.0 + 0.1 * at for at in range(33)])[1] == pytest.approx(0.4)


@pytest.mark.slow
def test_it_all_holds_for_ten_minutes(server):
    bodies, outcomes, samples = [], {}, []
    rng, start, idle = random.Random(2), time.perf_counter(), None
    over = threading.Event()

    def look():
        while not over.wait(EVERY_S):
            samples.append((time.perf_counter() - start, server.usage()))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        while time.perf_counter() - start < 60 * MINUTES:
            # Clients of their own, and so connections: they come and go.
            some = [asked(rng, len(bodies) + at, NAMES) for at in range(250)]
            found = Clients(server.url, some).run(NUM_CLIENTS)
            outcomes |= {len(bodies) + number: one for number, one in found.items()}
            bodies += some
            if idle is None:
                server.wait_until_empty()
                idle = server.usage()
    finally:
        over.set()
        thread.join()
    seconds = time.perf_counter() - start
    server.wait_until_empty()
    after = server.usage()
    print(f"{len(bodies) / seconds:.1f} requests/s, {len(bodies)} in all")
    for at, usage in samples:
        print(f"{at:4.0f} s  {usage.rss / MIB:7.1f} MiB  {usage.threads:3}  {usage.files:3}")
    late = [usage for at, usage in samples if at >= 120]
    grown, steady = growth([usage.rss / MIB for usage in late])
    print(f"{idle}, {after}, {grown:.2f} MiB, {steady:.3f} MiB/min", flush=True)
    assert not any(one.breaks for one in outcomes.values())
    kinds = check(outcomes, bodies)
    print(dict(kinds))
    assert after.threads <= idle.threads
    assert after.files <= idle.files + 2, "but for who has just asked for the figures"
    assert max(usage.files for usage in late) <= idle.files + 2 * NUM_CLIENTS
    # A thousand bodies, prompts and answers that stayed would be more than either. What is kept
    # for reuse is full long before: 4 snapshots of each name, and all pages.
    assert grown < 8
    assert steady < 0.3
