"""The ops in plain torch, for CPUs and for devices without kernels of ours. The ops have checked the arguments."""
