"""Language models and text-to-text models through the commands."""

import json
import time
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from moebert_kernels.bench import clocks
from tests.cli.tiny import TABLE, done, refused
from tests.distill.tiny_text import STORY, byte_tokenizer, tiny_gpt2, tiny_t5, word_tokenizer
from tests.distill.words import tokenizer_of

QUICK = ("--per_device_train_batch_size", "8", "--learning_rate", "1e-2", "--num_train_epochs", "6")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2") / "base"
    tiny_gpt2(positions=16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name in ("train", "valid", "test"):
        (folder / f"{name}.txt").write_text(STORY * (4 if name == "train" else 1))
    return folder


@pytest.fixture(scope="module")
def language_model(gpt2, texts, tmp_path_factory):
    output = tmp_path_factory.mktemp("lm") / "out"
    done("finetune", "--model", gpt2, "--task", "lm", "--data", texts, "--output", output, *QUICK)
    return output


def perplexity(model, texts, tmp_path, *words):
    file = tmp_path / "result.json"
    done("eval", "--model", model, "--task", "lm", "--data", texts, "--split", "test", "--output", file, *words)
    return json.loads(file.read_text())["splits"]["test"]["perplexity"]


def test_a_language_model_learns_and_follows(gpt2, language_model, texts, tmp_path):
    before, after = (perplexity(model, texts, tmp_path) for model in (gpt2, language_model))
    assert after < before / 4
    assert perplexity(language_model, texts, tmp_path, "--max-length", 12, "--doc-stride", 6) != after
    assert AutoModelForCausalLM.from_pretrained(language_model / "best").config.n_positions == 16
    student = tmp_path / "student"
    done("distill", "--model", gpt2, "--teacher", language_model, "--task", "lm", "--data", texts, "--output", student,
         *QUICK)  # fmt: skip
    assert perplexity(student, texts, tmp_path) < before / 4
    lines = json.loads((student / "trainer_state.json").read_text())["log_history"]
    assert any({"task", "prediction", "loss"} <= line.keys() for line in lines)


def test_conversion_reads_no_column_of_labels(gpt2, texts, tmp_path):
    """Not of running text either, which it reads as a language model's though the task is called custom."""
    words = ("convert", "--model", gpt2, "--router", "hash-balance", "--expert-size", 8)
    done(*words, "--data", texts / "train.txt", *TABLE, "--output", tmp_path / "moe")


def test_conversion_reads_the_rows_of_a_table_as_documents(gpt2, data, tmp_path):
    """Without a padding token, as `quantize` does."""
    words = ("convert", "--model", gpt2, "--router", "hash-balance", "--expert-size", 8)
    done(*words, "--data", data, *TABLE, "--output", tmp_path / "moe")


def test_a_text_to_text_model_learns_classes_and_names_them(data, tmp_path):
    base = tmp_path / "t5"
    words = "custom text: film play book the was good fine great warm bad dull poor cold"
    tiny_t5().save_pretrained(base)
    word_tokenizer(words).save_pretrained(base)
    files = ("--data", f"train={data / 'train.tsv'}", "--data", f"validation={data / 'dev.tsv'}")
    words = ("--hold-out", "halves", *TABLE, *files)
    out, file = tmp_path / "out", tmp_path / "result.json"
    done("finetune", "--model", base, *words, "--output", out, *QUICK,
         "--num_train_epochs", 16, "--label_smoothing_factor", "0.1")  # fmt: skip
    done("eval", "--model", out, *words, "--split", "test", "--output", file)
    assert json.loads(file.read_text())["splits"]["test"] == {"accuracy": 1.0, "macro_f1": 1.0, "examples": 32}
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out/best").config.id2label == {0: "happy", 1: "sad"}
    line = refused(
        "finetune", "--model", base, "--task", "squad", "--data", squad(tmp_path), "--output", tmp_path / "q"
    )
    assert line.startswith("model: expected one that is no encoder-decoder for squad, got ")


def squad(folder):
    row = {"question": "what", "context": "a book", "answers": {"text": ["a"], "answer_start": [0]}}
    for name in ("train", "dev"):
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def test_what_language_models_refuse(base, gpt2, language_model, texts, data, tmp_path):
    output = ("--output", tmp_path / "out")
    line = refused("finetune", "--model", base, "--task", "lm", "--data", texts, *output)
    assert line.startswith("model: expected every weight of a BertLMHeadModel, got ") and "(no cls." in line
    line = refused("eval", "--model", gpt2, "--task", "lm", "--data", texts, "--max-length", "17")
    assert line == "max-length: expected at most 16, the model's positions, got 17"
    line = refused("eval", "--model", gpt2, "--task", "lm", "--data", texts, "--doc-stride", "16")
    assert line == "doc-stride: expected between 1 and 15 tokens in windows of 16, got 16"
    line = refused("eval", "--model", gpt2, "--task", "lm", "--data", texts, "--hold-out", "halves")
    assert line == "hold-out: expected rows to divide, got running text; divide its files"
    line = refused("eval", "--model", gpt2, "--task", "lm", "--text-column", "label")
    assert line == "text-column: expected other names than label and example_id, got label; rename it"
    two = ("--text-column", "a", "--text-column", "b")
    line = refused("eval", "--model", gpt2, "--task", "lm", *two)
    assert line == "text-column: expected one for a language model, got 2"
    line = refused("quantize", "--model", gpt2, "--data", texts, *two, *output)
    assert line == "text-column: expected one for a language model, got 2"
    student = ("distill", "--model", gpt2, "--teacher", language_model, "--task", "lm", "--data", texts, *output)
    line = refused(*student, "--teacher_outputs", tmp_path)
    assert line == "teacher: expected a model, got cached outputs, which hold no predictions by token"
    line = refused(*student, "--objective_options.preset", "paper")
    assert line == "objective_options: expected names among causal, got 'preset'"


def test_a_model_that_sees_what_it_predicts_is_refused(texts, tmp_path):
    from transformers import BertConfig, BertLMHeadModel

    words = sorted(set(STORY.split()))
    tokenizer_of(words).save_pretrained(tmp_path)
    BertLMHeadModel(
        BertConfig(vocab_size=len(words) + 5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                   intermediate_size=16, initializer_range=1.0)
    ).save_pretrained(tmp_path)  # fmt: skip
    line = refused("eval", "--model", tmp_path, "--task", "lm", "--data", texts)
    assert line.endswith("which sees the tokens it predicts")


def test_bench_knows_their_feed_forwards(gpt2, texts, tmp_path, monkeypatch):
    # the thread's own time, which other programs do not lengthen
    monkeypatch.setattr(clocks, "time", SimpleNamespace(perf_counter=time.thread_time))
    t5, out = tmp_path / "t5", tmp_path / "bench.json"
    tiny_t5(vocab_size=280).save_pretrained(t5)
    byte_tokenizer().save_pretrained(t5)
    words = ("--rounds", 5, "--output", out)
    done("bench", "--model", gpt2, "--against", t5, "--length", 16, *words)
    result = json.loads(out.read_text())
    for name in ("model", "against"):
        times = result["cases"][0]["providers"][name]
        assert 0 < times["ffn_ms"]["median"] < times["model_ms"]["median"]
        assert result["models"][name]["total_parameters"] == result["models"][name]["active_parameters"]
    done("bench", "--model", gpt2, "--against", gpt2, "--task", "lm", "--data", texts, *words, "--batch-size", 2)
    assert json.loads(out.read_text())["cases"][0]["real_tokens"] == 32
    line = refused("bench", "--model", gpt2, "--against", t5, "--length", 17)
    assert line == "length: expected at most 16, the models' positions, got 17"


@pytest.mark.parametrize("router", ["switch", "hash-random"])
def test_mpoe_goes_the_whole_way(router, gpt2, language_model, texts, tmp_path):
    """Convert, train with the gradient mask and one fold per step, follow a teacher, judge, compare."""
    moe, out, result = tmp_path / "moe", tmp_path / "out", tmp_path / "bench.json"
    convert = ("convert", "--method", "mpoe", "--model", language_model, "--num-experts", 3, "--sites", 3)
    done(*convert, "--router", router, "--output", moe)
    assert perplexity(moe, texts, tmp_path) == pytest.approx(perplexity(language_model, texts, tmp_path), rel=1e-4)
    data = (
        "--task",
        "lm",
        "--data",
        texts,
        *QUICK,
        "--num_train_epochs",
        1,
        "--gradient_mask.probability",
        0.5,
        "--shared_fold",
    )
    done("finetune", "--model", moe, *data, "--gradient_accumulation_steps", 2, "--output", out)
    done("distill", "--model", moe, "--teacher", language_model, *data, "--output", tmp_path / "student")
    assert perplexity(tmp_path / "student", texts, tmp_path) < 280
    line = refused("distill", "--model", gpt2, "--teacher", moe, *data, "--output", tmp_path / "no")
    assert line == "teacher: expected a dense model, got a MoE (model_type 'gpt2')"
    printed = done("bench", "--model", out, "--against", gpt2, "--length", 16, "--rounds", 2, "--output", result)
    assert "with 3 dense experts" in printed and "1 / E = 0.3333" in printed
    sizes = json.loads(result.read_text())["models"]
    assert sizes["model"]["mpoe"]["switch_parameters"] > sizes["model"]["total_parameters"]
    assert "mpoe" not in sizes["against"]


def test_mpoe_options_are_refused_for_other_models(gpt2, texts, tmp_path):
    words = ("finetune", "--model", gpt2, "--task", "lm", "--data", texts, "--output", tmp_path / "out", *QUICK)
    line = refused(*words, "--gradient_mask.probability", 0.5)
    assert line == "model: expected experts with central tensors, got none in a GPT2LMHeadModel"
    assert refused(*words, "--shared_fold").startswith("shared_fold: expected False for a model that folds no weights")
