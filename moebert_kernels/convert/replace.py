"""Convert a transformers model in place: its feed-forwards become mixtures of experts, its class stays its own."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moebert_kernels.convert.card import carded_class
from moebert_kernels.convert.chosen import MOST_TOKENS, choose_experts
from moebert_kernels.convert.chosen_site import SiteChoice
from moebert_kernels.convert.dense import head_name
from moebert_kernels.convert.in_turn import correct_in_turn, first_tokens
from moebert_kernels.convert.mpo_plan import check_caps, plan_factors
from moebert_kernels.convert.sites import DenseWeights, Site, find_sites
from moebert_kernels.convert.split import check_split, default_split
from moebert_kernels.convert.state import expert_state, router_states, split_of
from moebert_kernels.errors import UserError
from moebert_kernels.layers.config import CHOSEN_ROUTER, SPLITS, MoEConfig
from moebert_kernels.layers.feed_forward import MoEFeedForward, NormedExperts
from moebert_kernels.layers.routing import install_routing, stack_of
from moebert_kernels.layers.tasks import row_names
from moebert_kernels.nn import DenseExperts, GateRouter, HashRouter, MPOExperts, SwitchRouter, TaskRouter, Top2Router
from moebert_kernels.nn.context import drop_autocast, plain_class
from moebert_kernels.nn.mpo_weight import check_factors

_HEAD_STD = 0.02  # of a new classifier's rows, if the model's configuration has no initializer_range


def convert_to_moe(
    model: nn.Module, config: MoEConfig | None = None, *, importance: Tensor | None = None, seed: int = 0,
    token_counts: Tensor | None = None, tables: Any = None, num_sites: int = 5, force: bool = False, noise: float = 0.0,
    batches: Iterable[Mapping[str, Any]] | None = None, chosen: Sequence[SiteChoice] | None = None,
    progress: bool = False,
) -> Any:  # fmt: skip
    """Replace every feed-forward of a transformers model by a mixture of experts.

    The model keeps its class, its configuration's `model_type` and the names of all other weights. `save_pretrained`
    saves it, and `AutoModel*.from_pretrained` loads it where `moebert_kernels.convert` was imported. What is random (a
    missing importance, noise, tables, gates) depends on `seed` alone; torch's own generators are left as they were.
    With experts of the whole layer ("copy", "mpo") and the routers "switch", "top2" and hashes in their default form,
    the model computes what the dense one does, unless `max_bond` cuts bonds or `noise` makes the experts differ. Under
    task routing it does so as far as a task's experts hold the neurons: the first probabilities are about 1/E each, and
    the experts are scaled by the inverse.

    Args:
        model: any dense model of transformers that `find_sites` knows, bare or with a head; changed, and returned.
        config: what to make; None: `MoEConfig.moebert()`, or with text `MoEConfig.chosen()`. The model gets a copy with
            every choice made, as `model.config.quantization_config`.
        importance: with experts="split", (L, D) scores of the L feed-forwards' neurons; None: a random ranking, with a
            warning.
        seed: of all random choices in the conversion.
        token_counts: (V,) integers, for router="hash-balance"; see `count_tokens`.
        tables: (V,) or (L, V) integers in [0, E): hash tables to use as they are.
        num_sites: with experts="mpo" and no factors in the configuration, the tensors that each weight becomes, 2 to 6.
        force: with experts="mpo", take any `max_bond`. Bonds so low that building weights is slower than multiplying
            by one tensor after the other are refused otherwise, with the arithmetic.
        noise: with experts="copy" or "mpo", the standard deviation of normal noise on each expert's copy, or on its
            auxiliary tensors, relative to the root mean square of the values.
        batches: with router="hash-chosen" or experts="clustered", the unlabelled text to choose by, see
            `choose_experts`, and to correct "clustered" experts by, see `correct_in_turn`.
        chosen: what `choose_experts` gave for this model and configuration; `batches` then correct alone, and without
            them nothing does.
        progress: show bars while text chooses and corrects.

    Raises:
        UserError: a model without feed-forwards of a known shape, a model that is already converted, hash routing in a
            model without token ids, sizes that cannot be filled, or factors, bonds, noise, scores, tables or counts
            that do not fit.
    """
    if isinstance(noise, bool) or not isinstance(noise, (int, float)) or not 0 <= noise < math.inf:
        raise UserError(f"noise: expected a finite number of at least 0, got {noise!r}")
    sites = find_sites(model, None if config is None or config.target_modules is None else tuple(config.target_modules))
    for site in sites:
        site.check()
    if any("_hf_hook" in vars(module) for module in model.modules()):
        raise UserError(
            "model: expected one without accelerate's hooks, which call the forwards of before, got one that is spread"
            " over devices (load it without device_map)"
        )
    weights = [site.weights() for site in sites]
    has_text = batches is not None or chosen is not None
    config = config or (MoEConfig.chosen() if has_text else MoEConfig.moebert())
    config = resolved(config, model, sites, weights[0], num_sites)
    if noise and config.experts in SPLITS:
        raise UserError(f"noise: expected 0 with experts={config.experts!r}, got {noise!r}")
    if has_text != config.needs_text:
        wanted = "text to choose experts by" if config.needs_text else "none"
        raise UserError(
            f"batches: expected {wanted} with router={config.router!r} and experts={config.experts!r}, got "
            f"{'some' if has_text else 'none'}"
        )
    if chosen is not None and (importance is not None or tables is not None):
        raise UserError(
            f"chosen: expected it without {'importance' if tables is None else 'tables'}, which the choice replaces"
        )
    if config.experts == "mpo" and not force:
        for factors in (config.w1_factors, config.w2_factors):
            assert factors is not None  # `resolved` chose them
            check_caps(factors[0], factors[1], config.max_bond)
    generator = torch.Generator().manual_seed(seed)
    split: Sequence[Tensor | None] = [None] * len(sites)
    if config.experts == "split":
        split = split_of(config, sites, importance, generator)
    routers = []
    if config.router != CHOSEN_ROUTER:
        routers = router_states(model, config, sites, generator, token_counts, tables)
    elif tables is not None:
        raise UserError("tables: expected none with router='hash-chosen', got some")
    if config.needs_text:
        given = torch.stack([made["router.table"] for made in routers]) if routers else None
        neurons = [part for part in split if part is not None] or None
        if batches is not None and (chosen is not None or iter(batches) is batches):
            batches = first_tokens(model, batches, MOST_TOKENS)  # read now, while the model is what it was
        chosen = chosen or choose_experts(
            model, batches or (), config, indices=neurons, tables=given, seed=seed, progress=progress
        )
        vocabularies = [stack_of(model, site.name).get_input_embeddings().num_embeddings for site in sites]
        split = _checked(chosen, config, weights, vocabularies)
        routers = [{"router.table": made.table} for made in chosen]
    state = [
        expert_state(config, dense, site, indices, noise, generator)
        for site, dense, indices in zip(sites, weights, split, strict=True)
    ]
    for made, of_router in zip(state, routers, strict=True):
        made |= of_router
    if config.experts == "clustered":
        for made, choice, dense in zip(state, chosen or (), weights, strict=True):
            made |= choice.state(dense.w2.dtype)
    head = None if config.task_labels is None else head_name(model)
    corrects = batches is not None and config.experts == "clustered" and config.correction
    dense_model = _with_same_tensors(model) if corrects else None
    layers = replace_feed_forwards(model, config)
    for layer, made in zip(layers, state, strict=True):
        layer.load_state_dict(made, strict=True)
    if head is not None:
        _put_heads(model, head, config, generator)
    if dense_model is not None:
        correct_in_turn(model, dense_model, batches or (), progress=progress)
    return model


def _with_same_tensors(model: nn.Module) -> nn.Module:
    """A copy whose modules are its own and whose parameters and buffers are the model's."""
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    except TypeError as error:
        raise UserError(
            f"model: expected one that can be copied, to correct its layers in turn, got a {type(model).__name__}"
            f" ({error}); correction=False, or chosen= without batches, needs no copy"
        ) from None


