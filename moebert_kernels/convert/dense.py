"""Dense models of the same class as a given one: merged experts, and students with fewer neurons."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from moebert_kernels.activation import is_gated
from moebert_kernels.convert.chosen_site import SiteChoice
from moebert_kernels.convert.importance_file import check_scores
from moebert_kernels.convert.in_turn import correct_in_turn
from moebert_kernels.convert.sites import DenseWeights, Site, common_width, find_sites
from moebert_kernels.convert.split import default_split, expert_indices
from moebert_kernels.errors import UserError
from moebert_kernels.layers.config import MoEConfig, moe_config
from moebert_kernels.layers.feed_forward import MoEFeedForward, NormedExperts
from moebert_kernels.layers.tasks import rows_of
from moebert_kernels.nn.context import plain_class

# what configurations call the number of a feed-forward's neurons
_WIDTHS = ("intermediate_size", "hidden_dim", "d_ff", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim")


def dense_student(
    model: nn.Module, importance: Tensor | None = None, width: int | None = None, seed: int = 0,
    chosen: Sequence[SiteChoice] | None = None, batches: Iterable[Mapping[str, Any]] | None = None,
    progress: bool = False,
) -> Any:  # fmt: skip
    """Return a dense model of the same class whose feed-forwards keep their `width` most important neurons.

    With an expert's width it is the dense model of the same FLOPs, to compare a mixture with.

    Args:
        model: any dense model that `find_sites` knows; not changed.
        importance: (L, D) scores. None: a random ranking by `seed`, with a warning.
        width: neurons kept, 1 to D. None: a quarter of them, as many as an expert of MoEBERT's preset has.
        chosen: of `choose_experts`: take its dense feed-forwards, whose second weights are corrected for the neurons
            that were cut, instead of a ranking.

    Raises:
        UserError: as `find_sites`; a width or scores that do not fit; a class that cannot be built with another width.
    """
    sites = find_sites(model)
    D = common_width(sites)
    if chosen is not None:
        student = _corrected_student(model, sites, chosen)
        if batches is not None:
            correct_in_turn(student, model, batches, progress=progress)
        return student
    if batches is not None:
        raise UserError("batches: expected none without `chosen`, whose feed-forwards they correct, got some")
    width = default_split(D)[0] if width is None else width
    if not 1 <= width <= D:
        raise UserError(f"width: expected 1 to the dense layer's {D} neurons, got {width}")
    kept = expert_indices(ranking(model, importance, seed), 1, width, width)[:, 0]
    student = _dense_like(model, width, model.state_dict())
    for site, target, neurons in zip(sites, find_sites(student), kept, strict=True):
        w1, b1, w2, b2 = site.weights()
        neurons = neurons.to(w1.device)
        rows = neurons if len(w1) == D else torch.cat([neurons, neurons + D])
        target.put(DenseWeights(w1[rows], None if b1 is None else b1[rows], w2[:, neurons], b2))
    return student


def _corrected_student(model: nn.Module, sites: list[Site], chosen: Sequence[SiteChoice]) -> Any:
    if len(chosen) != len(sites) or any(len(made.strength) != common_width(sites) for made in chosen):
        raise UserError(f"chosen: expected {len(sites)} choices for this model, got another model's")
    student = _dense_like(model, len(chosen[0].dense.kept), model.state_dict())
    for site, target, made in zip(sites, find_sites(student), chosen, strict=True):
        w1, b1, w2, b2 = site.weights()
        kept, new, new_b2 = made.dense
        kept = kept.to(w1.device)
        rows = kept if len(w1) == w2.shape[1] else torch.cat([kept, kept + w2.shape[1]])
        b2 = None if new_b2 is None else new_b2.to(w2)
        target.put(DenseWeights(w1[rows], None if b1 is None else b1[rows], new.to(w2), b2))
    return student


def merge(model: nn.Module, task: str | None = None) -> Any:
    """Return the dense model that computes what a converted model computes, where there is one.

    A task's routing weights g are numbers, so its experts add up to one dense layer, for any activation by element:
    w1 = [w1_e], b1 = [b1_e], w2 = [g_e w2_e], b2 = sum_e g_e b2_e over the top_k chosen experts, of width top_k * I.
    With a norm per expert (top_k = 1) the probability goes into that norm: g LayerNorm(.) has weight g w and bias g b.
    A model with one expert becomes that expert, whatever its router.

    Args:
        model: a converted model with any head; not changed.
        task: under task routing one of the model's; of a model with a head for each task its head is kept.

    Returns:
        A model of the same class, on the same device, in the same dtype and mode. Its dropout is the class's own.

    Raises:
        UserError: a model that is not converted, one whose experts depend on tokens, a task that it lacks.
    """
    source: Any = model
    config = moe_config(getattr(model, "config", None))
    if config is None:
        raise UserError(f"model: expected one with experts, got a {type(model).__name__} without")
    if config.is_task_routed:
        if task is None:
            raise UserError(f"task: expected one of the model's tasks, {', '.join(config.tasks or ())}, got none")
        task_id = config.task_id(task)
    elif config.num_experts == 1 and task is None:
        task_id = 0
    elif task is not None:
        config.task_id(task)  # which says what is wrong
    else:
        raise UserError(
            f"model: expected experts that a task chooses, or one, got {config.num_experts} of router={config.router!r}"
        )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoEFeedForward)}
    merged = [_merged(layer, config, task_id) for layer in layers.values()]
    state = {
        key: tensor for key, tensor in model.state_dict().items() if not key.startswith(tuple(f"{n}." for n in layers))
    }
    labels: dict[str, Any] = {}
    if config.task_labels is not None:
        head = head_name(model)
        of_head = [key for key in (f"{head}.weight", f"{head}.bias") if key in state]
        state |= {key: state[key][rows_of(config, task_id)] for key in of_head}
        classes = list(config.task_labels[str(task)]) or ["LABEL_0"]  # transformers' name for a score
        labels = {"id2label": dict(enumerate(classes)), "label2id": {name: k for k, name in enumerate(classes)}}
    targets = None if config.target_modules is None else tuple(config.target_modules)
    dense = _dense_like(source, merged[0].w2.shape[1], state, targets, **labels)
    for site, layer, weights in zip(find_sites(dense, targets), layers.values(), merged, strict=True):
        site.put(weights)
        if site.norm is not None:
            site.norm.load_state_dict(_merged_norm(layer, config, task_id))
    return dense


def head_name(model: Any) -> str:
    """The dotted path of the linear layer that gives a classifier's logits.

    Raises:
        UserError: the model is not one for sequence classification.
    """
    base, rows = f"{model.base_model_prefix}.", model.config.num_labels
    linear: list[str] = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = [n for n in linear if not n.startswith(base) and model.get_submodule(n).out_features == rows]
    if not found or "ForSequenceClassification" not in type(model).__name__:
        raise UserError(f"model: expected one for sequence classification, got a {type(model).__name__}")
    return found[-1]


def ranking(model: nn.Module, importance: Tensor | None, seed: int) -> Tensor:
    """The scores (L, D) on the CPU, after checking that they are the model's; None: random ones, with a warning."""
    if importance is None:
        warnings.warn("no importance scores given: neurons are ranked at random (pass importance=)", stacklevel=3)
        sites = find_sites(model)
        return torch.rand(len(sites), common_width(sites), generator=torch.Generator().manual_seed(seed))
    check_scores(importance, model)
    return importance.detach().cpu()


