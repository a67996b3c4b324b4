"""`prepare`: a model for inference on this machine's CPU, in int8, bfloat16 or float32."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moebert_kernels.convert.card import write_card
from moebert_kernels.cpu import aligned, warn_if_slow
from moebert_kernels.errors import UserError
from moebert_kernels.integrations.transformers import is_experts
from moebert_kernels.layers.feed_forward import MoEFeedForward
from moebert_kernels.nn.context import derived_class, drop_autocast
from moebert_kernels.nn.hash_router import HashRouter, join_tables
from moebert_kernels.serve.calibration import products_needing_token_scales
from moebert_kernels.serve.config import PreparedConfig
from moebert_kernels.serve.dtypes import DTYPES, input_dtype, is_int8
from moebert_kernels.serve.embedding import PackedEmbedding, embed_scale_of
from moebert_kernels.serve.experts import PackedExperts
from moebert_kernels.serve.modules import PackedLinear, PackedModule, products_of
from moebert_kernels.serve.packed import Choice, Weights, fastest
from moebert_kernels.serve.tiles import ENGINE as TILES
from moebert_kernels.serve.tiles import by_amx
from moebert_kernels.serve.tiles.attention import use_attention, uses_attention
from moebert_kernels.serve.transformers_experts import PackedTransformersExperts

FEWEST_OUTPUTS = 16  # a linear layer with fewer, as a classifier's, costs no time and its rounding costs accuracy
FEWEST_ROWS = 1024  # of a word embedding that becomes int8
_SAMPLES = 12  # layers of one shape that engines are compared on


def prepare(
    model: Any, dtype: str = "int8", *, tokens: int = 128, batches: Iterable[Mapping[str, Any]] | None = None
) -> Any:
    """Make a model one for inference on a CPU: its weights get the form in which this machine multiplies fastest.

    Linear layers and experts are packed for a library that torch has, the fastest one of a short measurement, or for
    the package's own kernel (`serve.tiles`) on CPUs with AVX-512. "int8": weights are symmetric with a scale for each
    output, activations are quantised in each call, by torch's libraries with one scale and by the kernel with one for
    each token, sums are in int32, everything else in float32, and embeddings of words have a scale for each row.
    "int8-token": a scale for each token everywhere, slower in torch's libraries, and much closer for models in which
    few tokens have very large values. Such a model may lose much of its score in "int8" by torch's libraries without
    `batches`, by which the layers that need it are found.
    "int8-bfloat16": a scale for each token, and everything else in bfloat16; the fastest on CPUs with AMX or
    AVX-512's bfloat16 instructions, but for few tokens, with which it is level with "int8".
    "bfloat16": the whole model, with residual and LayerNorm of each expert in float32. "float32": the numbers are the
    model's, up to rounding. Routers and classifiers with less than 16 outputs are computed as before, and so is
    attention but for encoders whose attention is transformers' "sdpa" or MPNet's: these get the package's own, where
    the CPU has AVX-512 with VNNI.

    Args:
        model: of transformers, dense or converted; changed, and returned in eval mode. To keep it, pass a copy.
        dtype: "int8", "int8-token", "int8-bfloat16", "bfloat16" or "float32".
        tokens: of a typical call, all of its sequences together: engines are compared at that number of rows, or at as
            many as an expert gets of it.
        batches: with "int8": mappings of tensors with `input_ids` and, where there is padding, `attention_mask`, as
            large as those that will be served; labels are not needed, and 2,048 tokens are read at most. Layers, and
            experts' products, whose outputs one scale for a call makes too inexact get a scale for each token (see
            `products_needing_token_scales`); the others stay as fast as they are. A copy of the model is in memory
            meanwhile.

    Raises:
        UserError: not a model of transformers on a CPU in floating point, or one that is prepared already; batches with
            another dtype, or that the model cannot read.
    """
    check(model, dtype, tokens)
    if batches is not None and dtype != "int8":
        raise UserError(f"batches: expected them with dtype 'int8' alone, which they calibrate, got {dtype!r}")
    warn_if_slow(dtype)
    moe = moe_of(model)
    drop_autocast(model)  # engines choose their dtypes
    scales = None if batches is None else _calibrated(model, batches)
    model.eval().requires_grad_(False)
    _replace(model, dtype)
    config = PreparedConfig(dtype=dtype, tokens=tokens, token_scales=scales, moe=None if moe is None else moe.to_dict())
    finish(model, config)
    return model


def _replace(model: Any, dtype: str) -> None:
    if not replace_modules(model, dtype):
        raise UserError(f"model: expected linear layers with at least {FEWEST_OUTPUTS} outputs, found none")
    cast(model, input_dtype(dtype))


def _calibrated(model: Any, batches: Iterable[Mapping[str, Any]]) -> list[str]:
    """The products that need token scales; a copy of the model is what runs, so that an error leaves it as it was."""
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    _replace(copied, "float32")
    for module in copied.modules():
        if isinstance(module, PackedModule):
            module.pack(lambda *_: "plain")
        if isinstance(module, PackedExperts):
            module.clears_padding = True  # as in int8
    return products_needing_token_scales(copied, batches)


def check(model: Any, dtype: str, tokens: int, *, any_device: bool = False) -> None:
    """Raise the errors of `prepare`."""
    if dtype not in DTYPES:
        raise UserError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise UserError(f"tokens: expected an integer of at least 1, got {tokens!r}")
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"model: expected a model of transformers, got {type(model).__name__}")
    if any(isinstance(module, PackedModule) for module in model.modules()):
        raise UserError("model: expected one that is not prepared, got one that is")
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" and not any_device:
            raise UserError(f"model: expected all weights on the CPU, got {name} on {parameter.device}")
        if not parameter.is_floating_point():
            raise UserError(f"model: expected weights in floating point, got {name} in {parameter.dtype}")


def moe_of(model: Any) -> Any:
    """The `MoEConfig` of a converted model, or None."""
    converted = any(isinstance(module, MoEFeedForward) for module in model.modules())
    return model.config.quantization_config if converted else None


def packable(
    model: Any, dtype: str, stored: Collection[str] = ()
) -> list[tuple[nn.Module, str, Any, type[PackedModule]]]:
    """What `prepare` replaces: the module around it, its name there, itself, and the class that takes its place.

    `stored` is as for `replace_modules`.
    """
    places = [(parent, name, child) for parent in _outside_routers(model) for name, child in parent.named_children()]
    # transformers' own Mixtures-of-Experts have routers of any kind beside their experts
    experts_beside = {id(parent): child.num_experts for parent, _, child in places if is_experts(child)}
    found: list[tuple[nn.Module, str, Any, type[PackedModule]]] = []
    words = _word_embeddings(model, stored)
    for parent, name, child in places:
        outputs: Any = child.nf if type(child).__name__ == "Conv1D" else getattr(child, "out_features", 0)
        if isinstance(parent, MoEFeedForward) and name == "experts":
            found.append((parent, name, child, PackedExperts))
        elif is_experts(child):
            found.append((parent, name, child, PackedTransformersExperts))
        elif type(child) is nn.Linear or type(child).__name__ == "Conv1D":
            if outputs >= FEWEST_OUTPUTS and outputs != experts_beside.get(id(parent)):
                found.append((parent, name, child, PackedLinear))
        elif id(child) in words and is_int8(dtype):
            found.append((parent, name, child, PackedEmbedding))
    return found


def replace_modules(model: Any, dtype: str, stored: Collection[str] = ()) -> int:
    """Put empty packed modules in the place of what can be packed; on the meta device too.

    Those whose weight a model ties to an embedding's have that embedding's.

    Args:
        stored: names of tensors of a checkpoint, which are not tied though the model ties them.

    Returns:
        How many of them are layers or experts, and no embeddings.
    """
    count, tied = 0, _tied(model, stored)
    for parent, name, child, kind in packable(model, dtype, stored):
        made: Any = kind.of(child, dtype)  # type: ignore[attr-defined]
        made.training = False
        setattr(parent, name, made)
        count += kind is not PackedEmbedding
    for target, source in tied:
        place, table = model.get_submodule(target), model.get_submodule(source)
        # an embedding with too few rows for int8 has its head's weight in floating point
        if isinstance(place, PackedModule) and isinstance(table, PackedEmbedding if is_int8(dtype) else nn.Embedding):
            place.tie(table)
    return count


def _tied(model: Any, stored: Collection[str]) -> list[tuple[str, str]]:
    """Names of the modules whose weight is another module's, each with that other one's."""
    found, weights = [], dict(model.named_parameters(remove_duplicate=False))
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        weight, table = weights.get(target), weights.get(source)
        if weight is None or table is None or not target.endswith(".weight") or target in stored:
            continue
        if weight is table or weight.is_meta:  # which transformers ties after loading
            found.append((target.removesuffix(".weight"), source.removesuffix(".weight")))
    return found


def _outside_routers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that are no routers of ours nor of transformers' own mixtures, and not inside of one."""
    routers = {id(layer.router) for layer in model.modules() if isinstance(layer, MoEFeedForward)}
    for parent in model.modules():
        beside = [*parent.children()]
        if any(map(is_experts, beside)):
            routers |= {id(child) for child in beside if re.search("router|gate|topk", type(child).__name__.lower())}
    inside = {id(m) for r in model.modules() if id(r) in routers for m in r.modules()}
    yield from (module for module in model.modules() if id(module) not in inside)


