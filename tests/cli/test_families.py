"""The commands on models of other families than BERT's, and with other heads."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from moebert_kernels.convert import load_importance
from moebert_kernels.layers import get_task, moe_config, moe_layers, set_task
from tests.cli.tiny import TABLE, TRAINING, WORDS, done, refused
from tests.convert.families import make
from tests.distill.words import tokenizer_of

SIZES = {"num_experts": 2, "expert_size": 16, "num_shared_neurons": 8}
OPTIONS = [word for name, size in SIZES.items() for word in (f"--{name.replace('_', '-')}", size)]


NO_DROPOUT = dict.fromkeys(
    ("dropout", "attention_dropout", "seq_classif_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0
)


def pretrained(family, folder, auto=AutoModel):
    tokenizer = tokenizer_of(WORDS)
    sizes = {"vocab_size": len(tokenizer), "initializer_range": 0.3, "pad_token_id": 0}
    make(family, auto, **sizes, **NO_DROPOUT).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def goes_the_whole_way(family, data, tmp_path, *more):
    """Fine-tune, score, convert, distil, judge, compare; the accuracy of the student."""
    training = (*TRAINING, "--learning_rate", "3e-3", "--num_train_epochs", "16", *more)
    base, teacher, scores, moe, out = (tmp_path / name for name in ("base", "teacher", "i.safetensors", "moe", "out"))
    pretrained(family, base)
    given = (*TABLE, "--data", data)
    done("finetune", "--model", base, *given, "--output", teacher, *training)
    done("importance", "--model", teacher, *given, "--output", scores)
    assert load_importance(scores).scores.shape == (2, 48)
    words = ("convert", "--model", teacher, "--importance", scores, *OPTIONS, "--output", moe)
    assert "2 experts of 16 neurons of the dense layer's 48, 8 of them in every expert" in done(*words)
    assert "is there already" in done(*words)
    config = AutoConfig.from_pretrained(moe)
    assert config.model_type == family and moe_config(config).experts == "split"
    done("distill", "--model", moe, "--teacher", teacher, *given, "--output", out, *training)
    student = AutoModelForSequenceClassification.from_pretrained(out / "best")
    assert len(moe_layers(student)) == 2 and student.config.id2label == {0: "happy", 1: "sad"}
    line = refused("distill", "--model", teacher, "--teacher", teacher, *given, "--output", tmp_path / "no", *training)
    assert line.endswith(f"which is a dense {family}; moebert convert makes a MoE")
    done("eval", "--model", out, *given, "--split", "test", "--output", tmp_path / "result.json")
    return json.loads((tmp_path / "result.json").read_text())["splits"]["test"]["accuracy"]


def test_distilbert_goes_the_whole_way(data, tmp_path):
    goes_the_whole_way("distilbert", data, tmp_path, "--max_steps", 2)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["electra", "deberta-v2"])
def test_families_go_the_whole_way(family, data, tmp_path):
    goes_the_whole_way(family, data, tmp_path, "--max_steps", 2)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["modernbert", "mpnet"])
def test_families_learn(family, data, tmp_path):
    assert goes_the_whole_way(family, data, tmp_path) > 0.8
    both = ("--model", tmp_path / "out", "--against", tmp_path / "teacher")
    assert "speed-up" in done("bench", *both, "--length", 8, "--batch-size", 1, "--rounds", 1)


@pytest.mark.parametrize("options", [("--experts", "copy", "--router", "top2"), ("--method", "mpoe", "--sites", 3)])
def test_a_model_for_masked_words_keeps_its_head(options, tmp_path):
    base = pretrained("modernbert", tmp_path / "base", AutoModelForMaskedLM)
    done("convert", "--model", base, "--num-experts", 2, *options, "--output", tmp_path / "moe")
    dense, moe = (AutoModelForMaskedLM.from_pretrained(tmp_path / name).eval() for name in ("base", "moe"))
    tokens = AutoTokenizer.from_pretrained(tmp_path / "moe")("the film was good", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(moe(**tokens).logits, dense(**tokens).logits, rtol=0, atol=1e-4)


def test_one_expert_merges_into_the_dense_model(tmp_path):
    base = pretrained("distilbert", tmp_path / "base")
    words = ("--num-experts", 1, "--expert-size", 48, "--num-shared-neurons", 48)
    done("convert", "--model", base, *words, "--output", tmp_path / "moe")
    done("merge", "--model", tmp_path / "moe", "--output", tmp_path / "plain")
    dense, plain = (AutoModel.from_pretrained(tmp_path / name).eval() for name in ("base", "plain"))
    assert type(plain) is type(dense)
    tokens = AutoTokenizer.from_pretrained(base)("the film was good", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(plain(**tokens)[0], dense(**tokens)[0], rtol=0, atol=1e-5)


def test_a_head_for_each_task_of_another_family(tmp_path):
    base = pretrained("distilbert", tmp_path / "base")
    named = ("--task", "sst2", "--task", "stsb")
    done("convert", "--model", base, "--router", "task", *named, "--output", tmp_path / "moe")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "moe").eval()
    tokens = AutoTokenizer.from_pretrained(base)("the film was good", return_tensors="pt")
    for task, number in (("sst2", 2), ("stsb", 1)):
        set_task(model, task)
        assert get_task(model) == task and model(**tokens).logits.shape == (1, number)
    done("merge", "--model", tmp_path / "moe", "--task", "stsb", "--output", tmp_path / "plain")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    torch.testing.assert_close(plain(**tokens).logits, model(**tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["mpnet", "electra"])
def test_small_students_of_families_with_berts_names(family, tmp_path):
    base, small = pretrained(family, tmp_path / "base"), tmp_path / "small"
    sizes = ("--layers", 1, "--hidden-size", 12, "--intermediate-size", 20, "--heads", 3)
    done("student", "--model", base, *sizes, "--init", "random", "--output", small)
    assert AutoConfig.from_pretrained(small).hidden_size == 12
    done("student", "--model", base, "--init", small, "--output", tmp_path / "given")
    given, wanted = (AutoModel.from_pretrained(folder).state_dict() for folder in (tmp_path / "given", small))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in given.items())
