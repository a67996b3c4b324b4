"""How tensors are passed to `moebert_kernels._C`: pointers, strides in elements, and numbers for their dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from moebert_kernels.activation import ACTIVATIONS as NAMES

# In the order of IntType in csrc/token_lookup.h and of DType and Activation in csrc/common.h.
INTEGERS = {dtype: i for i, dtype in enumerate((torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64))}
FLOATS = {dtype: i for i, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16))}
ACTIVATIONS = {name: i for i, name in enumerate(NAMES)}


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def stream_of(tensor: Tensor) -> int:
    """The handle of the current stream on the tensor's device."""
    return torch.cuda.current_stream(tensor.device).cuda_stream
