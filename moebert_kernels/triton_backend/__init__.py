"""The ops on Triton kernels: allocates outputs and workspaces, and launches `moebert_kernels.kernels` in order."""
