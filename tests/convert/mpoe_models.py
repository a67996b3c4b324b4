"""Tiny random dense models of every family that MPOE converts, inputs for them, and where their outputs count."""

import torch
import transformers as tf
from torch import Tensor

V = 60
_T5 = dict(
    vocab_size=V, d_model=16, d_ff=24, d_kv=4, num_heads=4, num_layers=2, num_decoder_layers=1, decoder_start_token_id=0
)
_BERT = dict(
    vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=72, initializer_range=0.2, pad_token_id=0,
)  # fmt: skip
_GPT2 = dict(
    vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=72, initializer_range=0.2,
    bos_token_id=1, eos_token_id=1, pad_token_id=0,
)  # fmt: skip

MODELS = {
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**_T5)),
    "t5-gelu": lambda: tf.T5ForConditionalGeneration(tf.T5Config(feed_forward_proj="gated-gelu", **_T5)),
    "t5-encoder": lambda: tf.T5EncoderModel(tf.T5Config(**_T5)),
    "t5-tokens": lambda: tf.T5ForTokenClassification(tf.T5Config(num_labels=3, **_T5)),
    "mt5": lambda: tf.MT5ForConditionalGeneration(tf.MT5Config(**_T5)),
    "umt5": lambda: tf.UMT5ForConditionalGeneration(tf.UMT5Config(**_T5)),
    "longt5": lambda: tf.LongT5ForConditionalGeneration(tf.LongT5Config(feed_forward_proj="gated-silu", **_T5)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT2)),
    "gpt2-bare": lambda: tf.GPT2Model(tf.GPT2Config(**_GPT2)),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**_BERT)),
    "bert-bare": lambda: tf.BertModel(tf.BertConfig(**_BERT), add_pooling_layer=False),
    "roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(num_labels=3, **_BERT)),
    "xlm-roberta": lambda: tf.XLMRobertaForTokenClassification(tf.XLMRobertaConfig(num_labels=3, **_BERT)),
    "camembert": lambda: tf.CamembertForQuestionAnswering(tf.CamembertConfig(**_BERT)),
}


def dense(name: str):
    """In eval mode; biases and norms too are away from their initial values."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def inputs(name: str, padded: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, V, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if is_seq2seq(name):
        batch["decoder_input_ids"] = torch.randint(2, V, (3, 4), generator=generator)
    return batch


def is_seq2seq(name: str) -> bool:
    return "t5" in name and name not in ("t5-encoder", "t5-tokens")


def outputs(model, name: str, batch: dict[str, Tensor]) -> Tensor:
    """The first output, without what stands at padded positions."""
    with torch.no_grad():
        y = model(**batch)[0]
    if is_seq2seq(name) or name == "roberta":
        return y
    return y[batch["attention_mask"] != 0]
