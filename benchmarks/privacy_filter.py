"""A layer of experts of openai/privacy-filter's shape on a CPU: transformers' implementations and ours.

    python -m benchmarks.privacy_filter           # 128 experts, 4 for each token, H = I = 640: two minutes
    python -m benchmarks.privacy_filter --smoke   # a small layer, writes nothing

Random weights; 315 MB in bfloat16, so that weights come from memory as in the model of eight layers. "ours" is the
experts interface on the model's own weights, "prepared" what `moebert_kernels.serve.prepare` makes of the model.
"""

from __future__ import annotations

import argparse
import copy
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from benchmarks.ways import Run, Way, check, finished, measured
from moebert_kernels.integrations import transformers as integration
from moebert_kernels.serve import describe, prepare

TOKENS = {32: 15, 128: 11, 512: 7}  # rounds of each
SIZES: dict[str, Any] = {"num_local_experts": 128, "hidden_size": 640, "intermediate_size": 640}
SMOKE: dict[str, Any] = {"num_local_experts": 8, "hidden_size": 64, "intermediate_size": 64}
GROUPED = "grouped_mm bfloat16"
REQUIRED = (
    ("prepared bfloat16", GROUPED, {128: 1.3, 512: 1.3}),
    ("prepared int8", GROUPED, {128: 2.0, 512: 2.0}),
)


def experts_of(model: Any, implementation: str | None = None) -> Run:
    """The first layer's experts, of x (T, H), ids (T, 4) and their weights; (T, H)."""
    experts = model.layers[0].mlp.experts

    def run(x: Tensor, ids: Tensor, p: Tensor) -> Tensor:
        model.config._experts_implementation = implementation or "eager"  # prepared experts do not ask
        return experts(x.to(model.dtype), ids, p.to(model.dtype))

    return run


def routed(router: Any, T: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens, and the ids and weights of the model's own router for them."""
    x = torch.randn(T, router.hidden_dim)
    _, p, ids = router(x)
    return x, ids, p


def ways(sizes: dict[str, Any]) -> tuple[Any, dict[str, Way]]:
    """The router, and all ways; each dtype's weights are in memory once for all of transformers' implementations."""
    integration.register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "openai_privacy_filter", **sizes, num_hidden_layers=1, vocab_size=64, pad_token_id=0, eos_token_id=0
    )
    model = AutoModel.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    made = {}
    for dtype, implementations in (("float32", ("eager", "grouped_mm", "ours")), ("bfloat16", ("grouped_mm", "ours"))):
        cast = model if dtype == "float32" else copy.deepcopy(model).bfloat16()
        for name in implementations:
            made[f"{name} {dtype}"] = experts_of(cast, integration.NAME if name == "ours" else name)
    for dtype in ("float32", "bfloat16", "int8"):
        prepared = prepare(copy.deepcopy(model), dtype)
        print(f"{dtype}:\n{describe(prepared)}", flush=True)
        made[f"prepared {dtype}"] = experts_of(prepared)
    return model.layers[0].mlp.router, {name: Way("eager float32", run) for name, run in made.items()}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="a small layer, two rounds, nothing is written")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    sizes = SMOKE if options.smoke else SIZES
    with torch.no_grad():
        router, made = ways(sizes)
        distances, left_out = check(made, routed(router, 64))
        result: dict[str, Any] = {"sizes": sizes, "distance_from_eager": distances, "left_out": left_out, "cases": []}
        made = {name: way for name, way in made.items() if name not in left_out}
        for T, rounds in TOKENS.items():
            required = [(ours, over, least.get(T)) for ours, over, least in REQUIRED]
            rounds = 2 if options.smoke else rounds
            case = measured({"T": T}, made, [routed(router, T)], rounds, GROUPED, required)
            result["cases"].append(case)
    return finished(result, None if options.smoke else f"privacy-filter-{options.threads}-threads", REQUIRED)


if __name__ == "__main__":
    sys.exit(main())
