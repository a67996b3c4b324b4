"""A tokenizer of a few words, for tests that need one."""

from transformers import BertTokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def tokenizer_of(words) -> BertTokenizer:
    """BERT's tokenizer with these whole words as its vocabulary."""
    return BertTokenizer(vocab={word: number for number, word in enumerate([*SPECIAL, *words])})
