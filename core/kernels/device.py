"""Which kernels run on a tensor's device, and in which precision they compute products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from types import SimpleNamespace

import torch
from torch import Tensor

from core.errors import UserError

_in_bf16 = ContextVar("in_bf16", default=False)


@contextmanager
def products_in_bf16(wanted: bool) -> Iterator[None]:
    """Inside the block, sparse encoding and decoding round the factors of products to bf16, forwards and backwards.
    Sums, results and parameters stay in fp32. Needs the Triton kernels."""
    token = _in_bf16.set(wanted)
    try:
        yield
    finally:
        _in_bf16.reset(token)


def in_bf16() -> bool:
    return _in_bf16.get()


def triton_kernels(x: Tensor) -> SimpleNamespace | None:
    """The kernels `cuda` and `cuda_select` if they can run on this tensor: on a CUDA device with Triton installed.

    Raises UserError if products in bf16 are wanted and these kernels are not available.
    """
    kernels = _imported() if _is_supported(x) else None
    if kernels is None and in_bf16():
        raise UserError(
            f"trainer.precision=bf16-mixed needs a CUDA device and Triton; this is {x.device.type}, "
            f"Triton is {'' if find_spec('triton') else 'not '}installed. Set trainer.precision=32-true."
        )
    return kernels


def _is_supported(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64


@cache
def _imported() -> SimpleNamespace | None:
    if find_spec("triton") is None:
        return None
    from core.kernels import cuda, cuda_select

    return SimpleNamespace(cuda=cuda, select=cuda_select)
