"""Whole encoders of BERT-base's and MiniLM-L6's size: full batches, padded ones, and sorted by length.

Lengths are those of real text (`real_text.json`), token ids are uniform. Dense BERT without any padding needs the
flash-attn package; what both kinds of model can do everywhere is to batch texts of similar length, so that is measured.
On a GPU, models also run under torch.compile, in full batches of more than one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from benchmarks import encoders, real_text
from benchmarks.encoders import Batch
from benchmarks.measuring import Case, Outputs, Provider, Requirement, Target
from moebert_kernels.layers import set_expert_order

BATCHES_SORTED = {"cpu": 2, "cuda": 4}  # the texts of so many batches are sorted by length
FULL = ("moebert_kernels", "dense", "ideal", "half_depth", "original")
PADDED = ("moebert_kernels", "padding_routed", "dense", "ideal", "original")
MOSTLY_PADDING = ("moebert_kernels", "padding_routed", "dense")
SORTED = ("moebert_kernels", "dense", "ideal")
COMPILED = ("moebert_kernels_compiled", "dense_compiled")
IN_ORDER = ("moebert_kernels", "moebert_kernels_in_order", "dense")  # attention writes rows of the experts


def cases(target: Target) -> list[Case]:
    if target.smoke:
        return [_full(target, "smoke", 2, 16), _padded(target, "smoke", 3), _sorted(target, "smoke", 2),
                _in_order(target, "smoke", 2, 16)]  # fmt: skip
    large = 32 if target.on_gpu else 8
    found = [
        _full(target, "bert-base", large, 128, *_required(target, large)),
        _full(target, "bert-base", 1, 128, *_required(target, 1)),
        _mostly_padding(target, "bert-base", large, *_required_of_padding(target)),
        _padded(target, "bert-base", large),
        _sorted(target, "bert-base", large),
    ]
    if target.on_gpu:
        in_order = Requirement("moebert_kernels_in_order", "moebert_kernels", 1.03)
        return [*found, _in_order(target, "bert-base", 128, 128, in_order)]
    return [*found, *(_full(target, "minilm-l6", B, 128) for B in (large, 1)), _padded(target, "minilm-l6", large)]


def _required(target: Target, B: int) -> list[Requirement]:
    if not target.on_gpu:
        over = ("ideal", 0.95) if B > 1 else ("dense", 1.65)
        return [Requirement("moebert_kernels", *over), Requirement("moebert_kernels", "original", 1.0)]
    return [Requirement("moebert_kernels_compiled", ("dense", "dense_compiled"), 1.6)] if B > 1 else []


def _required_of_padding(target: Target) -> list[Requirement]:
    return [] if target.on_gpu else [Requirement("moebert_kernels", "padding_routed", 1.2)]


def _full(target: Target, model: str, B: int, T: int, *requires: Requirement) -> Case:
    lengths = [[T] * B]
    ways = FULL + COMPILED if target.on_gpu and B > 1 else FULL  # compiling takes a minute for each shape
    return _case(target, f"encoder-{model}-B{B}-T{T}", model, lengths, ways, "dense", requires)


def _in_order(target: Target, model: str, B: int, T: int, *requires: Requirement) -> Case:
    name = f"encoder-{model}-B{B}-T{T}-in_order"
    return _case(target, name, model, [[T] * B], IN_ORDER, "moebert_kernels", requires)


def _mostly_padding(target: Target, model: str, B: int, *requires: Requirement) -> Case:
    """Padded to 128 by one long text: 40 real tokens on average, about MNLI's mean length."""
    short, longer = divmod(40 * B - 128, B - 1)
    lengths = [[128] + [short + (i < longer) for i in range(B - 1)]]
    name = f"encoder-{model}-B{B}-40_of_128"
    return _case(target, name, model, lengths, MOSTLY_PADDING, "padding_routed", requires)


