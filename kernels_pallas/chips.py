"""What chips can do and hold: the one table from which peaks, memories and block sizes are taken.

Peaks, memory and bandwidth are from the vendors' data sheets, on-chip memories from
``jax._src.pallas.mosaic.tpu_info``, steps from our own static cycles. A line is what JAX counts as
a device: both cores of a v4 or v5p chip, and one of the two dies of a TPU7x chip.
"""

import dataclasses
from collections.abc import Mapping

from kernels_pallas.backends import Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device.

    Attributes:
      kinds: what ``jax.Device.device_kind`` says, or begins with on GPUs.
      peak_flops: bfloat16 operations a second, dense.
      hbm_bytes: device memory.
      hbm_bandwidth: bytes a second.
      link_bandwidth: bytes a second that other chips can send it, over all links together.
      smem_bytes: scalar memory of a TPU core, shared memory of a GPU's multiprocessor.
    """

    kinds: tuple[str, ...]
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    smem_bytes: int

    @property
    def usable_bytes(self) -> int:
        """What programs have of the device memory."""
        return self.hbm_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tpu(Chip):
    """A TPU, with what a grid step of the prefill kernel costs: block sizes are chosen by it.

    Attributes:
      vmem_bytes: vector memory of a core.
      kept_bytes: device memory that no program has, by the compiler's refusals.
      cores: that share the device's programs.
      step: cycles of a step of the forward kernel besides its products and softmax.
      body: ``{block_kv: (unmasked, masked)}`` cycles of those per 512 rows x 128 keys, head dim
        up to 128. Both are static cycles of the compiler's (``benchmarks/tpu_static.py``).
      bytes_per_cycle: what HBM delivers to a core meanwhile, at four fifths of its bandwidth.
    """

    vmem_bytes: int
    kept_bytes: int
    cores: int = 1
    step: int
    body: Mapping[int, tuple[float, float]]
    bytes_per_cycle: int

    @property
    def usable_bytes(self) -> int:
        """What programs have of the device memory.

        >>> TPUS["v5e"].usable_bytes / 2**30
        15.75
        """
        return self.hbm_bytes - self.kept_bytes


_GIB, _MIB, _KIB = 1 << 30, 1 << 20, 1 << 10
_SMALL_UNITS = {128: (277, 282), 256: (272, 279), 512: (259, 262)}
_LARGE_UNITS = {128: (174, 187), 256: (147, 173), 512: (128, 157)}

TPUS: Mapping[str, Tpu] = {
    "v4": Tpu(
        kinds=("TPU v4",),
        peak_flops=275e12,
        hbm_bytes=32 * _GIB,
        hbm_bandwidth=1200e9,
        link_bandwidth=300e9,
        vmem_bytes=16 * _MIB,
        kept_bytes=5 * _GIB // 4,
        smem_bytes=_MIB,
        cores=2,
        step=320,
        body=_SMALL_UNITS,
        bytes_per_cycle=470,
    ),
    "v5e": Tpu(
        kinds=("TPU v5 lite", "TPU v5e"),
        peak_flops=197e12,
        hbm_bytes=16 * _GIB,
        hbm_bandwidth=819e9,
        link_bandwidth=200e9,
        vmem_bytes=128 * _MIB,
        kept_bytes=_GIB // 4,
        smem_bytes=_MIB,
        step=200,
        body=_SMALL_UNITS,
        bytes_per_cycle=440,
    ),
    "v5p": Tpu(
        kinds=("TPU v5", "TPU v5p"),
        peak_flops=459e12,
        hbm_bytes=95 * _GIB,
        hbm_bandwidth=2765e9,
        link_bandwidth=600e9,
        vmem_bytes=64 * _MIB,
        kept_bytes=266 * _MIB,
        smem_bytes=_MIB,
        cores=2,
        step=320,
        body=_SMALL_UNITS,
        bytes_per_cycle=560,
    ),
    "v6e": Tpu(
        kinds=("TPU v6 lite", "TPU v6e"),
        peak_flops=918e12,
        hbm_bytes=32 * _GIB,
        hbm_bandwidth=1638e9,
        link_bandwidth=448e9,
        vmem_bytes=128 * _MIB,
        kept_bytes=3 * _GIB // 4,
        smem_bytes=_MIB,
        step=240,
        body=_LARGE_UNITS,
        bytes_per_cycle=750,
    ),
    "tpu7x": Tpu(
        kinds=("TPU7", "TPU7x"),
        peak_flops=1153.5e12,
        hbm_bytes=96 * _GIB,
        hbm_bandwidth=3690e9,
        link_bandwidth=600e9,
        vmem_bytes=64 * _MIB,
        kept_bytes=5 * _GIB // 4,
        smem_bytes=_MIB,
        step=240,
        body=_LARGE_UNITS,
        bytes_per_cycle=1300,
    ),
}
GPUS: Mapping[str, Chip] = {
    "a100": Chip(
        kinds=("NVIDIA A100",),
        peak_flops=312e12,
        hbm_bytes=40 * _GIB,
        hbm_bandwidth=1555e9,
        link_bandwidth=300e9,
        smem_bytes=164 * _KIB,
    ),
    "a100-80gb": Chip(
        kinds=("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB"),
        peak_flops=312e12,
        hbm_bytes=80 * _GIB,
        hbm_bandwidth=2039e9,
        link_bandwidth=300e9,
        smem_bytes=164 * _KIB,
    ),
    "h100-pcie": Chip(
        kinds=("NVIDIA H100 PCIe",),
        peak_flops=756e12,
        hbm_bytes=80 * _GIB,
        hbm_bandwidth=2000e9,
        link_bandwidth=300e9,
        smem_bytes=228 * _KIB,
    ),
    "h100": Chip(
        kinds=("NVIDIA H100",),
        peak_flops=989e12,
        hbm_bytes=80 * _GIB,
        hbm_bandwidth=3350e9,
        link_bandwidth=450e9,
        smem_bytes=228 * _KIB,
    ),
    "h200": Chip(
        kinds=("NVIDIA H200",),
        peak_flops=989e12,
        hbm_bytes=141 * _GIB,
        hbm_bandwidth=4800e9,
        link_bandwidth=450e9,
        smem_bytes=228 * _KIB,
    ),
}

_HOPPER = ("NVIDIA H100", "NVIDIA H200", "NVIDIA H800", "NVIDIA H20", "NVIDIA GH200")


def find_chip(device_kind: str) -> Chip | None:
    """The chip of that kind; None where the table has none.

    >>> find_chip("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    True
    """
    found = {kind: chip for chip in TPUS.values() for kind in chip.kinds if kind == device_kind}
    found |= {
        kind: chip for chip in GPUS.values() for kind in chip.kinds if device_kind.startswith(kind)
    }
    return found[max(found, key=len)] if found else None


def is_hopper(target: Target) -> bool:
    """Whether a target is a GPU whose compute capability is 9.0.

    >>> is_hopper(Target(platform="gpu", device_kind="NVIDIA H100 80GB HBM3"))
    True
    """
    return target.device_kind.startswith(_HOPPER)


def generation_of(target: Target | None) -> str:
    """The TPU generation of a target, a name of ``TPUS``: v5e where it is no TPU or unknown.

    Args:
      target: None: this process's first device.
    """
    kind = (target or Target.here()).device_kind
    return next((name for name, chip in TPUS.items() if kind in chip.kinds), "v5e")
