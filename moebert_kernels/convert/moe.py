"""A dense BERT or RoBERTa-style model -> a MoEBERT with the same head, weights and labels."""

import copy
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from moebert_kernels import models
from moebert_kernels.convert.encoders import dense_ffns, encoder_style
from moebert_kernels.convert.importance_file import check_scores
from moebert_kernels.convert.split import check_split, default_split, expert_indices
from moebert_kernels.convert.tables import balanced_hash_table, random_hash_table, stacked_tables
from moebert_kernels.errors import UserError
from moebert_kernels.models.configuration import TASK_ROUTER

_HEADS = ("Model", "ForSequenceClassification", "ForQuestionAnswering", "ForMaskedLM", "ForTokenClassification")
# a dense encoder's own: the converted model says these itself, or has no use for them
_NOT_CARRIED = ("model_type", "architectures", "transformers_version", "use_cache")


def convert_to_moe(
    model: nn.Module,
    importance: Tensor | None = None,
    num_experts: int = 4,
    expert_size: int | None = None,
    shared: int | None = None,
    router: str = "hash-random",
    seed: int = 0,
    *,
    token_counts: Tensor | None = None,
    tables: Any = None,
    **config_options: Any,
) -> Any:
    """Split every feed-forward layer of a dense model into experts and return the MoE model; `model` is not changed.

    w1 rows, b1 entries and w2 columns of each expert's neurons are copied, b2 and LayerNorm whole to every expert. What
    is random (a missing importance, hash-random tables, gates) depends on `seed` alone, and torch's own generators are
    left as they were.

    Args:
        model: a transformers model of the families bert, roberta, xlm-roberta or camembert: the bare encoder, or with
            a head for sequence or token classification, question answering or masked words.
        importance: (L, D) scores from `importance_scores`. None: a random ranking, with a warning.
        num_experts, expert_size, shared: the split; see `expert_indices`, and `default_split` for None.
        router: "hash-random", "hash-balance", "gate-token" or "gate-sentence".
        seed: of everything random here.
        token_counts: (V,) integers, for "hash-balance"; see `count_tokens`.
        tables: (V,) or (L, V) integers in [0, E): hash tables to use as they are.
        config_options: further fields of MoEBertConfig (`preset`, `load_balance`, `expert_dropout`, ...).

    Returns:
        The MoEBert model with the same head, on the same device, in the same dtype and mode.

    Raises:
        UserError: a model that is a MoE already or of another family or head, scores of another shape, a split that
            cannot be filled, tables that do not fit, or no tables and counts where they are needed.
    """
    ffns = dense_ffns(model)
    style, source = encoder_style(model), cast(Any, model)
    if router == TASK_ROUTER:
        raise UserError("router: expected one by tokens or gates, got 'task', which convert_to_task_moe makes")
    D = ffns[0].first.out_features
    expert_size, shared = default_split(D, expert_size, shared)
    check_split(D, num_experts, expert_size, shared)
    indices = expert_indices(ranking(model, importance, seed), num_experts, expert_size, shared)

    config = moe_config(
        source.config.to_dict(), attn_implementation=source.config._attn_implementation, style=style, router=router,
        num_experts=num_experts, expert_size=expert_size, shared=shared, **config_options,
    )  # fmt: skip
    moe_class, prefix, state = moe_state(model)
    for layer in range(len(ffns)):
        base = f"{prefix}encoder.layer.{layer}."
        w1, b1, w2, b2, norm_weight, norm_bias = pop_ffn(state, base)
        experts = expert_weights(w1, b1, w2, b2, norm_weight, norm_bias, indices[layer])
        state |= {f"{base}experts.{name}": tensor for name, tensor in experts.items()}
    state |= router_state(config, prefix, tables=tables, token_counts=token_counts, seed=seed)
    options: dict[str, Any] = {} if prefix or source.pooler is not None else {"add_pooling_layer": False}
    return build_model(moe_class, config, state, like=source, **options)


