"""Whole encoders for inference on a CPU: dense and converted, float32, bfloat16 and int8, in torch and ONNX Runtime.

    python -m benchmarks.serving                    # BERT-base, one thread: about six minutes on an idle machine
    python -m benchmarks.serving --layers 2 --smoke # tries the code, writes nothing

All ways run in turns in one process; see `benchmarks/ways.py`.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from benchmarks.environment import version
from benchmarks.ways import Run, Way, check, finished, measured
from moebert_kernels.bench.timing import WARM_UP
from moebert_kernels.convert import convert_to_moe
from moebert_kernels.serve import describe, export_onnx, prepare, quantise_onnx
from moebert_kernels.serve.forms import OnnxModel
from moebert_kernels.serve.tiles import unavailable

SHAPES = ((1, 32), (1, 128), (8, 128))  # sequences, tokens of each
ROUNDS = {(1, 32): 31, (1, 128): 15, (8, 128): 7}
PLAIN = "dense float32 plain"
# ours, over what, at least how many times as fast at each of SHAPES
REQUIRED = (
    ("moe int8", "dense int8", (1.25, 1.5, 1.6)),
    ("moe int8", "dense int8 torch.ao", (1.0, 1.0, 1.0)),
    ("moe int8", "dense int8 onnx", (1.0, 1.0, 1.0)),
    ("moe int8", "dense int8 onnx fused", (1.0, 1.0, 1.0)),
    ("moe int8", "dense int8 openvino", (1.0, 1.0, 1.0)),
    ("moe int8", "dense float32 plain", (5.0, 5.0, 5.0)),
    ("moe int8-bfloat16", "dense int8-bfloat16", (1.25, 1.5, 1.6)),
    ("moe int8-bfloat16", "dense int8 openvino", (1.0, 1.0, 1.0)),
    ("moe int8-bfloat16", "moe int8", (1.0, 1.0, 1.0)),
    ("moe bfloat16", "dense bfloat16", (1.15, 1.4, 1.6)),
    ("moe float32", "dense float32", (1.0, 1.45, 1.85)),
    ("moe float32 plain", "dense float32 plain", (1.0, 1.45, 1.85)),
    ("moe int8 onnx", "dense int8 onnx", (None, None, 1.4)),
    ("moe int8 openvino", "dense int8 openvino", (1.25, 1.5, 1.6)),
)
EXPORTED = ("float32 onnx", "int8 onnx", "int8 openvino")


def of_model(model: nn.Module) -> Run:
    def run(ids: Tensor, mask: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=mask).last_hidden_state

    return run


def ways(layers: int, width: int, folder: Path, left_out: dict[str, str]) -> Iterator[tuple[str, Way]]:
    """Name, and how it runs beside its float32 model; into `left_out`, why one does not run here."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": width // 64}
    dense = BertModel(BertConfig(intermediate_size=4 * width, **sizes)).eval()
    moe = convert_to_moe(copy.deepcopy(dense), importance=torch.rand(layers, 4 * width)).eval()
    ideal = BertModel(BertConfig(intermediate_size=width, **sizes)).eval()
    # with the package's own kernel int8-token is int8, and without it int8-bfloat16 is slower than that
    other = "int8-token" if unavailable("int8-bfloat16") else "int8-bfloat16"
    for name, model in (("dense", dense), ("moe", moe), ("ideal", ideal)):
        yield f"{name} float32 plain", Way(f"{name} float32 plain", of_model(model))
        for dtype in ("float32", "bfloat16", "int8", other):
            if name != "ideal" or dtype.startswith("int8"):
                prepared = prepare(copy.deepcopy(model), dtype)
                print(f"{name}, {dtype}:\n{describe(prepared)}", flush=True)
                yield f"{name} {dtype}", Way(f"{name} float32 plain", of_model(prepared))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is said to move to another package
        ao = torch.ao.quantization.quantize_dynamic(copy.deepcopy(dense), {nn.Linear}, dtype=torch.qint8)
    yield "dense int8 torch.ao", Way(PLAIN, of_model(ao))
    if version("onnxruntime") is None or version("onnxscript") is None:
        exported = [f"{model} {way}" for model in ("dense", "moe") for way in EXPORTED]
        left_out |= dict.fromkeys([*exported, "dense int8 onnx fused"], "pip install -e '.[serve]'")
        return
    for name, model in (("dense", dense), ("moe", moe)):
        file = folder / f"{name}.onnx"
        export_onnx(model, file)
        yield f"{name} float32 onnx", Way(f"{name} float32 plain", of_model(OnnxModel(file)))
        quantise_onnx(file, folder / f"{name}8.onnx")
        yield f"{name} int8 onnx", Way(f"{name} float32 plain", of_model(OnnxModel(folder / f"{name}8.onnx")))
    peers = (
        ("dense", "onnx fused", partial(fused, width=width)),
        ("dense", "openvino", openvino),
        ("moe", "openvino", openvino),
    )
    for model, engine, make in peers:
        name = f"{model} int8 {engine}"
        try:
            yield name, Way(f"{model} float32 plain", make(folder / f"{model}.onnx", folder))
        except Exception as error:  # of a package that is missing, or of another version
            left_out[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def fused(file: Path, folder: Path, width: int) -> Run:
    """ONNX Runtime's int8 behind its fusions for transformers."""
    from onnxruntime.transformers import optimizer

    sizes = {"num_heads": width // 64, "hidden_size": width}
    made = optimizer.optimize_model(str(file), model_type="bert", opt_level=1, **sizes)
    done = {name: count for name, count in made.get_fused_operator_statistics().items() if count}
    print("ONNX Runtime's fusions:", done)
    if not {"Attention", "MultiHeadAttention"} & done.keys():
        raise RuntimeError(f"no attention is fused, only {', '.join(done) or 'nothing'}")
    made.save_model_to_file(str(folder / "fused.onnx"))
    quantise_onnx(folder / "fused.onnx", folder / "fused8.onnx")
    return of_model(OnnxModel(folder / "fused8.onnx"))


def openvino(file: Path, folder: Path) -> Run:
    """OpenVINO's int8: static quantisation by nncf with Optimum Intel's settings, but for 32 texts instead of 128.

    Texts of several lengths calibrate it. Scores at padding are clamped to the range that they had then, so that one
    that is calibrated without padding lets it be seen: 0.11 from float32 with four layers, instead of 0.03.
    """
    import nncf
    import openvino

    def inputs(ids: Tensor, mask: Tensor) -> dict[str, Any]:
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        return {name: tensor.numpy() for name, tensor in given.items()}

    lengths = torch.randint(16, 65, (32, 1, 1))
    texts = [inputs(torch.randint(1000, 30000, (1, 64)), (torch.arange(64) < T).long()) for T in lengths]
    model = nncf.quantize(
        openvino.convert_model(file), nncf.Dataset(texts), model_type=nncf.ModelType.TRANSFORMER, subset_size=32,
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.DISABLE),
    )  # fmt: skip
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.compile_model(model, "CPU", settings)
    return lambda ids, mask: torch.from_numpy(compiled(inputs(ids, mask))[0].copy())


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--only", nargs="*", help="names of ways; default: all")
    parser.add_argument("--smoke", action="store_true", help="small layers, one shape, two rounds, nothing is written")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    left_out: dict[str, str] = {}
    result: dict[str, Any] = {"layers": options.layers, "left_out": left_out, "cases": []}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        made = dict(ways(options.layers, 128 if options.smoke else 768, Path(folder), left_out))
        ids, mask = torch.randint(1000, 30000, (2, 24)), torch.ones(2, 24, dtype=torch.int64)
        mask[1, 13:] = 0
        result["distance_from_float32"], too_far = check(made, (ids, mask), mask != 0)
        left_out |= too_far
        wanted = (*options.only, PLAIN) if options.only else made
        chosen = {name: made[name] for name in made if name in wanted and name not in left_out}
        for k, (B, T) in enumerate(SHAPES[:1] if options.smoke else SHAPES):
            rounds = 2 if options.smoke else ROUNDS[B, T]
            # other text in each round, as a server has it: experts get another number of rows
            texts = torch.randint(1000, 30000, (WARM_UP + rounds, B, T))
            required = [(ours, over, least[k]) for ours, over, least in REQUIRED]
            inputs = [(ids, torch.ones_like(ids)) for ids in texts]
            case = measured({"B": B, "T": T}, chosen, inputs, rounds, PLAIN, required)
            result["cases"].append(case)
    return finished(result, None if options.smoke else f"bert-base-{options.threads}-threads", REQUIRED)


if __name__ == "__main__":
    sys.exit(main())
