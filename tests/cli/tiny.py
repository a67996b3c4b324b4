"""A pretrained model, a task and a command line, all small enough for a test."""

import torch
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from moebert_kernels.cli import app
from tests.distill.words import tokenizer_of

GOOD, BAD = ("good", "fine", "great", "warm"), ("bad", "dull", "poor", "cold")
WORDS = (*GOOD, *BAD, "film", "play", "book", "the", "a", "was", "is", "who", "?")
TRAINING = (
    "--per_device_train_batch_size", "8", "--learning_rate", "1e-2", "--num_train_epochs", "8", "--max-length", "12",
)  # fmt: skip
SPLIT = ("--expert-size", 8, "--num-shared-neurons", 4)
TABLE = ("--task", "custom", "--text-column", "text", "--label-column", "mood")


def write_base(folder, **options):
    """A random BERT without a head, and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = tokenizer_of(WORDS)
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 24,
    }  # fmt: skip
    config = BertConfig(
        vocab_size=len(tokenizer), initializer_range=0.3, hidden_dropout_prob=0.05,
        attention_probs_dropout_prob=0.0, **(sizes | options),
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_data(folder, rows=64):
    """train.tsv, dev.tsv and test.csv of sentences whose adjective is the label."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (file, separator) in enumerate((("train.tsv", "\t"), ("dev.tsv", "\t"), ("test.csv", ","))):
        generator = torch.Generator().manual_seed(number)
        lines = [separator.join(("text", "mood"))]
        for _ in range(rows):
            label, word, noun, length = (int(torch.randint(0, n, (1,), generator=generator)) for n in (2, 4, 3, 3))
            text = f"the {('film', 'play', 'book')[noun]} {'was ' * (length + 1)}{(BAD, GOOD)[label][word]}"
            lines.append(separator.join((text, ("sad", "happy")[label])))
        (folder / file).write_text("\n".join(lines) + "\n")
    return folder


def moebert(*words):
    """Run the command line in this process."""
    return CliRunner().invoke(app, [str(word) for word in words])


def done(*words):
    """Run the command line; its output. Fails unless it succeeds."""
    result = moebert(*words)
    assert result.exit_code == 0, f"{result.output}\n{result.stderr}\n{result.exception!r}"
    return result.output


def refused(*words):
    """Run the command line, which must refuse in one line with status 2; the line, from the option's name on."""
    result = moebert(*words)
    lines = [line for line in result.stderr.splitlines() if line.startswith("moebert: ")]
    assert result.exit_code == 2, f"{result.output}\n{result.exception!r}"
    assert "Traceback" not in result.output
    return lines[-1].removeprefix("moebert: ").removeprefix("--")
