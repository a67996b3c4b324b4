"""`python -m moebert_kernels` is `moebert`."""

from moebert_kernels.cli import main

main()
