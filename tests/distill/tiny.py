"""Models and batches small enough to take a second."""

import torch
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification

VOCAB = 60


class TinyBatches:
    """Sentences of 2 to 9 random tokens; the label depends on them. Batches depend on seed and epoch alone."""

    def __init__(self, examples=22, batch_size=4, seed=0, kind="classification", shuffle=True, sizes=None):
        generator = torch.Generator().manual_seed(seed)
        self.lengths = torch.randint(2, 10, (examples,), generator=generator)
        self.tokens = torch.randint(1, VOCAB, (examples, 9), generator=generator)
        self.kind, self.seed, self.shuffle = kind, seed, shuffle
        self.sizes = sizes or [min(batch_size, examples - i) for i in range(0, examples, batch_size)]
        self.fingerprint = f"tiny-{kind}-{examples}-{self.sizes}-{seed}"

    def __len__(self):
        return len(self.sizes)

    def batch(self, rows):
        length = int(self.lengths[rows].max())
        mask = (torch.arange(length) < self.lengths[rows, None]).long()
        batch = {"input_ids": self.tokens[rows, :length] * mask, "attention_mask": mask, "example_id": rows + 100}
        if self.kind == "qa":
            return batch | {"start_positions": torch.zeros_like(rows), "end_positions": self.lengths[rows] - 1}
        labels = self.tokens[rows, 0] % 3
        return batch | {"labels": labels.float() if self.kind == "regression" else labels}

    def __iter__(self):
        return self(0)

    def __call__(self, epoch):
        generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
        count = sum(self.sizes)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        for rows in order.split(self.sizes):
            yield self.batch(rows)


def tiny_bert(seed=0, dropout=0.0, num_labels=3, layers=2, hidden=16, qa=False, positions=16, **options):
    """A random BERT with a head; equal seeds give equal weights."""
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=positions, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        num_labels=2 if qa else num_labels, **options,
    )  # fmt: skip
    torch.manual_seed(seed)
    return (BertForQuestionAnswering if qa else BertForSequenceClassification)(config)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(model, other, tolerance=0.0, but=()):
    for name, tensor in model.state_dict().items():
        if name in but:
            continue
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=tolerance, msg=name)
