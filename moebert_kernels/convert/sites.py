"""Where the feed-forward layers of a transformers model are, how their weights are read, and how they are replaced.

Every feed-forward of transformers 5 has one of three shapes. A `Site` is one feed-forward of a model:

| shape | families | what `install` does |
|---|---|---|
| "split" | BERT's: `intermediate.dense`, `output.dense`, `output.LayerNorm` | `output` becomes the layer and gets the \
residual; `intermediate` becomes the identity |
| "module" | one module with two linear layers, or three with a gate | the module becomes the layer |
| "inline" | BART's: `fc1` and `fc2` of the encoder layer itself | `fc1` becomes the layer; the activation and `fc2` \
become the identity |

A gated module is "module" with a gated activation. A module that computes anything else than w2 act(w1 x + b1) + b2 is
refused: `check` compares both on random numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebert_kernels import reference
from moebert_kernels.activation import ACTIVATIONS, GATED
from moebert_kernels.errors import UserError
from moebert_kernels.layers.feed_forward import MoEFeedForward

# names of the first linear layers (gate first) and of the second, as transformers' modules call them
_MODULES = (
    (("gate_proj", "up_proj"), "down_proj"),  # llama, qwen3, gemma3
    (("gate_up_proj",), "down_proj"),  # phi3
    (("wi_0", "wi_1"), "wo"),  # t5 v1.1
    (("wi",), "wo"),  # t5
    (("Wi",), "Wo"),  # modernbert
    (("fc1",), "fc2"),  # vit, dinov2, phi
    (("lin1",), "lin2"),  # distilbert
    (("c_fc",), "c_proj"),  # gpt2
    (("dense_h_to_4h",), "dense_4h_to_h"),  # gpt_neox
)
_INLINE = ("bart", "mbart", "opt", "pegasus", "marian", "m2m_100")  # model types whose layers hold fc1 and fc2
_ACTIVATION_NAMES = ("act", "act_fn", "activation", "activation_fn", "intermediate_act_fn")
# class of an activation module -> its name in the ops
_ACTIVATIONS = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "LinearActivation": "identity",
}
_GATED = {plain: gated for gated, plain in GATED.items()}
_REFUSED = {
    "albert": "all of its layers share one feed-forward, which cannot become a different mixture in each",
    "mobilebert": "its layers have several feed-forwards with a bottleneck around them",
}


class DenseWeights(NamedTuple):
    """w1 (I, H), or (2I, H) with a gate, gate rows first; b1 (I or 2I,), w2 (H, I), b2 (H,); biases may be None."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None