def _checked(
    chosen: Sequence[SiteChoice], config: MoEConfig, weights: Sequence[DenseWeights], vocabularies: Sequence[int]
) -> list[Tensor]:
    """The neurons of the experts of each layer, after checking that the choice is for this model."""
    size, D = (config.num_experts, config.expert_size), weights[0].w2.shape[1]
    fits = len(chosen) == len(weights) and all(
        made.indices.shape == size and int(made.indices.max()) < D
        and made.table.shape == (V,) and made.dense.w2.shape[0] == dense.w2.shape[0]
        for made, dense, V in zip(chosen, weights, vocabularies, strict=True)
    )  # fmt: skip
    if not fits:
        raise UserError(
            f"chosen: expected {len(weights)} choices of {size[0]} experts of {size[1]}, got another model's"
        )
    return [made.indices for made in chosen]


def _put_heads(model: Any, name: str, config: MoEConfig, generator: torch.Generator) -> None:
    """Put a classifier with new rows for each task in the place of the model's."""
    rows, old = row_names(config), model.get_submodule(name)
    with torch.device("meta"):  # draws nothing
        new = nn.Linear(old.in_features, len(rows), bias=old.bias is not None, dtype=old.weight.dtype)
    new = new.to_empty(device=old.weight.device)
    with torch.no_grad():
        std = getattr(model.config.get_text_config(), "initializer_range", _HEAD_STD)
        new.weight.copy_(torch.randn(new.weight.shape, generator=generator) * std)
        if old.bias is not None:
            new.bias.zero_()
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, new)
    model.config.id2label = dict(enumerate(rows))
    model.config.label2id = {row: number for number, row in enumerate(rows)}
    model.num_labels = len(rows)


