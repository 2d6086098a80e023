"""Attention of a few new tokens to a cache: decoding, chunked prefill, speculative checks."""

from kernels_pallas.swa_decode.api import swa_decode

__all__ = ["swa_decode"]
