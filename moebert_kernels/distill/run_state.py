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

from moebert_kernels.distill.identity import changed, described
from moebert_kernels.distill.objectives import Objective
from moebert_kernels.distill.progress import TermMeter
from moebert_kernels.errors import OtherRun, UserError

FILE = "moebert_state.pt"


def last_whole_checkpoint(folder: str | Path, processes: int = 1) -> str | None:
    """The newest checkpoint in a run's folder that was written to its end; None: there is none."""
    found = {
        int(match[1]): path
        for path in (Path(folder).iterdir() if Path(folder).is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    return next((str(found[step]) for step in sorted(found, reverse=True) if _is_whole(found[step], processes)), None)


def _is_whole(checkpoint: Path, processes: int) -> bool:
    state = checkpoint / "trainer_state.json"
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    names = {file.name for file in checkpoint.iterdir()}
    generators = {"rng_state.pth"} if processes == 1 else {f"rng_state_{rank}.pth" for rank in range(processes)}
    # none of these: of another number of processes; some: one of them did not come to the end
    return FILE in names and (generators <= names or names.isdisjoint(generators))


def save_state(
    folder: str | Path, objective: Objective | None, meter: TermMeter, identity: Mapping[str, Any],
    reduce: Callable[[Tensor], Tensor], writes: bool,
) -> None:  # fmt: skip
    """Write the state of what is trained beside the model. All processes call it, and the one that `writes` does."""
    state: dict[str, Any] = {"identity": json.loads(json.dumps(identity, default=str)), "meter": meter.state()}
    if objective is not None and objective.maps is not None:
        state["maps"] = objective.maps.state_dict()
    if objective is not None and objective.adversary is not None:
        adversary = objective.adversary
        state["adversary"] = adversary.state(reduce)
        state["discriminator"] = adversary.network.state_dict()
        state["discriminator_optimizer"] = adversary.part.optimizer.state_dict()
    if writes:
        Path(folder).mkdir(parents=True, exist_ok=True)
        torch.save(state, Path(folder) / FILE)


def load_state(folder: str | Path, objective: Objective | None, meter: TermMeter, args: Any) -> None:
    """Take up what `save_state` wrote."""
    state = _read(Path(folder))
    rank = args.process_index
    meter.load_state(state["meter"], args.device, rank)
    if objective is not None and objective.maps is not None:
        objective.maps.load_state_dict(state["maps"])
    if objective is not None and objective.adversary is not None:
        adversary = objective.adversary
        adversary.network.load_state_dict(state["discriminator"])
        adversary.part.optimizer.load_state_dict(state["discriminator_optimizer"])
        adversary.load_state(state["adversary"], rank)


def check_same_run(folder: str | Path, identity: Mapping[str, Any]) -> None:
    """Raise a UserError, which names what differs, unless a checkpoint is of a run with these facts."""
    changes = changed(_read(Path(folder))["identity"], identity)
    if changes:
        raise OtherRun(
            f"resume_from_checkpoint: expected a checkpoint of the same run, got {folder} with other"
            f" {described(changes)}", Path(folder), False, changes,
        )  # fmt: skip


def _read(folder: Path) -> dict[str, Any]:
    if not (folder / FILE).exists():
        raise UserError(f"resume_from_checkpoint: expected a checkpoint of MoETrainer, got {folder} without {FILE}")
    return torch.load(folder / FILE, map_location="cpu", weights_only=True)
