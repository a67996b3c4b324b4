"""Experts that share a central tensor, at T5-base's size: their weights, inference and training, against dense experts.

The layers are ReLU feed-forwards without biases; dense experts are the same layer with weights of its own. On a CPU,
where float64 takes its time, at most 1,024 tokens of a layer are checked. Gradients are checked with GELU in the place
of ReLU, whose derivative jumps where rounding decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.inputs import Draws
from benchmarks.layers import runner
from benchmarks.measuring import Case, Limit, Outputs, Provider, Requirement, Target
from benchmarks.model import Cost, item_bytes, op_cost
from moebert_kernels import group_tokens, mpo_expert_weights, reference
from moebert_kernels.nn import DenseExperts, MPOExperts, MPOWeight, shared_fold

Factors = tuple[tuple[int, ...], tuple[int, ...]]
T5_BASE: Factors = ((4, 4, 8, 6, 4), (3, 4, 4, 4, 4))  # of wi; wo has them the other way round
SMOKE: Factors = ((2, 2, 4, 3, 2), (3, 2, 2, 2, 2))
PROVIDERS = ("mpo_experts", "dense_experts")
MICRO_BATCHES = 4
# times the time of dense experts that may be taken, by direction and tokens
CPU_MOST = {("forward", 4096): 1.05, ("forward", 1): 1.05, ("forward_backward", 4096): 2.6,
            ("forward_backward", 32768): 1.25}  # fmt: skip
GPU_MOST = {("forward_backward", 32768): 1.2}
SHARED_MOST = 1.5
FOLD_MOST_US = 60  # of all experts of one weight on an H200


def cases(target: Target) -> list[Case]:
    factors, E = (SMOKE, 3) if target.smoke else (T5_BASE, 8)
    directions = ("forward", "forward_backward")
    found = [_fold_case(direction, target, factors, E) for direction in directions]
    if target.smoke:
        return [
            *found,
            *(_layer_case(direction, 20, 9.9, target, factors, E) for direction in directions),
            _shared_case(20, target, factors, E),
        ]
    most = GPU_MOST if target.on_gpu else CPU_MOST
    found += [_layer_case(*shape, ratio, target, factors, E) for shape, ratio in most.items()]
    return [*found, _shared_case(4096, target, factors, E)]


def _parameters(target: Target, factors: Factors, E: int, direction: str, **more: object) -> dict[str, object]:
    sizes = {"E": E, "H": math.prod(factors[1]), "I": math.prod(factors[0])}
    return {"op": "mpo_expert_weights", "direction": direction, "dtype": target.dtype_name, **sizes, **more}


def _experts(target: Target, factors: Factors, E: int) -> dict[str, MPOExperts | DenseExperts]:
    """Both kinds, with weights of one size."""
    H, I = math.prod(factors[1]), math.prod(factors[0])
    torch.manual_seed(0)
    mpo = MPOExperts(H, I, E, w1_factors=factors, w2_factors=factors[::-1])
    dense = DenseExperts(H, I, E)
    for experts in (mpo, dense):
        experts.reset_parameters(H**-0.5, I**-0.5)
    return {"mpo_experts": mpo.to(target.device, target.dtype), "dense_experts": dense.to(target.device, target.dtype)}


def fold_cost(direction: str, sites: list[Tensor], E: int, dtype: torch.dtype) -> Cost:
    """Of one weight: its two products, and five of a backward that keeps nothing; see the torch backend."""
    *_, central, _, _ = sites
    bond, i, j, next_bond = central.shape
    rows, columns = (math.prod(math.prod(site.shape[-3:-1]) for site in side) for side in (sites[:2], sites[3:]))
    left, right = (2 * rows * bond * i * j * next_bond, 2 * rows * i * j * next_bond * columns)
    forward = Cost(E * (left + right), item_bytes(dtype) * (central.numel() + E * rows * i * j * columns))
    if direction == "forward":
        return forward
    return forward + Cost(E * (3 * left + 2 * right), forward.bytes + item_bytes(dtype) * central.numel())


def _fold_case(direction: str, target: Target, factors: Factors, E: int) -> Case:
    with torch.device("meta"):
        weight = MPOWeight(E, *factors)
    limits = (Limit("moebert_kernels", FOLD_MOST_US / 1e3),) if target.on_gpu and direction == "forward" else ()
    return Case(
        name=f"mpo_expert_weights-{direction}",
        parameters=_parameters(target, factors, E, direction),
        providers=("moebert_kernels", "site_by_site"),
        build=lambda: _fold(direction, target, factors, E),
        baseline="site_by_site",
        requires=limits,
        cost=fold_cost(direction, weight.sites, E, target.dtype),
        seconds=3.0,
    )


def _fold(direction: str, target: Target, factors: Factors, E: int) -> dict[str, Provider]:
    weight = _experts(target, factors, E)["mpo_experts"].w1
    central, *aux = (p.detach() for p in (weight.central, *weight.aux))
    dw = Draws(target).normal(*weight.shape)

    def exact(dtype: torch.dtype) -> Outputs:
        return step(lambda c, *a: reference.mpo_expert_weights(c, a), dtype)()

    def step(function: Callable[..., Tensor], dtype: torch.dtype = target.dtype) -> Callable[[], Outputs]:
        return runner(function, central.to(dtype), [a.to(dtype) for a in aux], dw.to(dtype), direction)

    return {
        "moebert_kernels": Provider(step(lambda c, *a: mpo_expert_weights(c, a)), exact),
        "site_by_site": Provider(step(lambda c, *a: reference.mpo_expert_weights(c, a)), exact),
    }


def _layer_case(direction: str, T: int, most: float, target: Target, factors: Factors, E: int) -> Case:
    return Case(
        name=f"mpo_experts-{direction}-T{T}",
        parameters=_parameters(target, factors, E, direction, T=T, tokens=T),
        providers=PROVIDERS,
        build=lambda: {
            name: _layer(experts, direction, T, target, E) for name, experts in _experts(target, factors, E).items()
        },
        baseline="dense_experts",
        requires=(Requirement("mpo_experts", "dense_experts", 1 / most),),
        seconds=15.0 if T > 4096 else 6.0,
        min_rounds=5 if T > 4096 else 7,
    )


def _layer(experts: MPOExperts | DenseExperts, direction: str, T: int, target: Target, E: int) -> Provider:
    draws = Draws(target)
    H = experts.weights()[0].shape[2]
    x, dy, ids = draws.normal(T, H), draws.normal(T, H), draws.expert_ids(T, E)
    experts.train(direction != "forward")
    tokens, smooth = checked_tokens(T, target), "relu" if direction == "forward" else "gelu"

    def step(tokens: int, activation: str) -> Callable[[], Outputs]:
        grouping = group_tokens(ids[:tokens], E)

        def layer(x: Tensor, *_: Tensor) -> Tensor:
            experts.activation = activation
            return experts(x, grouping)

        return runner(layer, x[:tokens], list(experts.parameters()), dy[:tokens], direction)

    def exact(dtype: torch.dtype) -> Outputs:
        parameters = [p.detach().to(dtype) for p in experts.parameters()]
        return runner(
            lambda x, *p: plain_layer(experts, x, ids[:tokens], p, smooth), x[:tokens].to(dtype), parameters,
            dy[:tokens].to(dtype), direction,
        )()  # fmt: skip

    cost = op_cost("fused_moe_ffn", direction, T=T, E=E, H=H, I=experts.rows, dtype=target.dtype)
    if isinstance(experts, MPOExperts) and direction != "forward":
        for weight in (experts.w1, experts.w2):
            cost += fold_cost(direction, weight.sites, E, target.dtype)
    return Provider(step(T, "relu"), exact, checked=step(tokens, smooth), cost=cost)


def checked_tokens(T: int, target: Target) -> int:
    """Of T, how many the gate looks at."""
    return T if target.on_gpu else min(T, 1024)


def plain_layer(
    experts: MPOExperts | DenseExperts, x: Tensor, ids: Tensor, parameters: tuple[Tensor, ...], activation: str
) -> Tensor:
    """The layer from its parameters, in the order of `parameters()`, one expert after the other."""
    weights = list(parameters)
    if isinstance(experts, MPOExperts):
        half = len(weights) // 2
        weights = [reference.mpo_expert_weights(c, a) for c, *a in (weights[:half], weights[half:])]
    w1, w2 = weights
    act = getattr(torch.nn.functional, activation)
    order, counts = ids.argsort(stable=True), ids.bincount(minlength=len(w1)).tolist()
    outputs = [act(rows @ w1[e].T) @ w2[e].T for e, rows in enumerate(x[order].split(counts))]
    return torch.zeros_like(x).index_copy(0, order, torch.cat(outputs))


def _shared_case(T: int, target: Target, factors: Factors, E: int) -> Case:
    return Case(
        name=f"mpo_experts-shared_fold-{MICRO_BATCHES}xT{T}",
        parameters=_parameters(target, factors, E, "forward_backward", T=T, tokens=MICRO_BATCHES * T),
        providers=PROVIDERS,
        build=lambda: {
            name: _accumulation(experts, T, target, E) for name, experts in _experts(target, factors, E).items()
        },
        baseline="dense_experts",
        requires=(Requirement("mpo_experts", "dense_experts", 1 / (9.9 if target.smoke else SHARED_MOST)),),
        seconds=10.0,
        min_rounds=5,
    )


def _accumulation(experts: MPOExperts | DenseExperts, T: int, target: Target, E: int) -> Provider:
    """Gradients of the parameters over equal micro-batches, under one shared fold."""
    draws = Draws(target)
    H = experts.weights()[0].shape[2]
    x, dy, ids = draws.normal(T, H), draws.normal(T, H), draws.expert_ids(T, E)
    experts.train()
    tokens = checked_tokens(T, target)

    def step(tokens: int, activation: str) -> Callable[[], Outputs]:
        grouping = group_tokens(ids[:tokens], E)

        def run() -> Outputs:
            experts.activation = activation
            with shared_fold(experts):  # nothing to fold in dense ones
                for _ in range(MICRO_BATCHES):
                    experts(x[:tokens], grouping).backward(dy[:tokens])
            return taken_gradients(experts)

        return run

    def exact(dtype: torch.dtype) -> Outputs:
        leaves = [p.detach().to(dtype).requires_grad_() for p in experts.parameters()]
        y = plain_layer(experts, x[:tokens].to(dtype), ids[:tokens], tuple(leaves), "gelu")
        return torch.autograd.grad(y, leaves, MICRO_BATCHES * dy[:tokens].to(dtype))

    return Provider(step(T, "relu"), exact, checked=step(tokens, "gelu"))


def taken_gradients(module: nn.Module) -> Outputs:
    """Of all parameters, which have none afterwards."""
    grads = tuple(p.grad for p in module.parameters())
    for parameter in module.parameters():
        parameter.grad = None
    return grads
