"""Tiny models of every family that converts, with random weights, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModel

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TEXT = _SIZES | {"vocab_size": 100, "max_position_embeddings": 64}
_CAUSAL = _TEXT | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_IMAGE = _SIZES | {"image_size": 16, "patch_size": 8}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
_BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 100,
    "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", _TEXT),
    "roberta": ("roberta", _TEXT),
    "xlm-roberta": ("xlm-roberta", _TEXT),
    "camembert": ("camembert", _TEXT),
    "electra": ("electra", _TEXT | {"embedding_size": 32}),
    "mpnet": ("mpnet", _TEXT),
    "deberta": ("deberta", _TEXT),
    "deberta-v2": ("deberta-v2", _TEXT),
    "ernie": ("ernie", _TEXT),
    "layoutlm": ("layoutlm", _TEXT),
    "big_bird": ("big_bird", _TEXT | {"attention_type": "original_full"}),
    "megatron-bert": ("megatron-bert", _TEXT),  # pre-norm, in BERT's modules
    "distilbert": (
        "distilbert",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 100, "max_position_embeddings": 64},
    ),
    "modernbert": ("modernbert", _TEXT | {name: 1 for name in ("pad_token_id", "cls_token_id", "bos_token_id")}),
    "vit": ("vit", _IMAGE),
    "dinov2": ("dinov2", _IMAGE | {"hidden_size": 24, "mlp_ratio": 2}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48, "vocab_size": 100}),
    "t5": ("t5", _T5),
    "t5-v1_1": ("t5", _T5 | {"feed_forward_proj": "gated-gelu"}),
    "mt5": ("mt5", _T5),
    "umt5": ("umt5", _T5),
    "longt5": ("longt5", _T5),
    "bart": ("bart", _BART),
    "opt": (
        "opt",
        {name: _TEXT[name] for name in _TEXT if name != "intermediate_size"}
        | {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1},
    ),
    "llama": ("llama", _CAUSAL),
    "mistral": ("mistral", _CAUSAL),
    "qwen2": ("qwen2", _CAUSAL),
    "qwen3": ("qwen3", _CAUSAL),
    "gemma2": ("gemma2", _CAUSAL),
    "gemma3_text": ("gemma3_text", _CAUSAL),
    "phi3": ("phi3", _CAUSAL),
    "gpt_neox": ("gpt_neox", _TEXT),
}
IMAGES = ("vit", "dinov2")
TWO_STACKS = ("t5", "t5-v1_1", "mt5", "umt5", "longt5", "bart")
ONE_OF_EACH_SHAPE = ("bert", "modernbert", "t5-v1_1", "opt", "gpt2", "vit")


def make(family: str, auto: Any = AutoModel, **changes: Any) -> Any:
    """A model with random weights, in eval mode; the same ones every time."""
    model_type, sizes = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **sizes | changes)
    if hasattr(config, "use_cache") and auto is AutoModel:
        config.use_cache = False
    return auto.from_config(config).eval()


def make_inputs(family: str, padded: bool = True, seed: int = 1) -> dict[str, torch.Tensor]:
    """Two samples, the second one shorter."""
    generator = torch.Generator().manual_seed(seed)
    if family in IMAGES:
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    inputs = {"input_ids": torch.randint(3, 99, (2, 10), generator=generator)}
    if padded:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][1, 7:] = 0
    if family in TWO_STACKS:
        inputs["decoder_input_ids"] = torch.randint(3, 99, (2, 6), generator=generator)
    return inputs


def valid(family: str, hidden: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The hidden states that are not padding's."""
    mask = inputs.get("attention_mask")
    return hidden if mask is None or family in TWO_STACKS else hidden[mask != 0]


def one_layer(family: str) -> dict[str, int]:
    """Changes for `make` that leave one layer of each stack."""
    names = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")
    return {name: 1 for name in names if name in FAMILIES[family][1]}
