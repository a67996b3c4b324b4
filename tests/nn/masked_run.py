"""Masked training of small experts by any number of processes: python -m tests.nn.masked_run FILE."""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from moebert_kernels.layers import MoEFeedForward
from moebert_kernels.nn import GradientMask, SwitchRouter, shared_fold
from tests.nn.mpo import E, H, small_experts

STEPS, MICRO_BATCHES, SENTENCES = 6, 2, 4


def layer():
    torch.manual_seed(0)
    made = MoEFeedForward(SwitchRouter(H, E), small_experts())
    return made.double()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(STEPS, MICRO_BATCHES, SENTENCES, 3, H, generator=generator, dtype=torch.float64)


def train(made, unit, shared, rank=0, world=1):
    """Parameters, and AdamW's first moments of the central tensor with the steps it made."""
    model = DistributedDataParallel(made) if world > 1 else made
    mask = GradientMask(made, 0.5, unit=unit, seed=3)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2, weight_decay=0.1)
    for step, micro_batches in enumerate(data()):
        with mask.step(step), shared_fold(made) if shared else nullcontext():
            for i, x in enumerate(micro_batches):
                last = i == len(micro_batches) - 1
                with nullcontext() if last or world == 1 else model.no_sync():
                    y = model(x[rank::world])
                    (world * (y - 1).square().sum() / x.numel()).backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    central = made.experts.w1.central
    state = optimizer.state[central]
    return {n: p.detach().clone() for n, p in made.named_parameters()} | {
        "moment": state["exp_avg"].clone(), "steps": state["step"].clone().reshape(1)
    }  # fmt: skip


CASES = {"each": ("step", False), "shared": ("step", True), "expert": ("expert", False)}

if __name__ == "__main__":
    rank, world = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    # They meet at a file: between the choice of a free port and its use, another program may take it.
    meeting = f"file://{Path(sys.argv[1]).resolve()}.meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    results = {}
    for case, (unit, shared) in CASES.items():
        results |= {f"{case}.{name}": value for name, value in train(layer(), unit, shared, rank, world).items()}
    save_file(results, f"{sys.argv[1]}.{rank}")
    torch.distributed.destroy_process_group()
