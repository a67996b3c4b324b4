"""Inference: on CPUs prepared models in int8, bfloat16 and float32, on GPUs replays of CUDA graphs."""

# ruff: noqa: E402  what is missing is named before the imports that need it
from moebert_kernels.errors import require_extra

require_extra("train", "transformers")

from moebert_kernels.serve.config import PreparedConfig
from moebert_kernels.serve.graphs import use_cuda_graphs
from moebert_kernels.serve.int8_training import Int8Callback, int8_forward
from moebert_kernels.serve.loading import PreparedLoader
from moebert_kernels.serve.onnx import export_onnx, quantise_onnx
from moebert_kernels.serve.preparation import describe, prepare

__all__ = [
    "Int8Callback",
    "PreparedConfig",
    "PreparedLoader",
    "describe",
    "export_onnx",
    "int8_forward",
    "prepare",
    "quantise_onnx",
    "use_cuda_graphs",
]