def replace_feed_forwards(model: Any, config: MoEConfig) -> list[MoEFeedForward]:
    """Replace the dense feed-forwards by layers with uninitialised weights, on their devices and in their dtypes.

    Args:
        model: as for `convert_to_moe`; on the meta device too.
        config: with every choice made; the model's configuration gets it.
    """
    drop_autocast(model)
    model.__class__ = plain_class(type(model))  # type(converted).from_pretrained makes instances of what was derived
    targets = None if config.target_modules is None else tuple(config.target_modules)
    sites = find_sites(model, targets)
    layers = []
    for site in sites:
        w1, _, w2, _ = site.weights()
        if w1.dtype != w2.dtype:
            cast = f"from {w2.dtype} to {w1.dtype}"
            warnings.warn(f"model: the second weight of {site.name} is cast {cast}", stacklevel=3)
        with torch.device("meta"):  # draws nothing
            layer = make_layer(model, config, site)
        layer.to(w1.dtype).to_empty(device=w1.device).train(site.module.training)
        for parameter in layer.parameters():
            parameter.requires_grad_(True)
        if config.norm == "layer":
            layer.norm = site.norm
        site.install(layer)
        layers.append(layer)
    set_config(model, config)
    install_routing(model, [site.name for site in sites])
    kind: Any = type(model)
    model.__class__ = carded_class(kind)
    return layers


def set_config(model: nn.Module, config: MoEConfig) -> None:
    """Store the mixture's configuration in the configurations of the model and of all models inside it."""
    for module in model.modules():
        if getattr(module, "config", None) is not None:
            module.config.quantization_config = config


