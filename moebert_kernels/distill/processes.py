"""The end of a program that trains in several processes."""

import gc

import torch.distributed


def end_processes() -> None:
    """Leave the group of processes. Call it last, when the program refers to no trainer any more (`del trainer`).

    Without it a program on CPUs sometimes ends with SIGABRT, "terminate called without an active exception", though its
    results are written: gloo's threads free tensors while Python ends (pytorch/pytorch, pull request 179291). They are
    joined only when nothing refers to the group, and a trainer's wrapped model does.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()
