"""Hyper-parameters by task: those of the paper, and what we use where it has none."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """A training run's settings; the command line overrides any of them."""

    learning_rate: float
    batch_size: int  # sequences per optimizer step, over all devices
    epochs: int
    weight_decay: float
    distill_weight: float  # of the layer-wise objective's two terms; the task loss has weight 1
    max_length: int = 128


# MoEBERT (2204.07675), table 7; batch sizes are its 8 GPUs together, lengths those of its appendix B.
# It has no warm-up, clips gradients at 1.0 and lets the learning rate fall linearly.
PAPER: dict[str, Preset] = {
    "rte": Preset(1e-5, 8, 10, 0.01, 1.0, 512),
    "cola": Preset(2e-5, 8, 10, 0.0, 3.0, 512),
    "mrpc": Preset(3e-5, 8, 5, 0.0, 2.0, 512),
    "sst2": Preset(2e-5, 16, 5, 0.0, 1.0, 512),
    "qnli": Preset(2e-5, 32, 5, 0.0, 2.0, 512),
    "qqp": Preset(3e-5, 64, 5, 0.0, 1.0, 128),
    "mnli": Preset(5e-5, 64, 5, 0.0, 5.0, 128),
    "squad": Preset(3e-5, 32, 5, 0.01, 2.0, 384),
    "squad_v2": Preset(3e-5, 16, 4, 0.1, 1.0, 384),
}

# For tasks that the paper leaves out (STS-B, WNLI) and for tables of one's own.
DEFAULT = Preset(3e-5, 32, 3, 0.0, 1.0)
LANGUAGE_MODEL = Preset(5e-5, 8, 3, 0.01, 1.0, 1024)


def preset_for(task: str) -> Preset:
    """The paper's values where it has any, else `LANGUAGE_MODEL` for "lm" and `DEFAULT`."""
    return PAPER.get(task, LANGUAGE_MODEL if task == "lm" else DEFAULT)
