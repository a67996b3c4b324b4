"""Ours against other packages, each on the nearest layer that it computes: top-1, H = I = 768, 4 experts.

Three layers: MoEBERT's own (GELU, biases), the same without biases, and a gated one (SwiGLU, no biases). A package that
cannot run here is skipped with the reason. Adapters call what each package documents or benchmarks itself. Every one,
ours too, begins with the experts' ids, and what it derives from them is timed. They were written against ScatterMoE
0.3.0, MegaBlocks 0.9, SonicMoE of December 2025, Liger of August 2026 and transformers 5.17 to 5.23; the gate refuses
any that changed its layout since.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.clocks import first_line
from benchmarks.inputs import Draws
from benchmarks.layers import BERT_BASE, SMOKE, Layer, runner
from benchmarks.measuring import Case, Outputs, Provider, Requirement, Skipped, Target
from benchmarks.model import op_cost
from moebert_kernels import backend, fused_moe_ffn, reference

CPU_CASES = [("forward", 128), ("forward_backward", 128)]
GPU_CASES = [("forward", 4096), ("forward_backward", 4096), ("forward", 16384), ("forward_backward", 16384)]
AT_LEAST = 1.2  # times each installed peer, on an H200
KINDS = ("gelu-biases", "gelu", "swiglu")  # MoEBERT's own, the same without biases, and gated without biases


class PeerLayer:
    """Inputs of one top-1 layer of a kind: w1 (E, I or 2 I, H), gate first, w2 (E, H, I), and biases if it has any."""

    def __init__(self, kind: str, T: int, target: Target, *, H: int, I: int, E: int) -> None:
        self.kind, self.T, self.H, self.I, self.E, self.target = kind, T, H, I, E, target
        self.activation = "swiglu" if self.gated else "gelu"
        draws = Draws(target)
        self.expert_ids = draws.expert_ids(T, E)
        self.x, self.dy = draws.normal(T, H), draws.normal(T, H)
        self.weights = draws.ffn_weights(E, H=H, width=I, rows=2 * I if self.gated else I, bias=self.biased)

    @property
    def gated(self) -> bool:
        return self.kind == "swiglu"

    @property
    def biased(self) -> bool:
        return self.kind == "gelu-biases"

    def split(self, weights: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Weights in their order -> w1, b1, w2, b2."""
        w1, b1, w2, b2 = weights if self.biased else (weights[0], None, weights[1], None)
        return w1, b1, w2, b2

    def ours(self, x: Tensor, *weights: Tensor) -> Tensor:
        return fused_moe_ffn(x, self.expert_ids, *self.split(weights), activation=self.activation)

    def exact(self, x: Tensor, *weights: Tensor) -> Tensor:
        return reference.fused_moe_ffn(x, self.expert_ids, *self.split(weights), activation=self.activation)

    def full(self, value: float, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full(shape, value, device=self.target.device, dtype=dtype or self.target.dtype)


@dataclass(frozen=True)
class Way:
    """How a package computes the layer.

    Attributes:
        function: x and its own weights -> y.
        weights: in its own layout.
        back: gradients of those -> of ours.
    """

    function: Layer
    weights: list[Tensor]
    back: Callable[[Outputs], Outputs] = lambda grads: grads


def _activated(layer: PeerLayer, h: Tensor) -> Tensor:
    if not layer.gated:
        return F.gelu(h)
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def _scattermoe(layer: PeerLayer) -> Way:
    from scattermoe import parallel_linear

    experts = torch.arange(layer.E, device=layer.target.device)

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        ids, order = torch.sort(layer.expert_ids)
        ends = torch.searchsorted(ids, experts, right=True)  # its own bincount waits for the GPU, which graphs refuse
        w1, b1, w2, b2 = layer.split(weights)
        h = parallel_linear(x, w1.permute(0, 2, 1), 1, ids, order, ends, expert_biases=b1, grouped_out=True)
        h = _activated(layer, h)
        return parallel_linear(h, w2.permute(0, 2, 1), 1, ids, order, ends, expert_biases=b2, grouped_in=True)

    return Way(run, layer.weights)


def _liger(layer: PeerLayer) -> Way:
    from liger_kernel.ops import LigerFusedMoEFunction

    ids, ones = layer.expert_ids[:, None].int(), layer.full(1.0, layer.T, 1)
    return Way(lambda x, w1, w2: LigerFusedMoEFunction.apply(x, w1, w2, ids, ones), layer.weights)


def _megablocks(layer: PeerLayer) -> Way:
    from megablocks import Arguments, ParallelDroplessMLP

    E, I, H = layer.E, layer.I, layer.H
    module = ParallelDroplessMLP(
        Arguments(
            hidden_size=H, ffn_hidden_size=I, bias=False, return_bias=False, moe_num_experts=E, moe_top_k=1,
            moe_loss_weight=0.0, activation_fn=F.silu if layer.gated else F.gelu, mlp_impl="grouped",
            mlp_type="glu" if layer.gated else "mlp", fp16=False, bf16=True, device=layer.target.device,
        )
    )  # fmt: skip
    w1, w2 = layer.weights
    ups = dict(zip(("w1", "v1"), w1.split(I, dim=1), strict=False))  # gate, up
    own = {name: up.reshape(E * I, H) for name, up in ups.items()} | {"w2": w2.transpose(1, 2).reshape(E * I, H)}
    with torch.no_grad():
        for name, value in own.items():
            getattr(module.mlp, name).copy_(value)
    ids, ones = layer.expert_ids[:, None], layer.full(1.0, layer.T, 1)

    def back(grads: Outputs) -> Outputs:
        *up_grads, down = (grad.view(E, I, H) for grad in grads)
        return torch.cat(up_grads, dim=1), down.transpose(1, 2)

    return Way(lambda x, *_: module(x, None, ones, ids), [getattr(module.mlp, name) for name in own], back)


def _sonicmoe(layer: PeerLayer) -> Way:
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    E, I, H = layer.E, layer.I, layer.H
    activation = ActivationType.SWIGLU if layer.gated else ActivationType.GELU
    tokens = torch.arange(layer.T, dtype=torch.int32, device=layer.target.device)
    ids, scores = layer.expert_ids.int(), layer.full(1.0, layer.T, dtype=torch.float32)
    weights = list(layer.weights)
    if layer.gated:  # its gate and up rows alternate
        weights[0] = weights[0].view(E, 2, I, H).transpose(1, 2).reshape(E, 2 * I, H)

    def run(x: Tensor, *own: Tensor) -> Tensor:
        w1, b1, w2, b2 = layer.split(own)
        stream = torch.cuda.current_stream().cuda_stream
        w1, w2 = w1.permute(1, 2, 0), w2.permute(1, 2, 0)
        return moe_general_routing_inputs(x, scores, tokens, ids, w1, b1, w2, b2, E, stream, activation)[0]

    def back(grads: Outputs) -> Outputs:
        if not layer.gated:
            return grads
        return grads[0].view(E, I, 2, H).transpose(1, 2).reshape(E, 2 * I, H), grads[1]

    return Way(run, weights, back)


def _transformers(layer: PeerLayer, implementation: str) -> Way:
    """Real experts modules: Mixtral's for the gated layer, Nemotron-H's for the other."""
    if layer.gated:
        from transformers import MixtralConfig as Config
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts as Experts

        config = Config(hidden_size=layer.H, intermediate_size=layer.I, num_local_experts=layer.E, hidden_act="silu")
    else:
        from transformers import NemotronHConfig as Config
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts as Experts

        config = Config(hidden_size=layer.H, moe_intermediate_size=layer.I, n_routed_experts=layer.E,
                        mlp_hidden_act="gelu")  # fmt: skip
    config._experts_implementation = implementation
    module = Experts(config).to(layer.target.device, layer.target.dtype)
    up = "gate_up_proj" if layer.gated else "up_proj"
    with torch.no_grad():
        for name, weight in zip((up, "down_proj"), layer.weights, strict=True):
            getattr(module, name).copy_(weight)
    ids, ones = layer.expert_ids[:, None], layer.full(1.0, layer.T, 1)
    return Way(lambda x, *_: module(x, ids, ones), [getattr(module, up), module.down_proj])


@dataclass(frozen=True)
class Peer:
    """A package, what it can compute, and how.

    Attributes:
        package: the module to import.
        way: its adapter.
        kinds: of KINDS.
        otherwise: why not the others.
        needs: "cpu": runs anywhere; "triton": in Triton's interpreter too; "cuda"; "sm_90".
    """

    package: str
    way: Callable[[PeerLayer], Way]
    kinds: tuple[str, ...]
    otherwise: str
    needs: str


PEERS = {
    "transformers_eager": Peer("transformers", partial(_transformers, implementation="eager"), KINDS[1:],
                               "no model of its has biases without a gate", "cpu"),
    "transformers_grouped_mm": Peer("transformers", partial(_transformers, implementation="grouped_mm"), KINDS[1:],
                                    "measured with biases in suite ffn", "cpu"),
    "scattermoe": Peer("scattermoe", _scattermoe, KINDS, "", "triton"),
    "megablocks": Peer("megablocks", _megablocks, KINDS[1:], "has no biases of experts", "cuda"),
    "sonicmoe": Peer("sonicmoe", _sonicmoe, KINDS, "", "sm_90"),
    "liger": Peer("liger_kernel", _liger, KINDS[2:], "has gated experts without biases only", "triton"),
}  # fmt: skip


def why_not(name: str, kind: str, target: Target) -> str:
    """The reason why a peer cannot run a kind of layer on a target, or ""."""
    peer = PEERS[name]
    if kind not in peer.kinds:
        return peer.otherwise
    if importlib.util.find_spec(peer.package) is None:
        return "not installed"
    if peer.needs != "cpu" and not target.on_gpu and not (peer.needs == "triton" and backend.interpreting()):
        return "needs CUDA"
    if peer.needs == "sm_90" and torch.cuda.get_device_capability(target.device)[0] != 9:
        return "needs sm_90"
    return ""


def build(layer: PeerLayer, direction: str) -> dict[str, Provider | Skipped]:
    """Ours and every peer on one layer."""

    def exact(dtype: torch.dtype) -> Outputs:
        converted = [w.to(dtype) for w in layer.weights]
        return runner(layer.exact, layer.x.to(dtype), converted, layer.dy.to(dtype), direction)()

    def provider(way: Way) -> Provider:
        run = runner(way.function, layer.x, way.weights, layer.dy, direction)
        return Provider(run, exact, arrange=lambda outputs: (*outputs[:2], *way.back(outputs[2:])))

    providers: dict[str, Provider | Skipped] = {"moebert_kernels": provider(Way(layer.ours, layer.weights))}
    for name, peer in PEERS.items():
        if reason := why_not(name, layer.kind, layer.target):
            providers[name] = Skipped(reason)
            continue
        try:
            providers[name] = provider(peer.way(layer))
        except Exception as error:  # such as another version, or a part of it that is missing
            providers[name] = Skipped(f"cannot be loaded: {first_line(error)}")
    return providers


def cases(target: Target) -> list[Case]:
    directions = [("forward", 16), ("forward_backward", 16)] if target.smoke else None
    return [
        _case(kind, direction, T, target)
        for direction, T in directions or (GPU_CASES if target.on_gpu else CPU_CASES)
        for kind in KINDS
    ]


def _case(kind: str, direction: str, T: int, target: Target) -> Case:
    shape = {size: (SMOKE if target.smoke else BERT_BASE)[size] for size in "HIE"}
    return Case(
        name=f"peers-{kind}-{direction}-T{T}",
        parameters={"op": "fused_moe_ffn", "layer": kind, "direction": direction, "dtype": target.dtype_name, "T": T,
                    **shape},
        providers=("moebert_kernels", *PEERS),
        build=lambda: build(PeerLayer(kind, T, target, **shape), direction),
        baseline="moebert_kernels",
        requires=[Requirement("moebert_kernels", name, AT_LEAST) for name in PEERS] if target.on_gpu else (),
        cost=op_cost("fused_moe_ffn", direction, T=T, dtype=target.dtype, gated=kind == "swiglu", **shape),
    )  # fmt: skip