def dense_student(model: nn.Module, importance: Tensor | None, width: int | None = None, seed: int = 0) -> Any:
    """Return a dense model of the same class whose feed-forward layers keep their `width` most important neurons.

    Args:
        model: as for `convert_to_moe`; not changed.
        importance: (L, D) scores. None: a random ranking by `seed`, with a warning.
        width: neurons kept, 1 to D. None: a quarter of them, as many as an expert of `convert_to_moe` has.

    Raises:
        UserError: as `convert_to_moe`.
    """
    ffns = dense_ffns(model)
    source: Any = model
    D = ffns[0].first.out_features
    width = default_split(D)[0] if width is None else width
    if not 1 <= width <= D:
        raise UserError(f"width: expected 1 to the dense layer's {D} neurons, got {width}")
    kept = expert_indices(ranking(model, importance, seed), 1, width, width)[:, 0]
    config = type(source.config)(
        **{k: v for k, v in source.config.to_dict().items() if k not in ("model_type", "transformers_version")}
        | {"intermediate_size": width, "attn_implementation": source.config._attn_implementation}
    )
    state = dict(source.state_dict())
    prefix = "" if source.base_model is source else f"{source.base_model_prefix}."
    for layer, ffn in enumerate(ffns):
        idx = kept[layer].to(ffn.first.weight.device)
        base = f"{prefix}encoder.layer.{layer}."
        for name, dim in (("intermediate.dense.weight", 0), ("intermediate.dense.bias", 0), ("output.dense.weight", 1)):
            state[base + name] = state[base + name].index_select(dim, idx)
    options: dict[str, Any] = {} if prefix or source.pooler is not None else {"add_pooling_layer": False}
    return build_model(type(source), config, state, like=source, **options)


def expert_weights(
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, norm_weight: Tensor, norm_bias: Tensor, indices: Tensor
) -> dict[str, Tensor]:
    """Gather a dense layer's weights into experts: MoEBERT (2204.07675), section 3.1.

    Args:
        w1, b1, w2, b2: (D, H), (D,), (H, D), (H,): the dense layer in nn.Linear layout.
        norm_weight, norm_bias: (H,): its LayerNorm.
        indices: (E, F) from `expert_indices`.

    Returns:
        w1 (E, F, H), b1 (E, F), w2 (E, H, F), b2, norm_weight and norm_bias (E, H).
    """
    (E, F), flat = indices.shape, indices.flatten().to(w1.device)  # index_select is six times as fast as w2[:, indices]
    whole = {"b2": b2, "norm_weight": norm_weight, "norm_bias": norm_bias}
    return {
        "w1": w1.index_select(0, flat).unflatten(0, (E, F)),
        "b1": b1.index_select(0, flat).unflatten(0, (E, F)),
        "w2": w2.index_select(1, flat).unflatten(1, (E, F)).transpose(0, 1),  # (H, E, F) -> (E, H, F)
        **{name: tensor.expand(E, -1) for name, tensor in whole.items()},
    }


def moe_config(dense: dict[str, Any], **options: Any) -> models.MoEBertConfig:
    """Return the configuration of a MoE model with the fields of a dense one and `options` over them."""
    known = set(models.MoEBertConfig().to_dict()) | {"attn_implementation", "num_labels"}
    if unknown := sorted(set(options) - known):
        raise UserError(f"{unknown[0]}: expected an option of convert_to_moe or a field of MoEBertConfig, got neither")
    return models.MoEBertConfig(**{k: v for k, v in dense.items() if k not in _NOT_CARRIED} | options)