def _word_embeddings(model: Any, stored: Collection[str]) -> set[int]:
    """The ids of what models inside this one call word embeddings, where they are many, and of what is tied to these.

    Of other embeddings, as DeBERTa's of relative positions, attention may read the weight itself.
    """
    found = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            with suppress(NotImplementedError):
                embedding: Any = module.get_input_embeddings()
                if embed_scale_of(embedding) is not None and embedding.num_embeddings >= FEWEST_ROWS:
                    found.add(id(embedding))
    for names in _tied(model, stored):  # Marian calls the encoder's and the decoder's so, not the one that they share
        both = [model.get_submodule(name) for name in names]
        if not found.isdisjoint(map(id, both)):
            found |= {id(module) for module in both if embed_scale_of(module) is not None}
    return found


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what a checkpoint holds; frequencies of positions, which it does not, would lose theirs.

    What transformers loads in float32 in any case stays so: names that hold one of these patterns.
    """
    patterns = getattr(model, "_keep_in_fp32_modules_strict", None) or ("$^",)  # which nothing matches
    kept = re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns))
    for path, module in model.named_modules():
        if isinstance(module, PackedModule):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            parameter.data = parameter.data.to(torch.float32 if kept.search(f"{path}.{name}") else dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                setattr(module, name, buffer.to(torch.float32 if kept.search(f"{path}.{name}") else dtype))


def token_scales_in(model: Any, names: list[str] | None) -> list[str] | None:
    """Names of a checkpoint's products as the model has them, which may have a head that the checkpoint has not.

    Those of a head that the model has not are left out.
    """
    if names is None:
        return None
    modules = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, PackedModule))
    prefix, found = f"{model.base_model_prefix}.", []
    for name in names:
        same = [own for own in (name, name.removeprefix(prefix), prefix + name) if f"{own}.".startswith(modules)]
        found += same[:1] or [name] * (type(model).__name__ in (model.config.architectures or ()))
    return found


def untie(model: Any) -> None:
    """What transformers is to tie: nothing packed, since `replace_modules` has done it."""
    packed = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, PackedModule))
    tied = model.all_tied_weights_keys
    model.all_tied_weights_keys = {
        target: source
        for target, source in tied.items()
        if not target.startswith(packed) and not source.startswith(packed)
    }


def finish(model: Any, config: PreparedConfig) -> None:
    """Choose engines, pack all modules, and let the model know what it is."""
    aligned(model)  # before a head is packed in the engine "plain", which keeps an embedding's own weight
    for stack in model.modules():
        routers = [layer.router for layer in getattr(stack, "moe_layers", ())]
        if routers and isinstance(routers[0], HashRouter):
            join_tables(routers)
    choices = choose_engines(model, config)
    engines = {(choice.shape, experts): choice.engine for experts, choice in choices}
    scales = config.token_scales or []
    for prefix, module in model.named_modules():
        if isinstance(module, PackedModule):
            own = (name.removeprefix(prefix) for name in scales if f"{name}.".startswith(f"{prefix}."))
            module.token_scales = frozenset(name.removeprefix(".") for name in own)
            module.pack(lambda shape, experts: engines[shape, experts])
    if unknown := sorted(set(scales) - products_of(model).keys()):
        raise UserError(f"token_scales: expected names of this model's products, got {unknown[0]!r}")
    object.__setattr__(model, "prepared", config)
    object.__setattr__(model, "prepared_choices", choices)
    use_attention(model, config.dtype)
    kind: Any = type(model)
    model.__class__ = prepared_class(kind)


def choose_engines(model: nn.Module, config: PreparedConfig) -> list[tuple[bool, Choice]]:
    """The fastest engine of each shape of layers, and of each shape of experts."""
    samples: dict[tuple[tuple[int, int], bool], list[Weights]] = {}
    experts: dict[tuple[tuple[int, int], bool], float] = {}
    tiles: dict[tuple[tuple[int, int], bool], bool] = {}
    for module in model.modules():
        if isinstance(module, PackedModule):
            for shape, of_experts, weights in module.shapes():
                key = shape, of_experts
                found = samples.setdefault(key, [])
                found.extend(weights[: max(_SAMPLES - len(found), 0)])
                experts[key] = getattr(module, "num_experts", 1) / getattr(module, "top_k", 1)
                tiles[key] = tiles.get(key, True) and module.tiles()
    return [
        (key[1], _engine_of(config.dtype, key[0], weights, max(int(config.tokens / experts[key]), 1), tiles[key]))
        for key, weights in samples.items()
    ]


def _engine_of(dtype: str, shape: tuple[int, int], weights: list[Weights], rows: int, tiles: bool) -> Choice:
    # nothing was faster at any size (docs/experiments.md, 2026-11-30), so nothing is measured
    return Choice(TILES, shape, rows, {}) if tiles else fastest(dtype, weights, rows)


def describe(model: Any) -> str:
    """One line for each kind of linear layer of a prepared model: shape, engine, and what was measured.

    One more for attention, if it is this package's; of a calibrated model a last line names the products that have a
    scale for each token.
    """
    lines = []
    for of_experts, (engine, (N, K), rows, best_us) in model.prepared_choices:
        times = ", ".join(f"{name} {us:.0f} us" for name, us in best_us.items()) or "the only one"
        if engine == TILES and not best_us:
            times = f"this package's, by {'AMX' if by_amx(model.prepared.dtype) else 'AVX-512'}"
        kind = "experts" if of_experts else "linear "
        lines.append(f"{kind} {K:>5} -> {N:<5} {model.prepared.dtype}: {engine} ({rows} rows: {times})")
    if uses_attention(model):
        lines.append("attention: tiles (this package's)")
    scales = model.prepared.token_scales
    if scales is not None:
        names = f": {', '.join(_grouped(scales))}" if scales else ""
        lines.append(f"a scale for each token in {len(scales)} of {len(products_of(model))} products{names}")
    return "\n".join(lines)


def _grouped(names: Iterable[str]) -> list[str]:
    """Names of products, those of a layer's experts as one: experts.w1[0 3]."""
    groups: dict[str, list[str]] = {}
    for name in names:
        head, _, number = name.rpartition(".")
        groups.setdefault(head if number.isdecimal() else name, []).append(number)
    return [f"{head}[{' '.join(numbers)}]" if numbers[0].isdecimal() else head for head, numbers in groups.items()]