def resolved(
    config: MoEConfig, model: nn.Module, sites: list[Site], dense: DenseWeights, num_sites: int = 5
) -> MoEConfig:
    """The configuration with every choice made for this model; `num_sites` as for `convert_to_moe`.

    Raises:
        UserError: a choice that the model does not allow; with the reason.
    """
    D, by_task = dense.w2.shape[1], config.is_task_routed
    post_norm = all(site.norm is not None for site in sites)
    changes: dict[str, Any] = {}
    if not config.is_learned:
        without = [site.name for site in sites if stack_of(model, site.name) is None]
        if without:
            needs = "routes in models with token ids" if by_task else "routes by token ids"
            raise UserError(
                f"router: {config.router} {needs}, and {without[0]} of {type(model).__name__} gets none; "
                "take 'gate-token', or name other feed-forwards by target_modules"
            )
    if config.norm == "expert" and (not post_norm or config.experts == "mpo" or config.router == "top2"):
        raise UserError(
            "norm: 'expert' needs experts of their own weights, one for a token, and a model whose feed-forwards end "
            "in a LayerNorm; take 'layer'"
        )
    if config.norm is None:
        one_split = config.experts in SPLITS and config.router not in ("top2", "task")
        changes["norm"] = "expert" if post_norm and one_split else "layer"
    if by_task and config.top_k is None:
        changes["top_k"] = 1 if config.norm == "expert" else min(2, config.num_experts)
    if config.experts == "clustered":
        changes["expert_size"] = size = default_split(D, config.expert_size)[0]
        check_split(D, 1, size, config.num_shared_neurons or 0)
    if config.experts == "split":
        given, shared = config.expert_size, config.num_shared_neurons
        if by_task:
            given, shared = given or max(D // config.num_experts, 1), shared or 0
        size, shared = default_split(D, given, shared)
        check_split(D, config.num_experts, size, shared)
        changes |= {"expert_size": size, "num_shared_neurons": shared}
    if config.experts == "mpo":
        for name, weight in (("w1_factors", dense.w1), ("w2_factors", dense.w2)):
            factors = getattr(config, name)
            if factors is None:
                plan = plan_factors(weight.shape[0], weight.shape[1], sites=num_sites)
                factors = (plan.row_factors, plan.col_factors)
            check_factors(name, factors, tuple(weight.shape))
            changes[name] = [list(part) for part in factors]
    return replace(copy.deepcopy(config), **changes)


def make_layer(model: Any, config: MoEConfig, site: Site) -> MoEFeedForward:
    """The layer of a site, with new weights and without the model's LayerNorm."""
    dense = site.weights()
    (H, D), E = dense.w2.shape, config.num_experts
    bias = (
        "none"
        if dense.b1 is None and dense.b2 is None
        else {"expert": "expert", "common": "shared"}[config.expert_bias]
    )
    options: dict[str, Any] = {"activation": site.activation, "bias": bias, "hidden_dropout": site.hidden_dropout}
    dropout = site.output_dropout if config.expert_dropout is None else config.expert_dropout
    experts: Any
    if config.experts == "mpo":
        options |= {"w1_factors": config.w1_factors, "w2_factors": config.w2_factors, "max_bond": config.max_bond}
        experts = MPOExperts(H, D, E, **options)
    elif config.norm == "expert":
        eps = getattr(site.norm, "eps", None) or site.norm.variance_epsilon
        experts = NormedExperts(H, config.expert_size or D, E, eps=eps, output_dropout=dropout, **options)
    else:
        experts = DenseExperts(H, config.expert_size or D, E, **options)
    return MoEFeedForward(make_router(model, config, site, H), experts, output_dropout=dropout)


def make_router(model: Any, config: MoEConfig, site: Site, hidden_size: int) -> nn.Module:
    """The router of a site; hash tables are zeros."""
    E, options = config.num_experts, dict(config.router_options)
    if config.is_hash_routed:
        vocab_size = stack_of(model, site.name).get_input_embeddings().num_embeddings
        return HashRouter(torch.zeros(vocab_size, dtype=torch.long), E)
    if config.is_task_routed:
        return TaskRouter(len(config.tasks or ()), E, config.experts_per_token, route_padding=config.route_padding)
    classes: dict[str, Any] = {"switch": SwitchRouter, "top2": Top2Router}
    if config.router.startswith("gate-"):
        classes[config.router], options["per"] = GateRouter, config.router.removeprefix("gate-")
    try:
        router: nn.Module = classes[config.router](hidden_size, E, route_padding=config.route_padding, **options)
        return router
    except TypeError as error:
        raise UserError(
            f"router_options: expected options of router {config.router!r}, got {options} ({error})"
        ) from None
