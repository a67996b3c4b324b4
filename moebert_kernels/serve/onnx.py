"""ONNX of a model, converted or dense, in standard operators: any server with ONNX Runtime runs it.

Each expert has matrices of its own, and gets its rows by NonZero and Gather and puts them back by ScatterND, so that
ONNX Runtime's quantiser finds ordinary products. Hash tables, gates and the padding mask are inside the graph.

The other form has one operator of ONNX Runtime for all experts of a layer: `moebert_kernels.serve.onnx_operator`.
Decoders get the keys and values of earlier tokens as inputs: `moebert_kernels.serve.onnx_decoder`.
"""

from __future__ import annotations

import copy
import inspect
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moebert_kernels import reference
from moebert_kernels.errors import UserError, require_extra
from moebert_kernels.layers import MoEFeedForward, moe_layers
from moebert_kernels.nn.hash_router import HashRouter
from moebert_kernels.serve.modules import PackedModule
from moebert_kernels.serve.onnx_decoder import PAST, PRESENT, CachedDecoder, example_of_decoder
from moebert_kernels.serve.onnx_operator import OperatorExperts, check_operator, passes
from moebert_kernels.serve.preparation import FEWEST_OUTPUTS

OPSET = 20  # Gelu is an operator from here on
EXPERTS = ("matrices", "operator")
_FREE = torch.export.Dim.DYNAMIC
_OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")


def export_onnx(model: Any, path: str | Path, *, dtype: str = "float32", experts: str = "matrices") -> None:
    """Write an encoder or a causal language model as an ONNX file whose batch and length are free.

    Inputs are int64 `input_ids`, `attention_mask` and, of models with several types of tokens, `token_type_ids`, all
    (batch, sequence); outputs are the model's: `logits`, or `last_hidden_state` and what else there is. A language
    model has `position_ids` where it takes them, and the keys and values of P >= 0 earlier tokens: inputs
    `past_key_values.0.key` and so on, (batch, heads, P, head size), and outputs `present.0.key` with those of all
    P + sequence tokens; its `attention_mask` is (batch, P + sequence). These are the names by which other packages call
    exported models. Hidden states of padding are nobody's: behind experts with a residual they are 0, not the model's.
    The model is left as it was.

    Args:
        model: of transformers, dense or converted, not prepared; an encoder, with a head or without, or a causal
            language model.
        path: of the file. Weights of more than 2 GB go beside it.
        dtype: "float32"; or "int8": then ONNX Runtime's dynamic quantisation has run over it, with weights per channel.
        experts: "matrices": standard operators alone, and padding costs nothing. "operator": one `com.microsoft.MoE`
            for the experts of a layer, of a converted model in float32; ONNX Runtime has it for CPUs and CUDA.

    Raises:
        UserError: a model that is neither, is prepared, or routes by task; another dtype or form of the experts;
            "operator" with a dense model, int8, or an activation that the operator does not have.
        MissingExtra: a package of the extra `serve` is not installed.
    """
    if dtype not in ("float32", "int8"):
        raise UserError(f"dtype: expected float32 or int8 in an ONNX file, got {dtype!r}")
    if experts not in EXPERTS:
        raise UserError(f"experts: expected one of {', '.join(EXPERTS)}, got {experts!r}")
    _check(model)
    if experts == "operator":
        check_operator(model, dtype)
    require_extra("serve", "onnx", "onnxscript", *(("onnxruntime",) if dtype == "int8" else ()))
    path = Path(path)
    if dtype == "int8":
        with tempfile.TemporaryDirectory() as folder:
            export_onnx(model, Path(folder) / "model.onnx")
            quantise_onnx(Path(folder) / "model.onnx", path)
        return
    copied = copy.deepcopy(model).float().cpu().eval()
    inputs, outputs = _example(copied)
    module: nn.Module = _Flat(copied, tuple(inputs), outputs)
    if copied.can_generate():
        module = CachedDecoder(copied, tuple(inputs))
        inputs = example_of_decoder(copied, inputs)
        outputs += tuple(name.replace(PAST, PRESENT) for name in inputs if name.startswith(PAST))
    standard(copied, StandardExperts if experts == "matrices" else OperatorExperts)
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module.eval(), tuple(inputs.values()), dynamo=True, opset_version=OPSET, verbose=False,
            input_names=list(inputs), output_names=list(outputs),
            dynamic_shapes=(tuple({0: _FREE, 2 if name.startswith(PAST) else 1: _FREE} for name in inputs),),
        )  # fmt: skip
    program.save(path)


def quantise_onnx(source: str | Path, target: str | Path) -> None:
    """ONNX Runtime's dynamic quantisation: weights int8 per channel, activations 8 bits per tensor in each call.

    As in `prepare`, gates and layers of fewer than 16 outputs stay in float32: of their logits close ones decide.
    """
    require_extra("serve", "onnx", "onnxruntime")
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(str(source), load_external_data=False).graph
    few = {weight.name for weight in graph.initializer if len(weight.dims) == 2 and min(weight.dims) < FEWEST_OUTPUTS}
    kept = [
        node.name for node in graph.node if node.op_type in ("MatMul", "Gemm")
        and (not few.isdisjoint(node.input) or any(".router'" in entry.value for entry in node.metadata_props))
    ]  # fmt: skip
    with _quiet():
        kept += [f"{name}_MatMul" for name in kept]  # as the quantiser calls a Gemm that it takes apart
        quantize_dynamic(str(source), str(target), weight_type=QuantType.QInt8, per_channel=True, nodes_to_exclude=kept)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings, and without the quantiser's report of every tensor of integers."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def standard(model: Any, experts: Callable[[MoEFeedForward], nn.Module]) -> Any:
    """The model, whose layers get these `experts` and whose hash routers look up in plain torch; in place."""
    for layer in moe_layers(model):
        layer.experts = experts(layer)  # type: ignore[assignment]
        if isinstance(layer.router, HashRouter):
            layer.router.__class__ = _StandardHashRouter
        elif hasattr(layer.router, "balance"):
            layer.router.balance = _NoLoss()  # of training alone
    return model


