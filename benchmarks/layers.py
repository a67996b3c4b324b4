"""Everything that computes a feed-forward layer, by name, as providers for the suites.

Groupings are given, as a model gives them, unless the name says otherwise; `loop_of_linear` and transformers'
functions sort by themselves, as they do in life.
"""

from __future__ import annotations

import os
import shutil
import types
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import baselines
from benchmarks.gpu_plan import CUDA_FORMS
from benchmarks.inputs import Draws
from benchmarks.measuring import Case, Limit, Outputs, Provider, Requirement, Skipped, Target
from benchmarks.model import Cost, op_cost
from moebert_kernels import backend, fused_moe_ffn, fused_moe_ffn_add_norm, group_tokens, reference

Layer = Callable[..., Tensor]  # x (T, H) and weights -> y (T, H)

BERT_BASE = {"H": 768, "I": 768, "E": 4, "D": 3072}
SMOKE = {"H": 32, "I": 32, "E": 4, "D": 128}
COMPILED_AT = 16384  # tokens on a GPU: compiling takes many seconds for each number of them
FEW_TOKENS = 256  # which the CUDA form for few tokens takes
MOST_COPIED_BYTES = 2**30  # of weights, by transformers' batched_mm


def compiled(T: int) -> tuple[str, ...]:
    return ("dense_compiled",) if T == COMPILED_AT else ()


def dense_ways(T: int) -> tuple[str, ...]:
    return ("dense", *compiled(T))


def runner(function: Layer, x: Tensor, weights: Sequence[Tensor], dy: Tensor, direction: str) -> Callable[[], Outputs]:
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