def build_model(
    model_class: Any, config: Any, state: Mapping[str, Tensor], *, like: Any = None, new: tuple[str, ...] = (),
    seed: int = 0, **options: Any,
) -> Any:  # fmt: skip
    """Return a model with exactly these weights; torch's generators are left as they were.

    Args:
        like: a model whose device, dtype, mode and settings for generation it gets.
        new: prefixes of weights that may be missing in `state`; the model's own initialisation draws them by `seed`.
        options: arguments of the model's constructor.

    Raises:
        UserError: the weights are not those of this class.
    """
    # drawing weights that all are replaced would be most of a conversion's time
    with torch.random.fork_rng(devices=[]), nullcontext() if new else no_init_weights():
        torch.default_generator.manual_seed(seed)
        built = model_class(config, **options)
    built.tie_weights()
    drawn = {key: t for key, t in built.state_dict().items() if key.startswith(new) and key not in state} if new else {}
    if like is not None:
        _settle_like(built, like)
    try:
        built.load_state_dict({**drawn, **state})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"model: expected the weights of a {model_class.__name__}, got others: {reason}") from error
    return built


def _settle_like(model: Any, like: Any) -> None:
    """Give a model the device, mode, settings for generation and dtypes of another.

    The dtypes are those of what checkpoints hold: frequencies of positions, which they do not, stay float32.
    """
    kinds = {key: tensor.dtype for key, tensor in like.state_dict().items()}
    model.to(device=like.device).train(like.training)
    for key, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(kinds.get(key, like.dtype))
    if getattr(like, "generation_config", None) is not None:
        model.generation_config = copy.deepcopy(like.generation_config)


