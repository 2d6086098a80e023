"""The table of backends: names, what auto means, what it logs."""

import dataclasses
import functools
import logging
import pathlib

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import Target, available_backends, backends, check_backend, resolve_backend
from kernels_pallas.backends import choose_backend, load_backend
from kernels_pallas.swa_decode.arguments import DecodeArguments
from kernels_pallas.swa_prefill.arguments import PrefillArguments
from swaa_jax.sharding import make_mesh, target_of

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("op", backends.BACKENDS)
def test_every_line_of_the_table_is_a_module(op):
    for name in available_backends(op):
        module = load_backend(op, name)
        assert callable(module.compute) and callable(module.limits)
    assert "xla" in backends._candidates(op, "any platform")


def test_the_readme_shows_the_table():
    found, op = {}, None
    for line in (ROOT / "kernels_pallas" / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 6 and cells[2].startswith("`"):
            op = cells[1].strip("`") or op
            found.setdefault(op, []).append(cells[2].split("`")[1])
    assert found == {op: list(names) for op, names in backends.BACKENDS.items()}


@pytest.mark.parametrize("op", ("swa_prefill", "swa_decode"))
def test_auto_logs_its_choice_once(op, caplog):
    backends._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="kernels_pallas"):
        assert resolve_backend("auto", op=op) == "xla"
        assert resolve_backend("auto", op=op) == "xla"
    assert [record.getMessage() for record in caplog.records] == [
        f"{op}: backend 'auto' is 'xla' on platform 'cpu'"
    ]


@pytest.mark.parametrize(
    "op, platform, names",
    [
        ("swa_prefill", "cpu", ("xla",)),
        ("swa_prefill", "gpu", ("pallas_gpu", "pallas_triton", "cudnn", "xla")),
        ("swa_prefill", "tpu", ("pallas_tpu", "xla")),
        ("swa_decode", "gpu", ("pallas_gpu", "pallas_triton", "xla")),
        ("grouped_matmul", "tpu", ("pallas_tpu", "xla")),
        ("grouped_matmul", "gpu", ("pallas_gpu", "xla")),
        ("grouped_matmul", "a new platform", ("xla",)),
    ],
)
def test_what_auto_takes_where(op, platform, names):
    assert backends._candidates(op, platform) == names
    assert resolve_backend(op=op, platform=platform) == names[0]


class ShortOnly:
    """A backend of `made_up` below."""

    @staticmethod
    def limits(arguments):
        return ("text: expected at most 2 letters, got more",) if len(arguments.text) > 2 else ()

    @staticmethod
    def drawbacks(arguments):
        return ("it is slow with z",) if "z" in arguments.text else ()

    @staticmethod
    def compute(arguments):
        return f"short {arguments.text}"


class Whatever:
    limits = staticmethod(backends.no_limits)

    @staticmethod
    def compute(arguments):
        return f"any {arguments.text}"


@dataclasses.dataclass
class Text:
    text: str
    target: Target = dataclasses.field(
        default_factory=lambda: Target(platform="tpu", device_kind="TPU v5 lite")
    )


@pytest.fixture
def made_up(monkeypatch):
    """An operation of two backends."""
    table = {"short": backends.Backend(platform="tpu"), "any": backends.Backend()}
    monkeypatch.setitem(backends.BACKENDS, "made_up", table)
    modules = {"short": ShortOnly, "any": Whatever}
    monkeypatch.setattr(backends, "load_backend", lambda op, name: modules[name])
    return functools.partial(backends.compute, "made_up")


def test_auto_passes_over_what_has_limits_or_drawbacks(made_up, caplog):
    backends._log_choice.cache_clear()
    assert made_up("auto", Text("ab")) == "short ab"
    with caplog.at_level(logging.INFO, logger="kernels_pallas"):
        assert made_up("auto", Text("abc")) == "any abc"
        assert made_up("auto", Text("z")) == "any z"
        assert made_up("auto", Text("z")) == "any z"
    told = "made_up: backend 'auto' is 'any' on platform 'tpu'; it leaves out 'short': "
    reasons = ("text: expected at most 2 letters, got more", "it is slow with z")
    assert [record.getMessage() for record in caplog.records] == [told + why for why in reasons]


def test_choices_are_collected(made_up):
    with backends.record_choices() as found:
        for choice, text in (("auto", "abc"), ("auto", "abd"), ("short", "ab"), ("auto", "ab")):
            made_up(choice, Text(text))
    made_up("any", Text("ab"))
    told = [(each.name, each.is_named, dict(each.left_out)) for each in found]
    assert told == [
        ("any", False, {"short": "text: expected at most 2 letters, got more"}),
        ("short", True, {}),
        ("short", False, {}),
    ]
    assert not backends._RECORDS


def test_a_named_backend_runs_within_its_limits_and_raises_beyond_them(made_up):
    assert made_up("short", Text("z")) == "short z", "a drawback is no limit"
    assert made_up("any", Text("ab")) == "any ab"
    with pytest.raises(
        NotImplementedError,
        match="made_up: backend 'short' cannot compute this: text: expected at most 2 letters, got "
        "more; change that, or pass backend='auto' or 'xla'",
    ):
        made_up("short", Text("abc"))


