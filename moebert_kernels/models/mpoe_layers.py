"""Where the feed-forwards of transformers' models are, and what stands there in an MPOE model.

| style | module of the layer, and what of it is replaced |
|---|---|
| t5 | `T5LayerFF.DenseReluDense` |
| gpt2 | `GPT2Block.mlp`, its dropout kept |
| bert | `BertLayer.intermediate`; `BertLayer.output.dense` becomes the identity |
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from moebert_kernels.errors import UserError
from moebert_kernels.models.configuration import ACTIVATIONS
from moebert_kernels.models.mpoe_configuration import HASH_ROUTERS
from moebert_kernels.nn import (
    DenseExperts,
    Experts,
    GateRouter,
    HashRouter,
    MPOExperts,
    RoutedFeedForward,
    SwitchRouter,
    Top2Router,
)
from moebert_kernels.nn.context import RecomputedLayer, Tokens, current, derived_class, recomputed_class, routed
from moebert_kernels.nn.hash_router import group_by_hash, resize_tables
from moebert_kernels.nn.routed_feed_forward import Router

_GATES = {"gelu_tanh": "geglu_tanh", "gelu": "geglu", "silu": "swiglu", "relu": "reglu"}


class FFNSize(NamedTuple):
    """A feed-forward as a configuration describes it: I, H, and how new weights are drawn."""

    hidden_size: int
    expert_size: int
    activation: str
    has_bias: bool
    hidden_dropout: float
    output_dropout: float
    w1_std: float
    w2_std: float


def ffn_size(config: Any) -> FFNSize:
    """The feed-forward of any family here.

    Raises:
        UserError: an activation that no op offers.
    """
    if hasattr(config, "d_ff"):  # T5
        H, I, factor = config.d_model, config.d_ff, config.initializer_factor
        activation = _activation("feed_forward_proj", config.dense_act_fn, config.is_gated_act)
        return FFNSize(H, I, activation, False, config.dropout_rate, 0.0, factor * H**-0.5, factor * I**-0.5)
    H, std = config.hidden_size, config.initializer_range
    if hasattr(config, "n_inner"):  # GPT-2
        activation = _activation("activation_function", config.activation_function)
        I = config.n_inner or 4 * H
        return FFNSize(H, I, activation, True, 0.0, config.resid_pdrop, std, std / math.sqrt(2 * config.n_layer))
    activation = _activation("hidden_act", config.hidden_act)
    return FFNSize(H, config.intermediate_size, activation, True, 0.0, 0.0, std, std)


def _activation(name: str, activation: str, gated: bool = False) -> str:
    found = ACTIVATIONS.get(activation)
    if gated and found is not None:
        found = _GATES.get(found)
    if found is None:
        raise UserError(f"{name}: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return found


class MPOEFeedForward(RoutedFeedForward):
    """A router and experts where transformers' code calls a feed-forward with hidden states alone.

    What routing needs besides comes from the forward of the stack around it; see `moebert_kernels.nn.context`.
    """

    def __init__(self, router: Router, experts: Experts, output_dropout: float) -> None:
        super().__init__(router, experts)
        self.dropout = nn.Dropout(output_dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """(B, T, H) -> (B, T, H).

        Raises:
            ValueError: no forward of a model that contains this layer runs in this thread.
        """
        tokens, losses, _ = current()
        compiling = torch.compiler.is_compiling()
        if tokens is None or not (compiling or self in tokens.layers):
            raise ValueError(
                "forward: expected to run inside the forward of the model that embeds the tokens, got a call of the "
                "layer alone; recompute layers with model.gradient_checkpointing_enable()"
            )
        # what Dynamo compiles for one layer it runs for the others too, with the first one's entry
        grouping = None if compiling else tokens.layers[self]
        if grouping is not None:
            return self.dropout(self.experts(hidden_states, grouping))
        mask = tokens.token_mask
        if mask is not None:
            mask = mask[:, -hidden_states.shape[1] :]
        y, balance_loss = super().forward(hidden_states, tokens.token_ids, mask)
        if balance_loss is not None and losses is not None:
            losses.append(balance_loss)
        return self.dropout(y)


def make_feed_forward(config: Any) -> MPOEFeedForward:
    """A layer as the configuration describes it, with new weights."""
    size = ffn_size(config)
    options: dict[str, Any] = {
        "activation": size.activation,
        "bias": config.expert_bias if size.has_bias else "none",
        "hidden_dropout": size.hidden_dropout,
    }
    experts: DenseExperts | MPOExperts
    if config.experts == "dense":
        experts = DenseExperts(size.hidden_size, size.expert_size, config.num_experts, **options)
    else:
        experts = MPOExperts(
            size.hidden_size, size.expert_size, config.num_experts,
            w1_factors=config.w1_factors, w2_factors=config.w2_factors, max_bond=config.max_bond, **options,
        )  # fmt: skip
    experts.reset_parameters(size.w1_std, size.w2_std)
    return MPOEFeedForward(_make_router(config, size.hidden_size), experts, size.output_dropout)


def _make_router(config: Any, hidden_size: int) -> Router:
    options, E = config.router_options, config.num_experts
    if config.router in HASH_ROUTERS:
        table = torch.arange(config.vocab_size) % E  # balanced for equally frequent tokens
        if config.router == "hash-random":
            table = torch.randint(0, E, (config.vocab_size,))
        return HashRouter(table, E)
    classes: dict[str, Any] = {"switch": SwitchRouter, "top2": Top2Router, "gate-token": GateRouter}
    try:
        return classes[config.router](hidden_size, E, route_padding=config.route_padding, **options)
    except TypeError as error:
        raise UserError(
            f"router_options: expected options of router {config.router!r}, got {options} ({error})"
        ) from None


class Slot(NamedTuple):
    """A feed-forward of a model: `owner.attribute`, and where its keys in a state_dict begin."""

    name: str
    owner: Any
    attribute: str

    @property
    def module(self) -> Any:
        return getattr(self.owner, self.attribute)


def slots(model: Any) -> Iterator[Slot]:
    """All feed-forwards, dense or MPOE, in the order of the layers."""
    for name, module in model.named_modules():
        for attribute in ("DenseReluDense", "mlp", "intermediate"):
            if isinstance(getattr(module, attribute, None), nn.Module):
                yield Slot(f"{name}.{attribute}", module, attribute)


def install(model: Any, config: Any) -> None:
    """Put new experts in the place of every dense feed-forward, and let forwards of the stacks know their tokens."""
    for slot in list(slots(model)):
        if not isinstance(slot.module, MPOEFeedForward):
            setattr(slot.owner, slot.attribute, make_feed_forward(config))
            if slot.attribute == "intermediate":
                slot.owner.output.dense = nn.Identity()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and not isinstance(module, RecomputedLayer):
            module.__class__ = recomputed_class(type(module))  # type: ignore[arg-type]
        elif _embeds_tokens(module) and not hasattr(type(module), "routes_tokens"):
            module.__class__ = routed_class(type(module))  # type: ignore[arg-type]


def _embeds_tokens(module: nn.Module) -> bool:
    """Whether this is what holds both the layers and the token embeddings: T5's stacks, the GPT-2 and BERT models."""
    names = set(module._modules)
    return any(pair <= names for pair in ({"block", "embed_tokens"}, {"h", "wte"}, {"encoder", "embeddings"}))


