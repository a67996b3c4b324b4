"""Models that predict tokens, and their tokenizers, small enough to take a second."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from moebert_kernels.convert import convert_to_moe
from moebert_kernels.data.split import TokenizedSplit
from moebert_kernels.data.tasks import get_task
from moebert_kernels.layers import MoEConfig

STORY = "the old mill stood by the river and the river ran to the sea\nthe sea was cold \n\n and the mill was old\n"
WORDS = "mrpc rte stsb custom sentence1: sentence2: text: sentence: warm cold day night the a is was very"


def byte_tokenizer(text=STORY, vocab_size=280):
    """Byte-level BPE trained on `text`, with a token that starts and ends documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def tiny_gpt2(seed=0, vocab_size=280, positions=16, dropout=0.0, layers=2):
    """A random GPT-2; equal seeds give equal weights."""
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=positions, n_embd=16, n_layer=layers, n_head=2, resid_pdrop=dropout,
        embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    return GPT2LMHeadModel(config)


def word_tokenizer(words=WORDS):
    """Whole words and digits, with T5's special tokens: padding 0, end of sequence 1, unknown 2."""
    vocab = ["<pad>", "</s>", "<unk>", *(str(digit) for digit in range(10)), ".", *words.split()]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocab)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(".", "isolated"), pre_tokenizers.Digits(True)]
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def tiny_t5(seed=0, vocab_size=40, layers=1):
    """A random T5; equal seeds give equal weights."""
    config = T5Config(
        vocab_size=vocab_size, d_model=16, d_kv=8, d_ff=32, num_layers=layers, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(config)


def story(length=8, overlap=1, documents=(STORY,)):
    """Windows of STORY."""
    rows = Dataset.from_dict({"text": list(documents)})
    return TokenizedSplit(rows, get_task("lm"), byte_tokenizer(), max_length=length, doc_stride=overlap)


def tiny_mpoe(seed=0, dropout=0.0, load_balance=0.0, **options):
    """A random GPT-2's conversion, with experts that differ."""
    config = MoEConfig.mpoe(num_experts=3, load_balance=load_balance, **options)
    return convert_to_moe(tiny_gpt2(seed, dropout=dropout), config, num_sites=3, noise=0.1, seed=seed)