def test_unknown_name_lists_the_names():
    with pytest.raises(
        ValueError,
        match="'auto', 'cudnn', 'pallas_gpu', 'pallas_tpu', 'pallas_triton', 'reference', 'xla' "
        "for swa_prefill",
    ):
        resolve_backend("cuda")


def prefill_arguments(target=None):
    x = jax.ShapeDtypeStruct((1, 256, 2, 128), "bfloat16")
    return PrefillArguments(
        q=x,
        k=x,
        v=x,
        window=64,
        num_sink_tokens=4,
        scale=1.0,
        target=target,
    )


def decode_arguments(target=None):
    q, cache = (jax.ShapeDtypeStruct((1, size, 2, 128), "bfloat16") for size in (1, 512))
    return DecodeArguments(
        q=q,
        cache_k=cache,
        cache_v=cache,
        q_positions=jax.ShapeDtypeStruct((1, 1), "int32"),
        cache_positions=jax.ShapeDtypeStruct((1, 512), "int32"),
        new_k=q,
        new_v=q,
        window=64,
        num_sink_tokens=4,
        scale=1.0,
        target=target,
    )


MADE = {"swa_prefill": prefill_arguments, "swa_decode": decode_arguments}
KINDS = ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x")


@pytest.mark.parametrize("op", MADE)
def test_auto_follows_the_target_and_not_this_process(op):
    for kind in KINDS:
        target = Target(platform="tpu", device_kind=kind)
        assert choose_backend(op, "auto", MADE[op](target)) == "pallas_tpu"
    assert choose_backend(op, "auto", MADE[op]()) == "xla"


def test_the_target_is_told_by_the_mesh():
    assert target_of(None) is None
    target = target_of(make_mesh(jax.devices()[:2], fsdp=2))
    assert target == Target.here() == Target(platform="cpu", device_kind="cpu")


@pytest.mark.parametrize("op", MADE)
def test_a_named_backend_that_does_not_run_here_says_so(op):
    with pytest.raises(
        NotImplementedError,
        match=f"{op}: backend 'pallas_tpu' expects platform 'tpu', got 'cpu'; pass .*'xla'.*target",
    ):
        choose_backend(op, "pallas_tpu", MADE[op]())
    with pltpu.force_tpu_interpret_mode():
        assert choose_backend(op, "pallas_tpu", MADE[op]()) == "pallas_tpu"


@pytest.mark.parametrize(
    "choice, prefill, decode",
    [
        ("reference", "reference", "reference"),
        ("swa_prefill=reference", "reference", "xla"),
        (" swa_prefill = pallas_tpu , swa_decode=reference", "pallas_tpu", "reference"),
        ("swa_decode=auto", "xla", "xla"),
        ("", "xla", "xla"),
    ],
)
def test_the_environment_stands_in_for_auto(choice, prefill, decode, monkeypatch):
    monkeypatch.setenv("SWAA_BACKEND", choice)
    assert resolve_backend("auto", op="swa_prefill") == prefill
    assert resolve_backend("auto", op="swa_decode") == decode
    assert resolve_backend("xla", op="swa_prefill") == "xla"
    if choice:
        assert resolve_backend(choice, op="swa_decode") == decode


def test_the_environment_is_logged(monkeypatch, caplog):
    backends._log_variable.cache_clear()
    monkeypatch.setenv("SWAA_BACKEND", "swa_decode=reference")
    with caplog.at_level(logging.INFO, logger="kernels_pallas"):
        choose_backend("swa_decode", "auto", decode_arguments())
    assert "swa_decode: backend 'reference', from the environment's SWAA_BACKEND" in caplog.text


@pytest.mark.parametrize(
    "choice, message",
    [
        ("cuda", "expected one of 'auto', 'cudnn', .* for swa_prefill, got 'cuda'"),
        (
            "cudnn",
            "expected .* swa_decode, got 'cudnn'; for swa_prefill alone write 'swa_prefill=c",
        ),
        (
            "ragged_dot",
            "expected .* for swa_prefill, got 'ragged_dot'; for grouped_matmul alone write ",
        ),
        ("swa_decode=cuda", "expected one of .* for swa_decode, got 'cuda'"),
        ("decode=xla", "expected a backend, or one .* swa_prefill, swa_decode.*; got 'decode=xla'"),
        ("swa_decode=xla,swa_decode=xla", "expected a backend, or one for each of some ops"),
        ("swa_decode=", "expected a backend, or one for each of some ops"),
    ],
)
def test_choices_that_name_nothing(choice, message, monkeypatch):
    with pytest.raises(ValueError, match=f"^backend: {message}"):
        check_backend(choice)
    monkeypatch.setenv("SWAA_BACKEND", choice)
    with pytest.raises(ValueError, match=f"^SWAA_BACKEND: {message}"):
        check_backend("auto")
