"""Kind 24: regular expressions from files end in time, in judges and in adapters' configs."""

import re
import signal
import threading
import time

import pytest
from flax import nnx

import swaa_jax as swaa
from swaa_jax import apart
from swaa_jax.eval.judging import Judged, make_judge
from tests.support.random_models import random_model

BOMBS = [r"((a+)+)+$", r"(a|a)*$", r"(?:(a|aa)+)$"]
MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A limit that a test can wait for."""
    from swaa_jax import patterns

    monkeypatch.setattr(patterns, "PATTERN_SECONDS", 0.5)
    patterns._slow.clear()


def ends_in_time(call, match):
    started = time.monotonic()
    with pytest.raises(ValueError, match=match) as error:
        call()
    assert time.monotonic() - started < 5
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("pattern", BOMBS)
def test_fault_24_a_judges_pattern(pattern):
    judge = make_judge("regex", pattern=f"({pattern})")
    judged = Judged(question="?", references=("1",), response="a" * 40 + "b")
    ends_in_time(lambda: judge(judged), "pattern: expected a regular expression that is matched")
    assert make_judge("regex", pattern="(b)")(judged).reason == "said b"  # and it goes on


@pytest.mark.parametrize("field", ["target_modules", "rank_pattern", "alpha_pattern"])
def test_fault_24_adapters(field):
    bomb = r"(([a-z_.0-9]+)+)+!"
    value = bomb if field == "target_modules" else {bomb: 4}
    config = swaa.LoraConfig(**{"rank": 2, field: value})
    ends_in_time(lambda: swaa.add_lora(random_model(), config, rngs=nnx.Rngs(0)), field)


def test_fault_24_many_slow_calls_count_together():
    from swaa_jax import patterns

    def lengthen():
        for length in range(10, 40):
            patterns.is_fullmatch("p", r"(x|x)*y", ["x" * length])

    ends_in_time(lengthen, "matched within")


def test_fault_24_memory():
    from swaa_jax import patterns

    text = "ab" * 4_000_000
    with pytest.raises(ValueError, match="matched within"):
        patterns.find_groups("p", r"(?:(a|b))*c", text)


@pytest.mark.parametrize(
    "value", ["(", "a{99999999999999999999}", "(" * 2000 + ")" * 2000, "a" * 10**6]
)
@pytest.mark.parametrize("field", ["judge", "target_modules", "rank_pattern"])
def test_fault_24_what_is_no_pattern(field, value):
    make = {
        "judge": lambda: make_judge("regex", pattern=value),
        "target_modules": lambda: swaa.LoraConfig(target_modules=value),
        "rank_pattern": lambda: swaa.LoraConfig(rank_pattern={value: 2}),
    }[field]
    with pytest.raises(ValueError, match="expected a regular expression") as error:
        make()
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.layers\.[02]\..*q_proj",
        r"^(?!.*layers\.0).*q_proj$",  # lookahead, as published adapters have it
        r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|k_proj|o_proj).*?)",
        r"q_proj",
    ],
)
def test_fault_24_the_language_is_pythons(pattern):
    """The oracle is `re`, as PEFT applies it."""
    from swaa_jax import patterns

    names = [MODULE, MODULE.replace("0", "1"), "q_proj", "model.layers.2.mlp.up_proj"]
    for name in names:
        assert patterns.is_fullmatch("p", pattern, [name]) == bool(re.fullmatch(pattern, name))
    text = "x = 1\nŷ = ２ 'a\ud800b'"
    assert patterns.find_groups("p", r"(\w+) =", text) == re.findall(r"(\w+) =", text)


def test_fault_24_an_answer_after_an_interrupt_is_nobodys(monkeypatch):
    """The next expression must not get it."""
    from swaa_jax import patterns

    def interrupt(*args):
        raise KeyboardInterrupt

    assert patterns.is_fullmatch("p", "b", ["b"])
    with monkeypatch.context() as patch:
        patch.setattr(apart, "_receive", interrupt)
        with pytest.raises(KeyboardInterrupt):
            patterns.is_fullmatch("p", "a", ["a"])
    assert not patterns.is_fullmatch("p", "a", ["b"])


def test_fault_24_time_that_others_take_does_not_count():
    """An expression that waits, on a machine that does much else, is not slow."""
    from swaa_jax import patterns

    assert patterns.is_fullmatch("p", "a", ["a"])
    process = patterns._WORKER._child
    process.send_signal(signal.SIGSTOP)
    threading.Timer(1.0, process.send_signal, [signal.SIGCONT]).start()
    assert patterns.is_fullmatch("p", "[bc]", ["b"])
    assert patterns.is_fullmatch("p", "[bc]", ["c"])
