"""The registry: names, what auto means, what it logs."""

import logging

import pytest

from kernels_pallas import available_backends, backends, resolve_backend


def test_names():
    assert available_backends() == ("reference", "xla")
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


def test_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match="'auto', 'reference', 'xla' for swa_prefill, got 'cuda'"):
        resolve_backend("cuda")


def test_register_twice():
    with pytest.raises(ValueError, match="expected a new name for swa_decode, got 'xla'"):
        backends.register_backend("swa_decode", "xla")(lambda: None)
