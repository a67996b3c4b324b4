"""The suites, in order of importance, and their cases."""

from __future__ import annotations

import importlib

from benchmarks.measuring import Case, Target

OPS = ("ffn", "ffn_backward", "tiny", "ffn_add_norm", "peers", "routing", "expert_gemm", "mpo")
MODELS = ("encoder", "distill", "loading", "importance")  # importance last: minutes of the original's way
ALL = (*OPS, *MODELS)
_LAYERS = ("ffn", "ffn_backward", "ffn_add_norm", "tiny")  # of one file; each other one has its own


def cases(what: str, target: Target) -> list[Case]:
    """The cases of a suite; its file is imported here, since those of models import transformers."""
    if what in _LAYERS:
        from benchmarks import bench_layers

        return bench_layers.SUITES[what](target)
    return importlib.import_module(f"benchmarks.bench_{what}").cases(target)  # type: ignore[no-any-return]
