"""The registry: names, what auto means, what it logs."""

import functools
import logging

import pytest

from kernels_pallas import available_backends, backends, resolve_backend


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
