"""Whole encoders for inference on a CPU: dense and converted, float32, bfloat16 and int8, in torch and ONNX Runtime.

    python -m benchmarks.serving                    # BERT-base, one thread: about four minutes on an idle machine
    python -m benchmarks.serving --layers 2 --smoke # tries the code, writes nothing

All ways run in turns in one process. Before anything is timed, each one's outputs are compared with the float32 model
that it was made of. Ratios are medians over rounds, of the two times in the same round, with their quartiles.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from benchmarks.environment import environment, load_average, results_folder, version
from benchmarks.measuring import Target, spread
from moebert_kernels.convert import convert_to_moe
from moebert_kernels.serve import describe, export_onnx, prepare, quantise_onnx

SHAPES = ((1, 32), (1, 128), (8, 128))  # sequences, tokens of each
ROUNDS = {(1, 32): 31, (1, 128): 15, (8, 128): 7}
# relative distance of the hidden states from those of the float32 model, whose weights are random
ALLOWED = {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.15}  # by what a name contains
# ours, over what, at least how many times as fast at each of SHAPES
REQUIRED = (
    ("moe int8", "dense int8", (1.25, 1.5, 1.6)),
    ("moe int8", "dense int8 torch.ao", (1.0, 1.0, 1.0)),
    ("moe int8", "dense int8 onnx", (1.0, 1.0, 1.0)),
    ("moe int8", "dense int8 onnx fused", (1.0, 1.0, 1.0)),
    ("moe int8", "dense float32 plain", (5.0, 5.0, 5.0)),
    ("moe bfloat16", "dense bfloat16", (1.15, 1.4, 1.6)),
    ("moe float32", "dense float32", (1.0, 1.45, 1.85)),
    ("moe float32 plain", "dense float32 plain", (1.0, 1.45, 1.85)),
    ("moe int8 onnx", "dense int8 onnx", (None, None, 1.4)),
)
Run = Callable[[Tensor, Tensor], Tensor]


def of_model(model: nn.Module) -> Run:
    return lambda ids, mask: model(ids, attention_mask=mask).last_hidden_state


def of_file(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        return torch.from_numpy(session.run(None, {name: given[name].numpy() for name in names})[0])

    return run


def ways(layers: int, folder: Path) -> Iterator[tuple[str, str, Run]]:
    """Name, the float32 model that it was made of, and how it runs."""
    torch.manual_seed(0)
    dense = BertModel(BertConfig(num_hidden_layers=layers)).eval()
    moe = convert_to_moe(copy.deepcopy(dense), importance=torch.rand(layers, 3072)).eval()
    ideal = BertModel(BertConfig(num_hidden_layers=layers, intermediate_size=768)).eval()
    for name, model in (("dense", dense), ("moe", moe), ("ideal", ideal)):
        yield f"{name} float32 plain", name, of_model(model)
        for dtype in ("float32", "bfloat16", "int8", "int8-token"):
            if name != "ideal" or dtype == "int8":
                prepared = prepare(copy.deepcopy(model), dtype)
                print(f"{name}, {dtype}:\n{describe(prepared)}", flush=True)
                yield f"{name} {dtype}", name, of_model(prepared)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is said to move to another package
        ao = torch.ao.quantization.quantize_dynamic(copy.deepcopy(dense), {nn.Linear}, dtype=torch.qint8)
    yield "dense int8 torch.ao", "dense", of_model(ao)
    if version("onnxruntime") is None or version("onnxscript") is None:
        print("ONNX Runtime is left out: pip install 'moebert_kernels[serve]'")
        return
    for name, model in (("dense", dense), ("moe", moe)):
        file = folder / f"{name}.onnx"
        export_onnx(model, file)
        yield f"{name} float32 onnx", name, of_file(file)
        quantise_onnx(file, folder / f"{name}8.onnx")
        yield f"{name} int8 onnx", name, of_file(folder / f"{name}8.onnx")
        if name == "dense":
            try:
                yield "dense int8 onnx fused", name, of_file(fused(file, folder))
            except Exception as error:  # a peer that does not run is left out, and said so
                print(f"ONNX Runtime's fusions are left out: {type(error).__name__}: {error}")


def fused(file: Path, folder: Path) -> Path:
    """The int8 file behind ONNX Runtime's fusions for transformers."""
    from onnxruntime.transformers import optimizer

    made = optimizer.optimize_model(str(file), model_type="bert", num_heads=12, hidden_size=768, opt_level=1)
    print("ONNX Runtime's fusions:", {k: v for k, v in made.get_fused_operator_statistics().items() if v})
    made.save_model_to_file(str(folder / "fused.onnx"))
    quantise_onnx(folder / "fused.onnx", folder / "fused8.onnx")
    return folder / "fused8.onnx"


