"""The ops on `moebert_kernels._C`: allocates outputs and workspaces, and passes pointers, sizes and the stream."""
