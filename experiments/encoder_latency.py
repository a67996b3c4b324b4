"""Latency of the arms of experiments/base_encoder.py: all of one dtype in turns, with the teacher in float32."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, cycle, islice
from typing import Any

import torch
from encoder_arms import ARMS, TEACHER
from encoder_study import Cell
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.measuring import Target
from moebert_kernels.bench.clocks import quartiles, timer
from moebert_kernels.bench.timing import WARM_UP, interleaved
from moebert_kernels.files import write_json

SHAPES = ((1, 32), (1, 128), (8, 32), (8, 128))  # sequences, tokens of each
ROUNDS = {(1, 32): 41, (1, 128): 21, (8, 32): 21, (8, 128): 11}
PLAIN = "teacher, float32"  # as transformers runs it; ratios are over it


def measure_latency(cell: Cell, arms: Sequence[str], dtypes: Sequence[str]) -> None:
    """Write latency-DTYPE.json for each dtype: shape -> arm -> times and speeds over the teacher's in float32.

    The weights are those before distillation, and the tokens are real text, on a CPU other in every round: a
    table's experts are as unequal as they are on it, and no number of their rows is the one of before. On a GPU there
    is no int8, and other dtypes are plain casts.
    """
    on_cpu = cell.place.device == "cpu"
    own = [arm for arm in arms if not ARMS[arm].timed_as]
    for dtype in dtypes if on_cpu else [dtype for dtype in dtypes if "int8" not in dtype]:
        models: dict[str, Any] = {PLAIN: cell.teacher}
        for arm in (TEACHER, *own):
            model = copy.deepcopy(cell.teacher) if arm == TEACHER else ARMS[arm].make(cell)
            if on_cpu and (arm == TEACHER or ARMS[arm].packs):
                cell.prepared(model, dtype)
            elif "int8" in dtype:
                continue
            else:
                model.eval().to(getattr(torch, dtype))
            models[arm] = model
        where = environment(Target.of(cell.place.device))
        result = {"environment": where, "task": cell.name, "seed": cell.seed, "shapes": {}}
        for B, T in SHAPES:
            result["shapes"][f"{B}x{T}"] = in_turns(models, partial(real_text, cell, B, T), ROUNDS[B, T])
        write_json(cell.place.runs / f"latency-{cell.place.device}-{dtype}.json", result)
        print(f"{time.strftime('%H:%M:%S')} latency in {dtype}", flush=True)


def real_text(cell: Cell, B: int, T: int, texts: int) -> list[Tensor]:
    """So many (B, T) of token ids of the test rows, one after another and from the first one again."""
    stream = list(chain.from_iterable(cell.columns["test"]["input_ids"]))
    ids = torch.tensor(list(islice(cycle(stream), texts * B * T)), device=cell.place.device)
    return list(ids.view(texts, B, T))


def timed(run: Callable[[], Any], device: torch.device) -> Callable[[], list[float]]:
    """What runs it and gives milliseconds; with one thread of a CPU those of the process, which others do not slow."""
    if device.type != "cpu" or torch.get_num_threads() > 1:
        return timer(run, device).warm_ms

    def cpu_ms() -> list[float]:
        start = time.process_time()
        run()
        return [(time.process_time() - start) * 1e3]

    return cpu_ms


def in_turns(models: dict[str, Any], texts: Callable[[int], list[Tensor]], rounds: int) -> dict[str, Any]:
    """`ms` and `speed` over PLAIN's time in the same round, as quartiles."""
    on_cpu = models[PLAIN].device.type == "cpu"
    calls = texts(WARM_UP + rounds if on_cpu else 1)  # a graph is captured for each
    mask = torch.ones_like(calls[0])

    def round_of(model: Any) -> Callable[[], list[float]]:
        timers = cycle([timed(partial(model, ids, attention_mask=mask), ids.device) for ids in calls])
        return lambda: next(timers)()

    with torch.inference_mode():
        times = interleaved({name: round_of(model) for name, model in models.items()}, rounds)
    return {
        name: {
            "ms": quartiles(of),
            "speed": quartiles([plain / ours for plain, ours in zip(times[PLAIN], of, strict=True)]),
        }
        for name, of in times.items()
    }
