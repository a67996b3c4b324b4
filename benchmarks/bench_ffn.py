"""The feed-forward op alone, `fused_moe_ffn` and `fused_moe_ffn_add_norm`, against dense layers and loops over experts.

Every expert gets a token as soon as there are E tokens: the hardest case for few tokens, since all weights are read.
Groupings are given, as a model gives them; the loops sort by themselves, as they do in life.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import baselines
from benchmarks.measuring import Case, Outputs, Provider, Requirement, Target
from moebert_kernels import fused_moe_ffn, fused_moe_ffn_add_norm, group_tokens, reference

Layer = Callable[..., Tensor]  # x (T, H) and weights -> y (T, H)

SECONDS = 1.5
TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 23, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096)
TOKENS_ADD_NORM = (4, 16, 32, 64, 128, 256, 1024)
TOKENS_BACKWARD = (16, 128, 1024)
BERT_BASE = {"H": 768, "I": 768, "E": 4, "D": 3072}
SMOKE = {"H": 32, "I": 32, "E": 4, "D": 128}
PROVIDERS = {
    "fused_moe_ffn": ("moebert_kernels", "dense", "ideal", "loop_of_linear"),
    "fused_moe_ffn_add_norm": ("moebert_kernels", "dense", "ideal", "original"),
}


def cases(target: Target) -> list[Case]:
    """Forward at every number of tokens; forward and backward, and the op with the norm, at some."""
    smoke = target.smoke
    shape = SMOKE if smoke else BERT_BASE
    return [
        *(_case("fused_moe_ffn", "forward", T, shape) for T in ((1, 3, 20) if smoke else TOKENS)),
        *(_case("fused_moe_ffn_add_norm", "forward", T, shape) for T in ((20,) if smoke else TOKENS_ADD_NORM)),
        *(
            _case(op, "forward_backward", T, shape)
            for op in PROVIDERS
            for T in ((20,) if smoke else TOKENS_BACKWARD)
        ),
    ]  # fmt: skip


def required_speed(T: int) -> float:
    """Of the op over the dense layer. From 4 to 23 tokens it reads as many bytes of weights as the dense layer does."""
    return 0.9 if 4 <= T <= 23 else 1.0


def _case(op: str, direction: str, T: int, shape: dict[str, int]) -> Case:
    required = op == "fused_moe_ffn" and direction == "forward"
    return Case(
        name=f"{op}-{direction}-T{T}",
        parameters={"op": op, "direction": direction, "dtype": "float32", "T": T, **shape},
        providers=PROVIDERS[op],
        build=lambda: _build(op, direction, T, **shape),
        baseline="dense",
        seconds=SECONDS,
        requires=(Requirement("moebert_kernels", "dense", required_speed(T)),) if required else (),
    )


def _build(op: str, direction: str, T: int, *, H: int, I: int, E: int, D: int) -> dict[str, Provider]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale + shift

    expert_ids = torch.cat([torch.randperm(E, generator=generator), torch.randint(0, E, (T,), generator=generator)])[:T]
    grouping = group_tokens(expert_ids, E)
    x, dy = random(T, H), random(T, H)

    def ffn_weights(*lead: int, width: int) -> list[Tensor]:
        matrices = [random(*lead, width, H, scale=H**-0.5), random(*lead, width, scale=0.1),
                    random(*lead, H, width, scale=width**-0.5), random(*lead, H, scale=0.1)]  # fmt: skip
        norm = [random(*lead, H, scale=0.1, shift=1.0), random(*lead, H, scale=0.1)]
        return matrices if op == "fused_moe_ffn" else matrices + norm

    moe, dense, ideal = ffn_weights(E, width=I), ffn_weights(width=D), ffn_weights(width=I)
    if op == "fused_moe_ffn":
        fast, naive, dense_layer = fused_moe_ffn, reference.fused_moe_ffn, baselines.dense_ffn
    else:
        fast, naive, dense_layer = (
            fused_moe_ffn_add_norm,
            reference.fused_moe_ffn_add_norm,
            baselines.dense_ffn_add_norm,
        )

    def provider(function: Layer, weights: list[Tensor], exact: Layer | None = None) -> Provider:
        return Provider(
            runner(function, x, weights, dy, direction),
            lambda dtype: runner(
                exact or function, x.to(dtype), [w.to(dtype) for w in weights], dy.to(dtype), direction
            )(),
        )  # fmt: skip

    def moe_reference(x: Tensor, *weights: Tensor) -> Tensor:
        return naive(x, expert_ids, *weights)

    providers = {
        "moebert_kernels": provider(lambda x, *weights: fast(x, grouping, *weights), moe, moe_reference),
        "dense": provider(dense_layer, dense),
        "ideal": provider(dense_layer, ideal),
    }
    exact = providers["moebert_kernels"].reference
    if op == "fused_moe_ffn":
        loop = runner(lambda x, *weights: baselines.loop_of_linear(x, expert_ids, *weights), x, moe, dy, direction)
        return providers | {"loop_of_linear": Provider(loop, exact)}
    layer = baselines.OriginalExperts(*moe).eval()
    original = runner(lambda x, *_: layer(x, expert_ids), x, list(layer.parameters()), dy, direction)
    return providers | {"original": Provider(original, exact, arrange=lambda outputs: _stacked(outputs, E))}


def runner(
    function: Layer, x: Tensor, weights: list[Tensor], dy: Tensor, direction: str
) -> Callable[[], Outputs]:  # fmt: skip
    """A callable that returns y, and with "forward_backward" the gradients of x and of every weight."""
    if direction == "forward":

        def forward() -> Outputs:
            with torch.no_grad():
                return (function(x, *weights),)

        return forward
    # parameters stay themselves: the module they belong to computes with them
    leaves = [t if isinstance(t, nn.Parameter) else t.detach().requires_grad_() for t in (x, *weights)]

    def forward_backward() -> Outputs:
        y = function(*leaves)
        return (y.detach(), *torch.autograd.grad(y, leaves, dy))

    return forward_backward


def _stacked(outputs: Outputs, num_experts: int) -> Outputs:
    """Gradients of the experts' own parameters, one expert after the other -> of stacked weights."""
    first, grads = outputs[:2], outputs[2:]
    kinds = len(grads) // num_experts
    return (*first, *(torch.stack(grads[kind::kinds]) for kind in range(kinds)))


def test_ffn(case, provider, run_provider):
    run_provider(case, provider)