def constructor_options(model: Any) -> dict[str, Any]:
    """What the constructor of a model's class has to be given so that the new model has the same modules."""
    has_none = getattr(model, "pooler", model) is None
    known = "add_pooling_layer" in inspect.signature(plain_class(type(model)).__init__).parameters
    return {"add_pooling_layer": False} if has_none and known else {}


def _dense_like(
    model: Any, width: int, state: Mapping[str, Tensor], targets: tuple[str, ...] | None = None, **fields: Any
) -> Any:
    """A dense model of the class of `model`, whose feed-forwards have `width` neurons and uninitialised weights.

    Args:
        state: the weights to load; those of the feed-forwards are left out.
        targets: names of the feed-forwards; None: all. The weights of others are loaded.
        fields: fields of the configuration to change.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    known = {name: width for name in _WIDTHS if hasattr(config, name)}
    for name, value in (known | fields).items():
        setattr(config, name, value)
    model_class = plain_class(type(model))
    with torch.random.fork_rng(devices=[]), no_init_weights():
        dense = model_class(config, **constructor_options(model))
    dense.tie_weights()
    _settle_like(dense, model)
    sites = find_sites(dense, targets)
    if common_width(sites) != width:
        raise UserError(f"model: cannot build a {model_class.__name__} with feed-forwards of another width")
    parts = [part for site in sites for part in site.linear_modules]
    ours = {id(parameter) for part in parts for parameter in part.parameters()}
    own = {key for key, parameter in dense.named_parameters(remove_duplicate=False) if id(parameter) in ours}
    try:
        dense.load_state_dict({key: tensor for key, tensor in state.items() if key not in own}, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"model: expected the weights of a {model_class.__name__}, got others: {reason}") from error
    return dense


def _merged(layer: MoEFeedForward, config: MoEConfig, task_id: int) -> DenseWeights:
    """One dense layer; sums and products in float64, rounded once."""
    experts, (chosen, g) = layer.experts, _chosen(layer, config, task_id)
    dtype = experts.weights()[0].dtype
    if isinstance(experts, NormedExperts):
        g = torch.ones_like(g)
    w1, w2 = (weight.detach()[chosen] for weight in experts.weights())
    b1, b2 = (None if bias is None else bias.detach()[chosen] for bias in experts.biases())
    halves = 2 if is_gated(experts.activation) else 1

    def rows(stacked: Tensor) -> Tensor:  # (k, 2I, ...) -> (2 k I, ...): the gates of all experts come first
        return stacked.view(len(stacked), halves, -1, *stacked.shape[2:]).transpose(0, 1).flatten(0, 2)

    w2 = (w2.double() * g[:, None, None]).transpose(0, 1).flatten(1)  # (k, H, I) -> (H, k I)
    b2 = None if b2 is None else (b2.double() * g[:, None]).sum(0).to(dtype)
    return DenseWeights(rows(w1), None if b1 is None else rows(b1), w2.to(dtype), b2)


def _merged_norm(layer: MoEFeedForward, config: MoEConfig, task_id: int) -> dict[str, Tensor]:
    experts, (chosen, g) = layer.experts, _chosen(layer, config, task_id)
    if not isinstance(experts, NormedExperts):
        assert layer.norm is not None
        return layer.norm.state_dict()
    norms = {"weight": experts.norm_weight, "bias": experts.norm_bias}
    return {name: (norm.detach()[chosen[0]].double() * g[0]).to(norm.dtype) for name, norm in norms.items()}


def _chosen(layer: MoEFeedForward, config: MoEConfig, task_id: int) -> tuple[Tensor, Tensor]:
    """The experts of a task (k,), or the only one, and their routing weights (k,) float64."""
    router: Any = layer.router
    if config.is_task_routed:
        experts, probabilities = router.chosen()
        return experts[task_id], probabilities[task_id].double()
    device = layer.experts.weights()[0].device
    return torch.zeros(1, dtype=torch.long, device=device), torch.ones(1, dtype=torch.float64, device=device)
