"""The whole way on a real model and real data: `moebert demo`."""

from moebert_kernels.demo.run import run_demo

__all__ = ["run_demo"]
