"""Which implementation runs on which device: the one place of this room that asks.

CUDA: row kernels in Triton, products by cuBLAS with fp32 output. Elsewhere: plain torch. The environment variable
MINITRON_KERNELS=torch|triton overrides the choice of the row kernels, for debugging; Triton runs on CPU tensors under
its interpreter only (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from minitron_nemo.kernels import torch_rows
from minitron_nemo.kernels.products import Products, products
from minitron_nemo.kernels.rows import RowKernels

OVERRIDE = "MINITRON_KERNELS"
# Of a chunk where nobody says how many bytes it may take. With fewer, products are bound by reading weights and adding
# to dW (docs/kernels.md, "The size of a chunk").
CUDA_CHUNK_TOKENS, CPU_CHUNK_TOKENS = 2048, 512


@dataclass(frozen=True)
class Backend:
    rows: RowKernels
    products: Products
    # Whether `rows` takes logits of any dtype, -inf among them, and overwrites nothing before `gradients` and then only
    # the student's; otherwise callers that hold logits copy them into fp32 buffers first.
    any_dtype: bool
    chunk_tokens: int


def backend(device: torch.device) -> Backend:
    """The one for tensors on `device`. ValueError for an unknown override, ImportError where Triton is missing."""
    name = os.environ.get(OVERRIDE) or ("triton" if device.type == "cuda" else "torch")
    chunk_tokens = CUDA_CHUNK_TOKENS if device.type == "cuda" else CPU_CHUNK_TOKENS
    if name == "torch":
        return Backend(torch_rows, products(device), any_dtype=False, chunk_tokens=chunk_tokens)
    if name != "triton":
        raise ValueError(f"{OVERRIDE}={name}: expected torch or triton")
    try:
        from minitron_nemo.kernels import triton_rows
    except ImportError as error:
        raise ImportError(
            f"the loss kernels for {device.type} need Triton ({error}): pip install '.[triton]' in the clone, "
            f"or set {OVERRIDE}=torch"
        ) from error
    return Backend(triton_rows, products(device), any_dtype=True, chunk_tokens=chunk_tokens)
