"""What a checkpoint of transformers' `Trainer` lacks: the objective's maps, the discriminator, the log's running sums.

`Trainer` writes `trainer_state.json` last, and so a checkpoint is whole where that one can be read. A run that was
killed while it wrote goes on from the checkpoint before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebert_kernels.distill.identity import check_same
from moebert_kernels.distill.objectives import Objective
from moebert_kernels.distill.terms import Terms
from moebert_kernels.errors import UserError

FILE = "moebert_state.pt"


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint in a run's folder that was written to its end; None: there is none."""
    found = {
        int(match[1]): path
        for path in (Path(folder).iterdir() if Path(folder).is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    return next((str(found[step]) for step in sorted(found, reverse=True) if _is_whole(found[step])), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        processes = _read(checkpoint)["processes"]
    except (OSError, ValueError):
        return False
    names = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    return all((checkpoint / name).exists() for name in names)  # the other processes write these, maybe later


def save_state(
    folder: str | Path, objective: Objective | None, terms: Terms, identity: Mapping[str, Any],
    reduce: Callable[[Tensor], Tensor], args: Any,
) -> None:  # fmt: skip
    """Write the state of what is trained beside the model. All processes call it, and one of them writes."""
    facts = json.loads(json.dumps(identity, default=str))
    state: dict[str, Any] = {"processes": args.world_size, "identity": facts, "meter": terms.state()}
    if objective is not None and objective.maps is not None:
        state["maps"] = objective.maps.state_dict()
    if objective is not None and objective.adversary is not None:
        adversary = objective.adversary
        state["adversary"] = adversary.state(reduce)
        state["discriminator"] = adversary.network.state_dict()
        state["discriminator_optimizer"] = adversary.optimizer.state_dict()
    if args.should_save:
        Path(folder).mkdir(parents=True, exist_ok=True)
        torch.save(state, Path(folder) / FILE)


def load_state(folder: str | Path, objective: Objective | None, terms: Terms, args: Any) -> None:
    """Take up what `save_state` wrote."""
    state = _read(Path(folder))
    rank = args.process_index
    terms.load_state(state["meter"], args.device, rank)
    if objective is not None and objective.maps is not None:
        objective.maps.load_state_dict(state["maps"])
    if objective is not None and objective.adversary is not None:
        adversary = objective.adversary
        adversary.network.load_state_dict(state["discriminator"])
        adversary.optimizer.load_state_dict(state["discriminator_optimizer"])
        adversary.load_state(state["adversary"], rank)


def check_same_run(folder: str | Path, identity: Mapping[str, Any]) -> None:
    """Raise a UserError, which names what differs, unless a checkpoint is of a run with these facts."""
    wanted = f"resume_from_checkpoint: expected a checkpoint of the same run, got {folder} with"
    check_same(_read(Path(folder))["identity"], identity, wanted)


def _read(folder: Path) -> dict[str, Any]:
    if not (folder / FILE).exists():
        raise UserError(f"resume_from_checkpoint: expected a checkpoint of MoETrainer, got {folder} without {FILE}")
    return torch.load(folder / FILE, map_location="cpu", weights_only=True)
