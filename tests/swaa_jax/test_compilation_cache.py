"""`swaa` keeps compiled programs: a second process compiles nothing."""

import argparse
import json
import subprocess
import sys

import pytest

import swaa_jax as swaa
from swaa_jax import runtime
from swaa_jax.cli import process_args
from tests.support import byte_tokenizer, processes
from tests.support.random_models import random_model

# JAX tells its listeners of each program that it found in the cache, and of each that it did not.
PROGRAM = """
import collections, json, sys
import jax
from swaa_jax.cli.main import main

counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event]))
code = main(sys.argv[1:])
events = {name: counts[f"/jax/compilation_cache/{name}"] for name in ("cache_hits", "cache_misses")}
print(json.dumps({**events, "code": code}))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("cached") / "model"
    model = random_model(vocab_size=byte_tokenizer.VOCAB_SIZE, num_hidden_layers=1)
    swaa.save_model(model, path, tokenizer=byte_tokenizer.build())
    return path


def generate(saved, home, *flags: str) -> tuple[str, dict[str, int]]:
    command = ["generate", str(saved), "ab", "--raw", "--max-new-tokens", "4", *flags]
    # By default JAX keeps what took a second to compile, which these small programs may not.
    variables = {
        "XDG_CACHE_HOME": str(home),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command],
        env=processes.environment(programs_kept=False, **variables),
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    *answer, events = done.stdout.splitlines()
    return "\n".join(answer), json.loads(events)


def test_a_second_process_compiles_nothing(saved, tmp_path):
    answer, first = generate(saved, tmp_path)
    assert first["cache_misses"] >= 3 and first["cache_hits"] == 0  # prefill, first token, decode
    files = sorted(path.name for path in (tmp_path / "swaa_jax" / "compiled").iterdir())
    again, second = generate(saved, tmp_path)
    assert again == answer
    assert second == {"cache_hits": first["cache_misses"], "cache_misses": 0, "code": 0}
    kept = {path.name for path in (tmp_path / "swaa_jax" / "compiled").iterdir()}
    assert kept >= set(files)


@pytest.mark.parametrize("flags, asked", [([], 1), (["--no-compilation-cache"], 0)])
def test_the_flag_turns_it_off(monkeypatch, flags, asked):
    calls = []
    monkeypatch.setattr(runtime, "enable_compilation_cache", lambda: calls.append(1))
    monkeypatch.setattr(runtime, "initialize_distributed", lambda *a, **k: False)
    parser = argparse.ArgumentParser()
    process_args.add_process_arguments(parser, mesh=True)
    process_args.start(parser.parse_args(flags))
    assert len(calls) == asked