class Layers:
    """One op at one shape, and all that it is compared with: each provider is the method of its name.

    Attributes:
        grouping: of `expert_ids`, which have the shares of real text where there are 4 experts.
        p: routing weights (T, top_k); None where each token has one expert.
        experts, dense_weights, ideal_weights: as the op takes them; dense ones have width D, or I for the ideal.
    """

    def __init__(
        self, op: str, direction: str, T: int, target: Target, *, H: int, I: int, E: int, D: int, top_k: int = 1
    ) -> None:  # fmt: skip
        self.op, self.direction, self.T, self.target = op, direction, T, target
        self.H, self.I, self.E = H, I, E
        draws = Draws(target)
        self.expert_ids = draws.expert_ids(T, E) if top_k == 1 else draws.top_k_ids(T, E, top_k)
        self.p = None if top_k == 1 else draws.normal(T, top_k).softmax(-1)
        self.grouping = group_tokens(self.expert_ids, E)
        self.x, self.dy = draws.normal(T, H), draws.normal(T, H)

        def weights(*lead: int, width: int) -> list[Tensor]:
            norm = draws.norm_weights(*lead, H=H) if self.add_norm else []
            return draws.ffn_weights(*lead, H=H, width=width) + norm

        self.experts, self.dense_weights, self.ideal_weights = weights(E, width=I), weights(width=D), weights(width=I)
        self._references: dict[str, Callable[[torch.dtype], Outputs]] = {}

    @property
    def add_norm(self) -> bool:
        return self.op == "fused_moe_ffn_add_norm"

    def build(self, names: Sequence[str]) -> dict[str, Provider | Skipped]:
        return {name: getattr(self, name)() for name in names}

    def moebert_kernels(self) -> Provider:
        return self._experts(self._ours(self.grouping))

    def moebert_kernels_with_grouping(self) -> Provider:
        """The grouping is made in the call, as for a layer with a gate of its own."""
        return self._experts(self._ours(self.expert_ids))

    def moebert_kernels_eager(self) -> Provider:
        """By the wall clock, as a caller sees it who waits and captures no graph."""
        return self._experts(self._ours(self.grouping), capture=False)

    def moebert_kernels_cuda(self) -> Provider | Skipped:
        """Ours with the CUDA kernels, which are not the default."""
        return self._cuda()

    def moebert_kernels_cuda_with_pass(self) -> Provider | Skipped:
        """The same with the norm as a pass behind the second GEMM."""
        return self._cuda(without=("expert_gemm_norm",))

    def _cuda(self, without: tuple[str, ...] = ()) -> Provider | Skipped:
        ours = self._ours(self.grouping)

        def run(x: Tensor, *weights: Tensor) -> Tensor:
            with backend.use_backend("cuda", strict=True, without=without):
                return ours(x, *weights)

        return cuda_or_skipped(self.op, self.x) or self._experts(run)

    def dense(self) -> Provider:
        return self._dense(self._dense_layer)

    def dense_compiled(self) -> Provider | Skipped:
        if not self.target.on_gpu and not shutil.which("c++"):
            return Skipped("torch.compile needs a C++ compiler")
        torch.compiler.reset()  # beyond a handful of shapes it would silently stop compiling
        return self._dense(torch.compile(self._dense_layer, dynamic=False))

    def dense_eager(self) -> Provider:
        """By the wall clock, beside `moebert_kernels_eager`."""
        return self._dense(self._dense_layer, capture=False)

    def ideal(self) -> Provider:
        """Dense with the width of one expert: our FLOPs and none of the routing."""
        return self._provider("ideal", self._dense_layer, self._dense_layer, self.ideal_weights, self._cost(1, self.I))

    def original(self) -> Provider:
        layer = baselines.OriginalExperts(*self.experts).eval()
        run = runner(lambda x, *_: layer(x, self.expert_ids), self.x, list(layer.parameters()), self.dy, self.direction)
        return Provider(run, self._experts_reference(), arrange=lambda outputs: _stacked(outputs, self.E))

    def loop_of_linear(self) -> Provider:
        return self._experts(lambda x, *weights: baselines.loop_of_linear(x, self.expert_ids, *weights))

    def loop_of_linear_given_counts(self) -> Provider:
        """The same loop with sorted rows' counts known on the host: nothing waits for the device."""
        counts = torch.bincount(self.expert_ids, minlength=self.E).tolist()
        order = self.grouping.row_to_assignment.long()
        return self._experts(lambda x, *weights: baselines.loop_over_experts(x, order, counts, *weights))

    def grouped_mm(self) -> Provider | Skipped:
        if not hasattr(F, "grouped_mm"):
            return Skipped(f"torch {torch.__version__} has no torch.nn.functional.grouped_mm")
        order, ends = self.grouping.row_to_assignment.long(), self.grouping.offsets[1:]
        owner = self.expert_ids[order]

        def run(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
            h = F.gelu(F.grouped_mm(x[order], w1.transpose(1, 2), offs=ends) + b1[owner])
            rows = F.grouped_mm(h, w2.transpose(1, 2), offs=ends) + b2[owner]
            return torch.empty_like(x).index_copy_(0, order, rows)

        return self._experts(run)

    def transformers_batched_mm(self) -> Provider | Skipped:
        from transformers.integrations.moe import batched_mm_experts_forward

        copied = self.T * self.I * self.H * self.target.dtype.itemsize
        if copied > MOST_COPIED_BYTES:
            return Skipped(f"copies a matrix for each token, {copied / 2**30:.1f} GiB at a time")
        return self._experts(self._transformers(batched_mm_experts_forward))

    def transformers_grouped_mm(self) -> Provider:
        from transformers.integrations.moe import grouped_mm_experts_forward

        return self._experts(self._transformers(grouped_mm_experts_forward))

    def _transformers(self, forward: Callable[..., Tensor]) -> Layer:
        """An experts function of transformers, on what it reads of a module."""
        p = torch.ones(self.T, 1, device=self.target.device, dtype=self.target.dtype) if self.p is None else self.p
        ids = self.expert_ids.view(self.T, -1)

        def run(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
            experts = types.SimpleNamespace(
                up_proj=w1, up_proj_bias=b1, down_proj=w2, down_proj_bias=b2, act_fn=F.gelu, num_experts=self.E,
                has_gate=False, has_bias=True, is_transposed=False, is_concatenated=True, has_post_expert_norm=False,
                _is_expert_parallel=False,
            )  # fmt: skip
            return forward(experts, x, ids, p)

        return run

    def _ours(self, routing: object) -> Layer:
        op = fused_moe_ffn_add_norm if self.add_norm else fused_moe_ffn
        return lambda x, *weights: op(x, routing, *weights, routing_weights=self.p)

    @property
    def _dense_layer(self) -> Layer:
        return baselines.dense_ffn_add_norm if self.add_norm else baselines.dense_ffn

    def _cost(self, E: int, width: int) -> Cost:
        return op_cost(self.op, self.direction, T=self.T, E=E, H=self.H, I=width, dtype=self.target.dtype)

    def _dense(self, function: Layer, capture: bool = True) -> Provider:
        width = self.dense_weights[0].shape[0]
        return self._provider(
            "dense", function, self._dense_layer, self.dense_weights, self._cost(1, width), capture=capture
        )

    def _experts(self, function: Layer, capture: bool = True) -> Provider:
        run = runner(function, self.x, self.experts, self.dy, self.direction)
        return Provider(run, self._experts_reference(), capture=capture)

    def _experts_reference(self) -> Callable[[torch.dtype], Outputs]:
        naive = reference.fused_moe_ffn_add_norm if self.add_norm else reference.fused_moe_ffn

        def exact(x: Tensor, *weights: Tensor) -> Tensor:
            p = None if self.p is None else self.p.to(x.dtype)
            return naive(x, self.expert_ids, *weights, routing_weights=p)

        return self._reference("experts", exact, self.experts)

    def _provider(
        self, kind: str, function: Layer, exact: Layer, weights: list[Tensor], cost: Cost, capture: bool = True
    ) -> Provider:
        run = runner(function, self.x, weights, self.dy, self.direction)
        return Provider(run, self._reference(kind, exact, weights), cost=cost, capture=capture)

    def _reference(self, kind: str, exact: Layer, weights: list[Tensor]) -> Callable[[torch.dtype], Outputs]:
        """One for all providers of a kind, so that the gate computes it once."""

        def outputs(dtype: torch.dtype) -> Outputs:
            inputs = self.x.to(dtype), [w.to(dtype) for w in weights], self.dy.to(dtype)
            return runner(exact, *inputs, self.direction)()

        return self._references.setdefault(kind, outputs)


def layer_case(
    op: str, direction: str, T: int, target: Target, names: Sequence[str], requires: Sequence[Requirement | Limit] = (),
    seconds: float = 1.0, suffix: str = "", shape: Mapping[str, int] | None = None,
) -> Case:  # fmt: skip
    """A case of `Layers`, by default at BERT-base's sizes, over the dense layer."""
    shape = SMOKE if target.smoke else shape or BERT_BASE
    return Case(
        name=f"{op}-{direction}-T{T}{suffix}",
        parameters={"op": op, "direction": direction, "dtype": target.dtype_name, "T": T, **shape},
        providers=tuple(names),
        build=lambda: Layers(op, direction, T, target, **shape).build(names),
        baseline="dense",
        requires=tuple(requires),
        cost=op_cost(op, direction, T=T, dtype=target.dtype, **{name: shape[name] for name in shape if name != "D"}),
        seconds=seconds,
    )


def cuda_or_skipped(op: str, x: Tensor) -> Skipped | None:
    """Why the CUDA form of an op cannot run on `x`, or None."""
    if os.environ.get(CUDA_FORMS) == "0":
        return Skipped(f"{CUDA_FORMS}=0")
    try:
        with backend.use_backend("cuda", strict=True):
            backend.choose(op, x)
    except RuntimeError as error:
        return Skipped(str(error).splitlines()[0])
    if "ffn" in op and len(x) > FEW_TOKENS:  # else the time of Triton's GEMMs would have the CUDA form's name
        reason = backend.kernel_unavailable("expert_gemm", x.device, x.dtype)
        return None if reason is None else Skipped(reason)
    return None


def _stacked(outputs: Outputs, num_experts: int) -> Outputs:
    """Gradients of the experts' own parameters, one expert after the other -> of stacked weights."""
    first, grads = outputs[:2], outputs[2:]
    kinds = len(grads) // num_experts
    return (*first, *(torch.stack(grads[kind::kinds]) for kind in range(kinds)))
