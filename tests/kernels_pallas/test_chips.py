"""The table of chips: a device kind finds its own line, and nothing else's."""

import pytest
from jax.experimental.pallas import tpu

from kernels_pallas import Target
from kernels_pallas.chips import GPUS, TPUS, find_chip, generation_of


@pytest.mark.parametrize("name", TPUS)
def test_each_kind_of_tpu_is_found_by_its_whole_name(name):
    for kind in TPUS[name].kinds:
        assert find_chip(kind) is TPUS[name]
        assert generation_of(Target(platform="tpu", device_kind=kind)) == name


@pytest.mark.parametrize(
    "kind, name",
    [
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
    ],
)
def test_a_gpu_is_found_by_how_its_name_begins(kind, name):
    assert find_chip(kind) is GPUS[name]


@pytest.mark.parametrize("kind", ("cpu", "TPU v3", "TPU v4 lite", "NVIDIA B200"))
def test_a_chip_that_the_table_lacks(kind):
    assert find_chip(kind) is None
    assert generation_of(Target(platform="tpu", device_kind=kind)) == "v5e"


@pytest.mark.parametrize(
    "name, version", [("v4", "v4"), ("v5e", "v5e"), ("v5p", "v5p"), ("v6e", "v6e"), ("tpu7x", "7x")]
)
def test_memories_on_the_chip_are_those_that_jax_knows(name, version):
    info = tpu.get_tpu_info_for_chip(tpu.ChipVersion(version), 1)
    assert TPUS[name].vmem_bytes == info.vmem_capacity_bytes
    assert TPUS[name].smem_bytes == info.smem_capacity_bytes


def test_numbers_are_of_a_plausible_size():
    """A slip of three decimals, or bits for bytes."""
    for chip in (*TPUS.values(), *GPUS.values()):
        assert 1e14 < chip.peak_flops < 1e16
        assert 16 <= chip.hbm_bytes / 2**30 < 300
        # Between 100 and 700 operations a byte, on every chip of these years.
        assert 100 < chip.peak_flops / chip.hbm_bandwidth < 700
