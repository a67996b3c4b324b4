"""How tensors are passed to `moebert_kernels._C`: pointers, strides in elements, and numbers for their dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

# In the order of IntType in csrc/hash_route.h and of DType in csrc/common.h.
INTEGERS = {dtype: i for i, dtype in enumerate((torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64))}
FLOATS = {dtype: i for i, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16))}


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def stream_of(tensor: Tensor) -> int:
    """The handle of the current stream on the tensor's device."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


def lookup_arguments(ids: Tensor, tables: Tensor | None, mask: Tensor | None) -> tuple[int | bool, ...]:
    """ids (N,) or (L, N), tables (L, V) and a mask (N,) of any number as `_C.hash_route` takes them first."""
    if mask is not None and mask.is_complex():
        mask = mask != 0
    is_float = mask is not None and mask.is_floating_point()
    return (
        ids.data_ptr(), ids.stride(0) if ids.ndim == 2 else 0, ids.stride(-1), INTEGERS[ids.dtype],
        pointer(tables), *((0, 0, 0) if tables is None else (*tables.stride(), INTEGERS[tables.dtype])),
        pointer(mask), *((0, 1, False) if mask is None else (mask.stride(0), mask.element_size(), is_float)),
        0 if tables is None else tables.shape[1],
    )  # fmt: skip
