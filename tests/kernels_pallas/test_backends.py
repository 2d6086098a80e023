"""The registry: names, what auto means, what it logs."""

import functools
import logging

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import Target, available_backends, backends, check_backend, resolve_backend
from kernels_pallas.backends import get_backend
from kernels_pallas.swa_decode.arguments import DecodeArguments
from kernels_pallas.swa_prefill.arguments import PrefillArguments
from swaa_jax.sharding import make_mesh, target_of


def test_names():
    assert available_backends() == ("pallas_tpu", "reference", "xla")
    assert available_backends("swa_decode") == ("pallas_tpu", "reference", "xla")


@pytest.mark.parametrize("op", ("swa_prefill", "swa_decode"))
def test_auto_logs_its_choice_once(op, caplog):
    backends._resolve_auto.cache_clear()
    with caplog.at_level(logging.INFO, logger="kernels_pallas"):
        assert resolve_backend("auto", op=op) == "xla"
        assert resolve_backend("auto", op=op) == "xla"
    assert [record.getMessage() for record in caplog.records] == [
        f"{op}: backend 'auto' is 'xla' on platform 'cpu'"
    ]


def test_auto_prefers_a_platform_kernel():
    registered = ("pallas_gpu", "pallas_tpu", "reference", "xla")
    assert backends._resolve_auto("an op", "tpu", registered) == "pallas_tpu"
    assert backends._resolve_auto("an op", "gpu", registered) == "pallas_gpu"
    assert backends._resolve_auto("an op", "cpu", registered) == "xla"
    assert backends._resolve_auto("an op", "tpu", ("reference", "xla")) == "xla"


def test_auto_passes_over_what_has_limits(caplog):
    def short_only(arguments):
        return ("no long inputs",) if len(arguments) > 2 else ()

    backends.register_backend("a test's op", "pallas_tpu", limits=short_only)(lambda: "tpu")
    backends.register_backend("a test's op", "xla")(lambda: "xla")
    get = functools.partial(backends.get_backend, "a test's op", platform="tpu")
    try:
        assert get("auto", arguments="ab")() == "tpu"
        with caplog.at_level(logging.INFO, logger="kernels_pallas"):
            assert get("auto", arguments="abc")() == "xla"
        assert "leaves out 'pallas_tpu': no long inputs" in caplog.text
        assert get("pallas_tpu", arguments="abc")() == "tpu"
        assert get("auto")() == "tpu"
    finally:
        del backends._REGISTRY["a test's op"]
        del backends._LIMITS["a test's op", "pallas_tpu"]


def test_unknown_name_lists_the_names():
    with pytest.raises(
        ValueError, match="'auto', 'pallas_tpu', 'reference', 'xla' for swa_prefill"
    ):
        resolve_backend("cuda")


def test_register_twice():
    with pytest.raises(ValueError, match="expected a new name for swa_decode, got 'xla'"):
        backends.register_backend("swa_decode", "xla")(lambda: None)


def prefill_arguments(target=None):
    x = jax.ShapeDtypeStruct((1, 256, 2, 128), "bfloat16")
    return PrefillArguments(
        q=x,
        k=x,
        v=x,
        window=64,
        num_sink_tokens=4,
        q_full=None,
        lengths=None,
        segment_ids=None,
        q_offset=0,
        scale=1.0,
        softcap=None,
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
        q_full=None,
        scale=1.0,
        softcap=None,
        target=target,
    )


MADE = {"swa_prefill": prefill_arguments, "swa_decode": decode_arguments}
KINDS = ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x")


@pytest.mark.parametrize("op", MADE)
def test_auto_follows_the_target_and_not_this_process(op):
    kernel = get_backend(op, "pallas_tpu")
    for kind in KINDS:
        target = Target(platform="tpu", device_kind=kind)
        assert get_backend(op, "auto", arguments=MADE[op](target)) is kernel
    assert get_backend(op, "auto", arguments=MADE[op]()) is get_backend(op, "xla")


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
        get_backend(op, "pallas_tpu", arguments=MADE[op]())
    with pltpu.force_tpu_interpret_mode():
        get_backend(op, "pallas_tpu", arguments=MADE[op]())


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
        get_backend("swa_decode", "auto", arguments=decode_arguments())
    assert "swa_decode: backend 'reference', from the environment's SWAA_BACKEND" in caplog.text


@pytest.mark.parametrize(
    "choice, message",
    [
        ("cuda", "expected one of 'auto', 'pallas_tpu', .* for grouped_matmul, got 'cuda'"),
        (
            "ragged_dot",
            "expected .* for swa_decode, got 'ragged_dot'; for grouped_matmul alone write ",
        ),
        ("swa_decode=cuda", "expected one of .* for swa_decode, got 'cuda'"),
        ("decode=xla", "expected a backend, or one .* swa_decode, swa_prefill.*; got 'decode=xla'"),
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