def router_state(
    config: models.MoEBertConfig, prefix: str, *, tables: Any, token_counts: Tensor | None, seed: int
) -> dict[str, Tensor]:
    """Return every layer's table or gate, by key."""
    L, V, E = config.num_hidden_layers, config.vocab_size, config.num_experts
    keys = [f"{prefix}encoder.layer.{layer}.router." for layer in range(L)]
    generator = torch.Generator().manual_seed(seed)
    if not config.is_hash_routed:
        if tables is not None:
            raise UserError(f"tables: expected none with router={config.router!r}, got some")
        std = config.initializer_range
        return {k + "gate.weight": torch.randn(E, config.hidden_size, generator=generator) * std for k in keys}
    if tables is None and config.router == "hash-random":
        tables = torch.stack([random_hash_table(V, E, generator) for _ in range(L)])
    elif tables is None:
        if token_counts is None:
            raise UserError("token_counts: expected counts (or tables) with router='hash-balance', got none")
        if token_counts.shape != (V,):
            raise UserError(f"token_counts: expected shape (V={V},), got {tuple(token_counts.shape)}")
        tables = balanced_hash_table(token_counts, E, seed=seed)
    return {k + "table": table for k, table in zip(keys, stacked_tables(tables, L, V, E), strict=True)}


def build_model(
    model_class: Any, config: Any, state: Mapping[str, Tensor], *, like: Any = None, new: tuple[str, ...] = (),
    seed: int = 0, **options: Any,
) -> Any:  # fmt: skip
    """Return a model with exactly these weights; torch's generators are left as they were.

    Args:
        like: a model whose device, dtype, mode and settings for generation it gets.
        new: prefixes of weights that may be missing in `state`; the model's own initialisation draws them by `seed`.
        options: of the model's constructor.

    Raises:
        UserError: other weights than the model has.
    """
    # drawing weights that all are replaced would be most of a conversion's time
    with torch.random.fork_rng(devices=[]), nullcontext() if new else no_init_weights():
        torch.default_generator.manual_seed(seed)
        built = model_class(config, **options)
    built.tie_weights()
    drawn = {key: t for key, t in built.state_dict().items() if key.startswith(new) and key not in state} if new else {}
    if like is not None:
        built = built.to(device=like.device, dtype=like.dtype).train(like.training)
        if getattr(like, "generation_config", None) is not None:
            built.generation_config = copy.deepcopy(like.generation_config)
    try:
        built.load_state_dict({**drawn, **state})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"model: expected the weights of a {model_class.__name__}, got others: {reason}") from error
    return built


def ranking(model: nn.Module, importance: Tensor | None, seed: int) -> Tensor:
    """The scores (L, D) on the CPU, after checking that they are the model's; None: random ones, with a warning."""
    if importance is None:
        warnings.warn("no importance scores given: neurons are ranked at random", stacklevel=3)
        ffns = dense_ffns(model)
        shape = (len(ffns), ffns[0].first.out_features)
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    check_scores(importance, model)
    return importance.detach().cpu()


def _moe_class(model: nn.Module) -> Any:
    name = type(model).__name__
    for head in _HEADS:
        if name.endswith(head):
            return getattr(models, f"MoEBert{head}")
    raise UserError(f"model: expected the bare model or one of {', '.join(_HEADS[1:])}, got {name}")


def moe_state(model: nn.Module) -> tuple[Any, str, dict[str, Tensor]]:
    """The MoEBERT class with the head of a dense model, its encoder's prefix, and the dense weights under its names."""
    source: Any = model
    moe_class = _moe_class(model)
    if moe_class is models.MoEBertModel:
        return moe_class, "", dict(source.state_dict())
    renamed = {renamed_key(key, source.base_model_prefix, "moebert"): t for key, t in source.state_dict().items()}
    return moe_class, "moebert.", renamed


def renamed_key(key: str, prefix: str, other: str) -> str:
    """A weight's name in a model whose encoder has another name."""
    return f"{other}.{key.removeprefix(prefix + '.')}" if key.startswith(prefix + ".") else key


def ffn_names(layer: str) -> list[str]:
    """Names of a dense layer's w1, b1, w2, b2, norm's weight and bias; `layer` is their common prefix."""
    modules = (f"{layer}intermediate.dense", f"{layer}output.dense", f"{layer}output.LayerNorm")
    return [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]


def pop_ffn(state: dict[str, Tensor], layer: str) -> Any:
    """Take the six weights that `ffn_names` names out of `state`."""
    return tuple(state.pop(name) for name in ffn_names(layer))
