"""One product a group of rows: the experts of a mixture-of-experts layer."""

from kernels_pallas.grouped_matmul.api import grouped_matmul

__all__ = ["grouped_matmul"]