def _padded(target: Target, model: str, B: int) -> Case:
    lengths = [real_text.typical_batch("mnli", B)]
    return _case(target, f"encoder-{model}-B{B}-padded", model, lengths, PADDED, "padding_routed")


def _sorted(target: Target, model: str, B: int) -> Case:
    texts = sorted(real_text.lengths("mnli", B * BATCHES_SORTED[target.device.type]))
    lengths = [texts[i : i + B] for i in range(0, len(texts), B)]
    return _case(target, f"encoder-{model}-B{B}-sorted_by_length", model, lengths, SORTED, "dense")


def _case(
    target: Target, name: str, model: str, lengths: list[list[int]], providers: tuple[str, ...], baseline: str,
    requires: tuple[Requirement, ...] = (),
) -> Case:  # fmt: skip
    if model == "minilm-l6":
        providers = tuple(name for name in providers if name != "half_depth")
    return Case(
        name=name,
        parameters={
            "model": model, "dtype": target.dtype_name, "E": encoders.NUM_EXPERTS, "I": encoders.expert_size(model),
            "B": len(lengths[0]), "T": max(map(max, lengths)), "batches": len(lengths),
            "tokens": sum(map(sum, lengths)),
        },
        providers=providers,
        build=lambda: _build(target, model, lengths, providers),
        baseline=baseline,
        requires=requires,
        cost=encoders.moe_cost(target, model, lengths),
        seconds=6.0,
    )  # fmt: skip


def _build(
    target: Target, model: str, lengths: list[list[int]], providers: tuple[str, ...]
) -> dict[str, Provider]:  # fmt: skip
    if set(COMPILED) & set(providers):
        torch.compiler.reset()  # compiled shapes are counted by process, and the ninth of a function is an error
    batches = [encoders.padded_batch(target, model, batch) for batch in lengths]
    moe = encoders.moe_model(target, model)
    # both keep our model's weights and tables; without padding they are one
    routing = encoders.naive(moe, batches, skip_padding=False)
    padded = any(batch.mask is not None for batch in batches)
    skipping = encoders.naive(moe, batches, skip_padding=True) if padded else routing
    routing_cost = encoders.moe_cost(target, model, lengths, skip_padding=False)

    def of_dense(run: Callable[..., Callable[[], Outputs]] = encoders.forward, **changed: int) -> Provider:
        dense = encoders.dense_model(target, model, **changed)
        cost = encoders.dense_cost(target, model, lengths, **changed)
        return Provider(run(dense, batches), encoders.in_dtype(dense, batches), cost=cost)

    def padding_routed() -> Provider:
        routed = copy.deepcopy(moe)
        routed.config.quantization_config.route_padding = True
        return Provider(encoders.forward(routed, batches), routing, cost=routing_cost)

    def in_order() -> Provider:
        ordered = copy.deepcopy(moe)
        set_expert_order(ordered)
        return Provider(encoders.forward(ordered, batches), skipping)

    makers: dict[str, Callable[[], Provider]] = {
        "moebert_kernels": lambda: Provider(encoders.forward(moe, batches), skipping),
        "moebert_kernels_compiled": lambda: Provider(_compiled(moe, batches), skipping),
        "moebert_kernels_in_order": in_order,
        "dense": of_dense,
        "dense_compiled": lambda: of_dense(_compiled),
        "ideal": lambda: of_dense(intermediate_size=encoders.expert_size(model)),
        "half_depth": lambda: of_dense(num_hidden_layers=encoders.num_layers(model) // 2),
        "padding_routed": padding_routed,
        "original": lambda: Provider(encoders.original(moe, batches), routing, cost=routing_cost),
    }
    return {name: makers[name]() for name in providers}


def _compiled(model: nn.Module, batches: list[Batch]) -> Callable[[], Outputs]:
    """One compiled form for each shape, made on the first call, which is not timed."""
    return encoders.forward(torch.compile(model, fullgraph=True, dynamic=False), batches)