class StandardExperts(nn.Module):
    """The experts of a layer in plain torch, each with two nn.Linear; for inference."""

    def __init__(self, layer: MoEFeedForward) -> None:
        super().__init__()
        experts: Any = layer.experts
        self.activation, self.adds_residual = experts.activation, experts.adds_residual
        self.passes = passes(layer)
        with torch.no_grad():
            w1, w2 = experts.weights()
            b1, b2 = experts.biases()
        self.first = nn.ModuleList(_linear(w1[e], None if b1 is None else b1[e]) for e in range(len(w1)))
        self.second = nn.ModuleList(_linear(w2[e], None if b2 is None else b2[e]) for e in range(len(w2)))
        self.norms = nn.ModuleList()
        if experts.adds_residual:
            for weight, bias in zip(experts.norm_weight, experts.norm_bias, strict=True):
                norm = nn.LayerNorm(len(weight), eps=experts.eps)
                norm.weight.data, norm.bias.data = weight.detach().clone(), bias.detach().clone()
                self.norms.append(norm)

    def forward(self, x: Tensor, expert_ids: Tensor, routing_weights: Tensor | None = None) -> Tensor:
        """As `Experts.forward`, of expert ids (...) or (..., top_k), but 0 where there is none, if that is padding.

        With residual and norm x would stand there: padding that no norm has made small, and that would decide the scale
        of attention's next inputs in an int8 file.
        """
        flat = x.reshape(-1, x.shape[-1])
        top_k = 1 if expert_ids.ndim < x.ndim else expert_ids.shape[-1]
        ids = expert_ids.reshape(-1)
        y = flat if self.passes else torch.zeros_like(flat)
        if top_k > 1:
            y = y.repeat_interleave(top_k, 0)
        for e in range(len(self.first)):
            rows = (ids == e).nonzero().squeeze(1)
            inputs = flat.index_select(0, rows if top_k == 1 else rows // top_k)
            outputs = self.second[e](reference.activate(self.first[e](inputs), self.activation))
            if self.adds_residual:
                outputs = self.norms[e](inputs + outputs)
            if routing_weights is not None:
                outputs = outputs * routing_weights.reshape(-1, 1).index_select(0, rows)
            y = y.index_copy(0, rows, outputs)
        if top_k > 1:
            y = y.view(-1, top_k, y.shape[1]).sum(1)
        return y.view(x.shape)


class _StandardHashRouter(HashRouter):
    def forward(self, token_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        experts = self.table.long()[token_ids]
        return experts if attention_mask is None else experts.masked_fill(attention_mask == 0, -1)


class _NoLoss(nn.Module):
    def forward(self, probabilities: Tensor, *_: Any) -> Tensor:
        return probabilities.new_zeros(())


class _Flat(nn.Module):
    """The model with inputs by position and a tuple of outputs."""

    def __init__(self, model: Any, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = self.model(**dict(zip(self.inputs, inputs, strict=True)), return_dict=True)
        return tuple(found[name] for name in self.outputs)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear


def _check(model: Any) -> None:
    """Raise the errors of `export_onnx`."""
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"model: expected a model of transformers, got {type(model).__name__}")
    kind, config = type(model).__name__, model.config
    if any(isinstance(module, PackedModule) for module in model.modules()):
        raise UserError("model: expected one that is not prepared: export the model, then quantise the file")
    if config.is_encoder_decoder or (getattr(config, "is_decoder", False) and not model.can_generate()):
        raise UserError(f"model: expected an encoder or a causal language model, got {kind}")
    if getattr(getattr(config, "quantization_config", None), "is_task_routed", False):
        raise UserError("model: expected one without routing by task, got one; merge it for a task first")
    if "input_ids" not in _parameters(model):
        raise UserError(f"model: expected an encoder of texts or a causal language model, got {kind}")


def _example(model: Any) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Small inputs by name, and the names of the outputs."""
    names = ["input_ids", "attention_mask"]
    if model.can_generate():
        names.append("position_ids")
    elif getattr(model.config, "type_vocab_size", 0) > 1:  # RoBERTa's has one, and its tokenizers make none
        names.append("token_type_ids")
    inputs = {name: torch.ones(2, 6, dtype=torch.int64) for name in names if name in _parameters(model)}
    if "token_type_ids" in inputs:
        inputs["token_type_ids"] = torch.zeros(2, 6, dtype=torch.int64)
    if "position_ids" in inputs:
        inputs["position_ids"] = torch.arange(6).expand(2, 6).clone()
    with torch.no_grad():
        found = model(**inputs, return_dict=True)
    return inputs, tuple(name for name in _OUTPUTS if found.get(name) is not None)


def _parameters(model: Any) -> Mapping[str, Any]:
    return inspect.signature(model.forward).parameters