def check(runs: dict[str, tuple[str, Run]]) -> dict[str, float]:
    """The relative distance of each way from its float32 model, on two ragged sequences."""
    ids = torch.randint(1000, 30000, (2, 24))
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    distances = {}
    for name, (source, run) in runs.items():
        want = runs[f"{source} float32 plain"][1](ids, mask)[mask != 0]
        got = run(ids, mask)[mask != 0].float()
        distances[name] = float((got - want).norm() / want.norm())
        allowed = next(bound for dtype, bound in ALLOWED.items() if dtype in name)
        if not distances[name] <= allowed:
            raise SystemExit(f"{name}: expected a distance of at most {allowed} from {source}, got {distances[name]}")
    return distances


def measure(runs: dict[str, tuple[str, Run]], B: int, T: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each way in each round."""
    ids = torch.randint(1000, 30000, (B, T))
    mask, times = torch.ones_like(ids), {name: [] for name in runs}
    for _, run in runs.values():
        run(ids, mask)
    for _ in range(rounds):
        for name, (_, run) in runs.items():
            start = time.perf_counter()
            run(ids, mask)
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def ratio(times: dict[str, list[float]], ours: str, over: str) -> tuple[float, float, float]:
    """Quartiles of how many times as fast `ours` is."""
    return spread([b / a for a, b in zip(times[ours], times[over], strict=True)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--only", nargs="*", help="names of ways; default: all")
    parser.add_argument("--smoke", action="store_true", help="two rounds, nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    target = Target.of("cpu")
    result: dict[str, Any] = {"environment": environment(target), "layers": options.layers, "cases": []}
    missed = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        with torch.inference_mode(False), torch.no_grad():
            made = {name: (source, run) for name, source, run in ways(options.layers, Path(folder))}
        result["distance_from_float32"] = check(made)
        plain = "dense float32 plain"
        runs = {name: way for name, way in made.items() if not options.only or name in options.only or name == plain}
        for B, T in SHAPES:
            rounds = 2 if options.smoke else ROUNDS[B, T]
            times = measure(runs, B, T, rounds)
            case: dict[str, Any] = {
                "B": B,
                "T": T,
                "rounds": rounds,
                "load_average": load_average(),
                "ms": {},
                "over": {},
            }
            print(f"\nB={B} T={T}, {rounds} rounds, load {case['load_average']}")
            for name in runs:
                case["ms"][name] = spread(times[name])
                case["over"][name] = ratio(times, name, plain)
                q1, median, q3 = case["over"][name]
                print(
                    f"  {name:24} {statistics.median(times[name]):9.2f} ms"
                    f"   {median:5.2f} [{q1:.2f}, {q3:.2f}] times {plain}"
                )
            for ours, over, least in REQUIRED:
                wanted = least[SHAPES.index((B, T))]
                if wanted is not None and ours in runs and over in runs:
                    q1, median, q3 = ratio(times, ours, over)
                    case.setdefault("required", []).append([ours, over, wanted, [q1, median, q3]])
                    word = "held  " if median >= wanted else "MISSED"
                    missed += [] if median >= wanted else [f"{ours} over {over} at B={B} T={T}"]
                    print(f"  {word} {ours} over {over}: {median:.2f} [{q1:.2f}, {q3:.2f}], at least {wanted}")
            result["cases"].append(case)
    result["environment"]["load_average_after"] = load_average()
    print(f"\n{len(missed)} requirements missed", *missed, sep="\n  ")
    if not options.smoke:
        file = results_folder(target) / "serving" / f"bert-base-{options.threads}-threads.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written to {file}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
