"""Attention under sliding windows, sink tokens and full rows; grouped products of experts.

Arrays and ints in, arrays out: nothing here knows about models or policies. Start at ``mask.py``
(the one visibility formula), then ``swa_prefill/api.py`` and ``swa_decode/api.py``;
``grouped_matmul/api.py`` stands by itself.
"""

from kernels_pallas.backends import Target, available_backends, check_backend, resolve_backend
from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.swa_decode import swa_decode
from kernels_pallas.swa_prefill import SAVED, AttentionOutput, swa_prefill

__all__ = [
    "SAVED",
    "AttentionOutput",
    "Target",
    "available_backends",
    "check_backend",
    "grouped_matmul",
    "resolve_backend",
    "swa_decode",
    "swa_prefill",
]
