"""The MoEBERT encoder: transformers' BERT with a router and experts in place of each feed-forward layer.

Under hash routing the experts follow from the token ids alone, so the groupings of all layers are built once, before
the first layer. Under task routing they follow from the task. A gate needs its layer's input and routes there.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.bert.modeling_bert import BertAttention, BertEmbeddings, BertLMPredictionHead, BertPooler
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings, RobertaLMHead

from moebert_kernels.errors import UserError
from moebert_kernels.grouping import Grouping
from moebert_kernels.models.checkpoint import SavedModel
from moebert_kernels.models.configuration import ACTIVATIONS, MoEBertConfig
from moebert_kernels.models.outputs import MoEBertModelOutput, by_sequence
from moebert_kernels.nn import GateRouter, HashRouter, MoEFeedForward, TaskRouter
from moebert_kernels.nn.context import RecomputedLayer
from moebert_kernels.nn.hash_router import group_by_hash, resize_tables
from moebert_kernels.nn.mpo_weight import MPOWeight
from moebert_kernels.nn.task_router import checked_task_ids


class MoEBertLayer(RecomputedLayer, GradientCheckpointingLayer):
    """Self-attention as in BERT, then a router and experts."""

    def __init__(self, config: MoEBertConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention = BertAttention(config, layer_idx=layer_idx)
        self.router = _make_router(config)
        dropout = config.hidden_dropout_prob if config.expert_dropout is None else config.expert_dropout
        self.experts = MoEFeedForward(
            config.hidden_size, config.expert_size, config.num_experts,
            activation=ACTIVATIONS[config.hidden_act], eps=config.layer_norm_eps, dropout=dropout,
            norm=config.norm or "expert", w1_factors=config.w1_factors, w2_factors=config.w2_factors,
            max_bond=config.max_bond,
        )  # fmt: skip

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, grouping: Grouping | None = None,
        routed_by: Tensor | None = None, token_mask: Tensor | None = None, **attention_options: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """Returns hidden states (B, T, H), attention probabilities and balance loss, each None if there is none.

        Args:
            hidden_states: (B, T, H).
            attention_mask: in the form the attention implementation takes.
            grouping: of all B * T tokens, where it is known before the first layer; else None.
            routed_by: what the router reads besides hidden states: token ids (B, T) or task ids (B,). A gate: None.
            token_mask: (B, T), 0 where a token is padding.
        """
        hidden_states, attention = self.attention(hidden_states, attention_mask, **attention_options)
        routing: Any = None
        router: Any = self.router
        weights = balance_loss = None
        if grouping is not None:
            routing = grouping
        elif isinstance(router, HashRouter):
            routing = router(routed_by, token_mask)
        elif isinstance(router, TaskRouter):
            routing, weights = router(routed_by, hidden_states, token_mask, check=False)
        else:
            routing, weights, balance_loss = router(hidden_states, token_mask)
        return self.experts(hidden_states, routing, weights), attention, balance_loss


class MoEBertEncoder(nn.Module):
    def __init__(self, config: MoEBertConfig) -> None:
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList([MoEBertLayer(config, i) for i in range(config.num_hidden_layers)])

    def group_tokens(self, token_ids: Tensor, token_mask: Tensor | None) -> list[Grouping] | list[None]:
        """The grouping of every layer, under hash routing; None where a layer has to route by itself."""
        routers: list[Any] = [layer.router for layer in self.layer]
        return group_by_hash(routers, token_ids, token_mask) or [None] * len(routers)


class MoEBertPreTrainedModel(SavedModel, PreTrainedModel):
    config: MoEBertConfig
    config_class = MoEBertConfig
    base_model_prefix = "moebert"
    _converter = "convert_to_moe"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoEBertLayer"]  # noqa: RUF012 - transformers reads and copies it
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MoEBertConfig, *args: Any, **kwargs: Any) -> None:
        config.check()
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **options: Any
    ) -> Any:
        """As in transformers; see `SavedModel.from_pretrained`."""
        if "preset" in options:
            # Saved configurations hold what their own preset said.
            options.setdefault("route_padding", options["preset"] == "paper")
        return super().from_pretrained(pretrained_model_name_or_path, *args, **options)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; the hash tables follow, and new tokens get random experts."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        resize_tables(self, embeddings.num_embeddings)
        return embeddings

    def set_task(self, name: str | None) -> None:
        """Use this task where a forward is given no `task_ids`. None: ask for them. Not saved.

        Raises:
            UserError: there is no such task, or the model does not route by task.
        """
        base: Any = self.base_model
        base.task_id = None if name is None else self.config.task_id(name)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MoEFeedForward):
            for weight in (module.w1, module.w2):
                std = self.config.initializer_range
                if isinstance(weight, MPOWeight):
                    for site in weight.sites:
                        init.normal_(site, std=weight.initial_std(std))
                else:
                    init.normal_(weight, std=std)
            for bias in (module.b1, module.b2, module.norm_bias):
                init.zeros_(bias)
            init.ones_(module.norm_weight)
        elif isinstance(module, HashRouter):
            init.copy_(module.table, _new_table(self.config))
        elif isinstance(module, TaskRouter):
            init.normal_(module.logits, std=self.config.initializer_range)
        elif isinstance(module, (BertLMPredictionHead, RobertaLMHead)):
            init.zeros_(module.bias)
        elif isinstance(module, (BertEmbeddings, RobertaEmbeddings)):
            init.copy_(module.position_ids, torch.arange(module.position_ids.shape[-1]).expand((1, -1)))
            init.zeros_(module.token_type_ids)


class MoEBertModel(MoEBertPreTrainedModel):
    """The encoder with embeddings and, unless `add_pooling_layer` is False, BERT's pooler."""

    def __init__(self, config: MoEBertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings: Any = RobertaEmbeddings(config) if config.style == "roberta" else BertEmbeddings(config)
        self.encoder = MoEBertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        # where a forward is given none; see `set_task`
        self.task_id: int | None = 0 if config.is_task_routed and len(config.tasks or ()) == 1 else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | int | None = None,
    ) -> MoEBertModelOutput | tuple[Any, ...]:
        """As transformers' BertModel.

        Args:
            input_ids: (B, T) int64. Hash routing needs them even if `inputs_embeds` is given.
            attention_mask: (B, T), 0 where a token is padding; such tokens pass the experts by, unless
                `config.route_padding`. A mask of more dimensions reaches the attention only.
            token_type_ids, position_ids: (B, T) int64.
            inputs_embeds: (B, T, H), used instead of the word embeddings.
            task_ids: (B,) integers, or one for all sequences; read under task routing alone. None: the task that
                `set_task` named, or the only one. A tensor on a GPU is read back once to be checked; an int is not.

        Raises:
            UserError: no input, no token ids under hash routing, or no task or one out of range under task routing.
        """
        config = self.config
        self._check_inputs(input_ids, inputs_embeds)
        if output_attentions is None:
            output_attentions = config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if return_dict is None:
            return_dict = config.return_dict

        hidden_states = self.embeddings(
            input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids, inputs_embeds=inputs_embeds
        )
        token_mask = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        attention_bias: Any = create_bidirectional_mask(
            config=config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        routed_by: Tensor | None = None
        groupings: list[Any] = [None] * len(self.encoder.layer)
        if config.is_hash_routed:
            token_mask = None if config.route_padding else token_mask
            routed_by, groupings = input_ids, self.encoder.group_tokens(input_ids, token_mask)
        elif config.is_task_routed:
            routed_by = self.checked_task_ids(task_ids, hidden_states)
        options = {"output_attentions": True} if output_attentions else {}

        all_hidden_states = [hidden_states]
        all_attentions = []
        balance_losses = []
        for layer, grouping in zip(self.encoder.layer, groupings, strict=True):
            hidden_states, attention, balance_loss = layer(
                hidden_states, attention_bias, grouping, routed_by, token_mask, **options
            )
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            if output_attentions and attention is not None:
                all_attentions.append(attention)
            if balance_loss is not None:
                balance_losses.append(balance_loss)

        output = MoEBertModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=None if self.pooler is None else self.pooler(hidden_states),
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
            balance_loss=by_sequence(balance_losses, hidden_states.shape[0]),
        )
        return output if return_dict else output.to_tuple()

    def checked_task_ids(self, task_ids: Tensor | int | None, like: Tensor) -> Tensor:
        """The task of every sequence, (B,) int64 on the device of `like` (B, ...); see `forward`.

        Raises:
            UserError: none is given and none is set, or one is out of range.
        """
        task_ids = self.task_id if task_ids is None else task_ids
        names = self.config.tasks or []
        if task_ids is None:
            raise UserError(f"task_ids: expected an id for each of {', '.join(names)}, or set_task before, got None")
        return checked_task_ids(task_ids, len(names), like.shape[0], like.device)

    def _check_inputs(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
        if input_ids is None:
            if inputs_embeds is None:
                raise UserError("input_ids: expected token ids or inputs_embeds, got neither")
            if self.config.is_hash_routed:
                raise UserError(
                    f"input_ids: expected token ids, which router={self.config.router!r} routes by, "
                    "got inputs_embeds alone"
                )
        elif inputs_embeds is not None and input_ids.shape != inputs_embeds.shape[:-1]:
            raise UserError(
                f"input_ids: expected the shape of inputs_embeds, {tuple(inputs_embeds.shape[:-1])}, "
                f"got {tuple(input_ids.shape)}"
            )


def _make_router(config: MoEBertConfig) -> HashRouter | GateRouter | TaskRouter:
    if config.is_hash_routed:
        # Filled by `_init_weights` in a new model, by the checkpoint in a loaded one.
        return HashRouter(torch.zeros(config.vocab_size, dtype=torch.int64), config.num_experts)
    if config.is_task_routed:
        num_tasks, top_k = len(config.tasks or ()), config.top_k or 1
        return TaskRouter(num_tasks, config.num_experts, top_k, route_padding=bool(config.route_padding))
    return GateRouter(
        config.hidden_size, config.num_experts, "token" if config.router == "gate-token" else "sentence",
        original_batch1=config.original_batch1, route_padding=config.route_padding,
    )  # fmt: skip


def _new_table(config: MoEBertConfig) -> Tensor:
    """A layer's table before anything is known of the data: random, or balanced for equally frequent tokens."""
    if config.router == "hash-balance":
        return torch.arange(config.vocab_size) % config.num_experts
    return torch.randint(0, config.num_experts, (config.vocab_size,))