@dataclass(frozen=True)
class Site:
    """One feed-forward of a model.

    Attributes:
        name: dotted path of what becomes the layer, in the model.
        owner: the module that holds it; for "inline" the encoder layer.
        shape: "split", "module" or "inline".
        first, second: dotted paths of the linear layers in `owner`.
        activation: its name in the ops; a gated one means that `first` has 2I rows.
        hidden_dropout: probability of dropping an activation in training.
        output_dropout: probability of dropping an output in training, if the replaced module drops them.
    """

    name: str
    owner: Any
    shape: str
    first: tuple[str, ...]
    second: str
    activation: str
    hidden_dropout: float = 0.0
    output_dropout: float = 0.0

    @property
    def attribute(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def module(self) -> Any:
        """What is at the site now: the dense module, or the layer that replaced it."""
        return getattr(self.owner, self.attribute)

    @property
    def norm(self) -> Any:
        """The LayerNorm behind the residual of a "split" site; None where there is none inside."""
        return getattr(self.module, "LayerNorm", None) if self.shape == "split" else None

    @property
    def first_modules(self) -> list[Any]:
        return [self.owner.get_submodule(name) for name in self.first]

    @property
    def second_module(self) -> Any:
        return self.owner.get_submodule(self.second)

    @property
    def parts(self) -> list[Any]:
        """The modules that compute the dense feed-forward, in their order."""
        if self.shape == "inline":
            return self.linear_modules
        return [self.owner.intermediate, self.owner.output] if self.shape == "split" else [self.module]

    def weights(self) -> DenseWeights:
        """The dense weights in nn.Linear's layout, detached; those of a gate before those of the other branch."""
        w1, b1 = (_joined([_linear(module)[k] for module in self.first_modules]) for k in (0, 1))
        w2, b2 = _linear(self.second_module)
        assert w1 is not None and w2 is not None
        return DenseWeights(w1, b1, w2, b2)

    @property
    def linear_modules(self) -> list[Any]:
        return [*self.first_modules, self.second_module]

    def put(self, weights: DenseWeights) -> None:
        """Write weights, of the form that `weights` returns, into the dense feed-forward."""
        branches = len(self.first_modules)
        firsts = zip(self.first_modules, weights.w1.chunk(branches), _chunks(weights.b1, branches), strict=True)
        for module, weight, bias in (*firsts, (self.second_module, weights.w2, weights.b2)):
            for target, value in zip(_linear(module), (weight, bias), strict=True):
                if target is not None and value is not None:
                    target.copy_(value)

    def check(self) -> None:
        """Raise a UserError unless the module computes w2 act(w1 x + b1) + b2 with the weights that were read."""
        w1, b1, w2, b2 = (None if t is None else t.float() for t in self.weights())
        assert w1 is not None and w2 is not None
        if w1.is_meta:
            return
        x = torch.linspace(-1.0, 1.0, 2 * w1.shape[1], device=w1.device).sin().view(2, -1)
        want = F.linear(reference.activate(F.linear(x, w1, b1), self.activation), w2, b2)
        modules = self.parts
        modes = [(module, module.training) for outer in modules for module in outer.modules()]
        try:
            for module in modules:
                module.eval()
            typed = x.to(self.weights().w1.dtype)
            with torch.no_grad():
                if self.shape == "inline":
                    h = reference.activate(modules[0](typed).float(), self.activation)
                    got = modules[1](h.to(typed.dtype))
                elif self.shape == "split":
                    residual, norm = torch.zeros_like(typed), self.norm
                    got = modules[1](modules[0](typed), residual)
                    want = want if norm is None else norm(want.to(typed.dtype))
                else:
                    got = modules[0](typed)
        finally:
            for module, mode in modes:
                module.training = mode
        close = 1e-4 if typed.dtype == torch.float32 else 0.05
        if got.shape != want.shape or not torch.allclose(got.float(), want.float(), atol=close, rtol=close):
            raise UserError(f"model: {self.name} does not compute w2 act(w1 x + b1) + b2, so it cannot be split")

    def install(self, layer: MoEFeedForward) -> None:
        """Put `layer` in the place of the dense feed-forward."""
        if self.shape == "split":
            self.owner.intermediate = nn.Identity()
        if self.shape == "inline":
            activation = next(name for name in _ACTIVATION_NAMES if hasattr(self.owner, name))
            setattr(self.owner, activation, nn.Identity())
            setattr(self.owner, self.second, nn.Identity())
            self.owner.activation_dropout = 0.0  # the layer drops activations itself
        setattr(self.owner, self.attribute, layer)


def find_sites(model: nn.Module, target_modules: tuple[str, ...] | None = None) -> list[Site]:
    """The dense feed-forward layers of a transformers model, in the order of its modules.

    Args:
        model: any transformers model, bare or with a head.
        target_modules: take only feed-forwards whose dotted path ends in one of these names (such as "mlp").

    Raises:
        UserError: a model without feed-forwards of a known shape, one that is converted already, an activation that
            the ops do not have, or a name of `target_modules` that fits nothing; with the reason.
    """
    if isinstance(model, str):
        raise UserError(f"model: expected a loaded model, got the name {model!r}; AutoModel.from_pretrained loads it")
    if not isinstance(model, nn.Module):
        raise UserError(f"model: expected a model of transformers, got {type(model).__name__}")
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if any(isinstance(module, MoEFeedForward) for module in model.modules()):
        raise UserError(f"model: expected a dense model, got {type(model).__name__} with experts in it")
    if kind in _REFUSED:
        raise UserError(f"model: {kind} cannot be converted: {_REFUSED[kind]}")
    sites = [site for name, module in model.named_modules() for site in _sites_of(model, name, module, kind)]
    sites = [site for site in sites if any(part.isdigit() for part in site.name.split("."))]  # of layers, not of a head
    if target_modules is not None:
        unused = [t for t in target_modules if not any(_ends_in(site.name, t) for site in sites)]
        if unused:
            found = ", ".join(sorted({site.attribute for site in sites})) or "none"
            raise UserError(f"target_modules: expected names of feed-forwards ({found}), got {unused[0]!r}")
        sites = [site for site in sites if any(_ends_in(site.name, t) for t in target_modules)]
    if not sites:
        raise UserError(f"model: expected feed-forward layers of a known shape, found none in {type(model).__name__}")
    return sites


def common_width(sites: list[Site]) -> int:
    """Return D, the neurons of every site; raise a UserError if they differ."""
    widths = {site.weights().w2.shape[1] for site in sites}
    if len(widths) > 1:
        raise UserError(f"model: expected feed-forwards of one width, got {sorted(widths)}")
    return widths.pop()


def _ends_in(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _sites_of(model: nn.Module, name: str, module: Any, kind: str) -> Iterator[Site]:
    children = module._modules
    if _has(children, "intermediate", "output") and _has(children["intermediate"]._modules, "dense"):
        output = children["output"]
        if "dense" in output._modules and set(output._modules) <= {"dense", "LayerNorm", "dropout"}:
            activation = _activation(children["intermediate"], name, gated=False)
            yield Site(
                f"{name}.output", module, "split", ("intermediate.dense",), "output.dense", activation,
                output_dropout=_probability(output, "dropout"),
            )  # fmt: skip
        return
    for first, second in _MODULES:
        if not name or not _has(children, *first, second):
            continue
        gated = len(first) == 2 or len(_linear(children[first[0]])[0]) == 2 * _linear(children[second])[0].shape[1]
        holds_attention = any("attn" in child for child in children)
        if holds_attention and kind in _INLINE:
            yield Site(
                f"{name}.{first[0]}", module, "inline", first, second, _activation(module, name, gated),
                hidden_dropout=float(getattr(module, "activation_dropout", 0.0)),
            )  # fmt: skip
        elif not holds_attention:
            owner, _, attribute = name.rpartition(".")
            hidden, output_dropout = _dropouts(module)
            yield Site(
                name, model.get_submodule(owner), "module", tuple(f"{attribute}.{part}" for part in first),
                f"{attribute}.{second}", _activation(module, name, gated), hidden, output_dropout,
            )  # fmt: skip
        return


def _has(children: Any, *names: str) -> bool:
    return all(isinstance(children.get(name), nn.Module) for name in names)


def _linear(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias of an nn.Linear, or of GPT-2's Conv1D, which keeps (in, out)."""
    weight = module.weight.detach()
    bias = None if module.bias is None else module.bias.detach()
    return (weight.T if type(module).__name__ == "Conv1D" else weight), bias


def _chunks(bias: Tensor | None, number: int) -> Sequence[Tensor | None]:
    return [None] * number if bias is None else bias.chunk(number)


def _joined(parts: list[Any]) -> Tensor | None:
    return None if parts[0] is None else parts[0] if len(parts) == 1 else torch.cat(parts)


def _activation(module: Any, name: str, gated: bool) -> str:
    found = next((getattr(module, a) for a in _ACTIVATION_NAMES if hasattr(module, a)), None)
    kind = type(found).__name__ if isinstance(found, nn.Module) else getattr(found, "__name__", str(found))
    if isinstance(found, nn.GELU):
        kind = "NewGELUActivation" if found.approximate == "tanh" else "GELUActivation"
    activation = {"gelu": "gelu", "relu": "relu", "silu": "silu"}.get(kind, _ACTIVATIONS.get(kind))
    if activation is not None and gated:
        activation = _GATED.get(activation)
    if activation is None:
        gate = "gate of the " if gated else ""
        raise UserError(f"model: the {gate}activation {kind} of {name} is none of the ops': {', '.join(ACTIVATIONS)}")
    return activation


def _dropouts(module: Any) -> tuple[float, float]:
    """Probabilities of dropping an activation and an output, of a module with at most one nn.Dropout.

    T5 and ModernBERT drop before the second linear layer, DistilBERT and GPT-2 behind it.
    """
    p = _probability(module, "drop") or _probability(module, "dropout")
    return (0.0, p) if _has(module._modules, "lin1") or _has(module._modules, "c_fc") else (p, 0.0)


def _probability(module: Any, name: str) -> float:
    found = getattr(module, name, None)
    return float(found.p) if isinstance(found, nn.Dropout) else 0.0