@functools.cache
def routed_class(base: Any) -> Any:
    """The class of a stack whose forward tells its layers the tokens, and whose tables follow its vocabulary."""

    def resize_token_embeddings(self: Any, *args: Any, **kwargs: Any) -> nn.Embedding:
        embeddings = base.resize_token_embeddings(self, *args, **kwargs)
        resize_tables(self, embeddings.num_embeddings)
        return embeddings

    members = {
        "forward": routed(base.forward, _tokens_of),
        "routes_tokens": True,
        "resize_token_embeddings": resize_token_embeddings,
    }
    return derived_class(routed_class, base, (base,), members)


def _tokens_of(stack: Any, inputs: dict[str, Any]) -> Tokens:
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    return tokens_of(stack, ids, mask if isinstance(mask, Tensor) and mask.ndim == 2 else None)


def tokens_of(stack: Any, token_ids: Tensor | None, token_mask: Tensor | None) -> Tokens:
    """What the layers of a stack are told of token ids (B, T) and a mask (B, T or more).

    Raises:
        UserError: no token ids under hash routing.
    """
    layers = _feed_forwards(stack)
    routers: list[Any] = [layer.router for layer in layers]
    groupings: list[Any] = [None] * len(layers)
    if any(isinstance(router, HashRouter) for router in routers):
        if token_ids is None:
            raise UserError(
                f"input_ids: expected token ids, which router={stack.config.router!r} routes by, "
                "got inputs_embeds alone"
            )
        if stack.config.route_padding:
            token_mask = None
        mask = None if token_mask is None else token_mask[:, -token_ids.shape[-1] :]
        if not torch.compiler.is_compiling():
            groupings = group_by_hash(routers, token_ids, mask) or groupings
    return Tokens(dict(zip(layers, groupings, strict=True)), token_ids, token_mask)


def _feed_forwards(stack: Any) -> list[MPOEFeedForward]:
    """Those of a stack; walking all its modules would take longer than a small layer."""
    if "h" in stack._modules:
        return [block.mlp for block in stack.h]
    if "block" in stack._modules:
        return [block.layer[-1].DenseReluDense for block in stack.block]
    return [layer.intermediate for layer in stack.encoder.layer]
