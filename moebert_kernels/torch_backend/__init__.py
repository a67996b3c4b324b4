"""The ops in plain torch: what runs on a CPU, and on any device without kernels of ours. Arguments are checked already."""