@functools.cache
def prepared_class(base: Any) -> type:
    """The class of a prepared model: it does not train or grow, and saves what it is, with a card."""

    @functools.wraps(base.train)
    def train(self: Any, mode: bool = True) -> Any:
        if mode:
            raise UserError("train: a prepared model is for inference; train the model that it was made of")
        return base.train(self, mode)

    @functools.wraps(base.resize_token_embeddings)
    def resize_token_embeddings(self: Any, *_: Any, **__: Any) -> Any:
        raise UserError("resize_token_embeddings: expected a model that is not prepared; resize it, then prepare it")

    @functools.wraps(base.save_pretrained)
    def save_pretrained(
        self: Any, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        with saved_config(self):
            base.save_pretrained(self, save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            write_card(self, save_directory)

    members = {"train": train, "resize_token_embeddings": resize_token_embeddings, "save_pretrained": save_pretrained}
    return derived_class(prepared_class, base, (base,), members)


class saved_config:
    """Inside, the model's configuration is that of its checkpoint."""

    def __init__(self, model: Any) -> None:
        self.config, self.prepared = model.config, model.prepared

    def __enter__(self) -> None:
        config = self.config
        self.before = vars(config).get("quantization_config")
        config.quantization_config = self.prepared

    def __exit__(self, *_: object) -> None:
        if self.before is None:
            del self.config.quantization_config
        else:
            self.config.quantization_config = self.before
