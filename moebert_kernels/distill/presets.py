"""Settings by task: those of the paper, and what we use where it has none."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import yaml

OTHERS = "others"  # STS-B, WNLI and tables of one's own


@cache
def presets() -> dict[str, dict[str, Any]]:
    """Task -> training arguments, `max_length` and `distill_weight`."""
    return yaml.safe_load((files("moebert_kernels.distill") / "presets.yaml").read_text(encoding="utf-8"))


def preset_for(task: str) -> dict[str, Any]:
    """The settings of a task; of one without any, those of the others."""
    return dict(presets().get(task) or presets()[OTHERS])
