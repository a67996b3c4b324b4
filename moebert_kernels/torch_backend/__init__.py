"""The ops in plain torch: what runs on a CPU, and on a device without kernels of ours. Arguments arrive checked."""
