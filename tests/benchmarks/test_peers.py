"""Adapters of packages that no CPU can run, on stand-ins with those packages' layouts; and why a peer is skipped."""

import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import bench_peers as peers
from benchmarks.gate import check
from benchmarks.measuring import Skipped, Target

CPU = Target.of("cpu")
SHAPE = {"H": 16, "I": 8, "E": 4}


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Everything is installed and the device is a Hopper, as far as the reasons for skipping go."""
    monkeypatch.setattr(
        peers, "why_not", lambda name, kind, target: "" if kind in peers.PEERS[name].kinds else "cannot"
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))


def stand_in(monkeypatch, **modules):
    for name, contents in modules.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name.replace("__", "."), module)


def sonicmoe_layer(x, scores, tokens, ids, w1, b1, w2, b2, num_experts, stream, activation):
    """w1 (rows, H, E) whose gate and up rows alternate, w2 (H, I, E); returns y and a count."""
    y = torch.zeros_like(x)
    for e in range(num_experts):
        h = F.linear(x, w1[..., e], None if b1 is None else b1[e])
        h = F.silu(h[:, ::2]) * h[:, 1::2] if activation == "swiglu" else F.gelu(h)
        y = y + torch.where((ids == e)[:, None], F.linear(h, w2[..., e], None if b2 is None else b2[e]), 0.0)
    assert tokens.tolist() == list(range(len(x))) and (scores == 1).all()
    return y, None


class MegaBlocksMLP(torch.nn.Module):
    """w1, v1 and w2 are (E * I, H); v1 with a gate only."""

    def __init__(self, arguments):
        super().__init__()
        self.arguments = arguments
        names = ("w1", "v1", "w2") if arguments.mlp_type == "glu" else ("w1", "w2")
        size = arguments.moe_num_experts * arguments.ffn_hidden_size, arguments.hidden_size
        self.mlp = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.empty(size)) for name in names})

    def forward(self, x, scores, expert_weights, ids):
        a = self.arguments
        w = {name: value.view(a.moe_num_experts, a.ffn_hidden_size, -1) for name, value in self.mlp.items()}
        y = torch.zeros_like(x)
        for e in range(a.moe_num_experts):
            h = a.activation_fn(x @ w["w1"][e].t())
            h = h * (x @ w["v1"][e].t()) if "v1" in w else h
            y = y + torch.where(ids == e, expert_weights * (h @ w["w2"][e]), 0.0)
        return y


ADAPTED = ("sonicmoe", "megablocks", "transformers_eager", "transformers_grouped_mm")


@pytest.mark.parametrize("name,kind", [(name, kind) for name in ADAPTED for kind in peers.PEERS[name].kinds])
def test_adapter_brings_weights_and_gradients_into_the_other_layout_and_back(name, kind, on_a_gpu, monkeypatch):
    activations = types.SimpleNamespace(SWIGLU="swiglu", GELU="gelu")
    stand_in(
        monkeypatch,
        sonicmoe={}, sonicmoe__enums={"ActivationType": activations},
        sonicmoe__functional={"moe_general_routing_inputs": sonicmoe_layer},
        megablocks={"Arguments": types.SimpleNamespace, "ParallelDroplessMLP": MegaBlocksMLP},
    )  # fmt: skip
    monkeypatch.setattr(peers, "PEERS", {name: peers.PEERS[name]})
    checked = check(peers.build(peers.PeerLayer(kind, 12, CPU, **SHAPE), "forward_backward"))
    assert checked.refused == {} and set(checked.passed) == {"moebert_kernels", name}


def test_package_that_cannot_be_loaded_is_skipped_with_its_error(on_a_gpu, monkeypatch):
    stand_in(monkeypatch, liger_kernel={}, liger_kernel__ops={})
    monkeypatch.setattr(peers, "PEERS", {"liger": peers.PEERS["liger"]})
    built = peers.build(peers.PeerLayer("swiglu", 4, CPU, **SHAPE), "forward")
    assert isinstance(built["liger"], Skipped) and built["liger"].reason.startswith("cannot be loaded: ImportError")


def test_reasons(monkeypatch):
    reason = peers.why_not
    assert reason("liger", "gelu", CPU) == "has gated experts without biases only"
    assert reason("megablocks", "gelu-biases", CPU) == "has no biases of experts"
    installed = {"megablocks", "sonicmoe", "scattermoe", "transformers"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in installed else None)
    assert reason("liger", "swiglu", CPU) == "not installed"
    assert reason("megablocks", "gelu", CPU) == "needs CUDA"
    assert reason("transformers_eager", "gelu", CPU) == ""
    monkeypatch.setattr(peers.backend, "interpreting", lambda: False)
    assert reason("scattermoe", "gelu", CPU) == "needs CUDA"
    monkeypatch.setattr(peers.backend, "interpreting", lambda: True)
    assert reason("scattermoe", "gelu", CPU) == ""
    gpu = replace(CPU, device=torch.device("cuda"))
    for capability, wanted in (((8, 0), "needs sm_90"), ((9, 0), "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert reason("sonicmoe", "swiglu", gpu) == wanted
