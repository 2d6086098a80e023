"""Attention of whole blocks of rows: prefill, training, scoring."""

from kernels_pallas.output import AttentionOutput
from kernels_pallas.swa_prefill.api import swa_prefill
from kernels_pallas.swa_prefill.arguments import SAVED

__all__ = ["SAVED", "AttentionOutput", "swa_prefill"]
