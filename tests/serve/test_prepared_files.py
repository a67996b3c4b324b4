"""Files of prepared models: what they hold, and what transformers makes of them."""

import copy
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
)

from moebert_kernels.errors import UserError
from moebert_kernels.serve import prepare
from moebert_kernels.serve.embedding import PackedEmbedding
from moebert_kernels.serve.packed import available
from tests.convert.families import FAMILIES, make, make_inputs
from tests.serve.test_prepare import CLOSE, distance, made, run


@pytest.fixture(autouse=True)
def one_engine_and_small_embeddings(monkeypatch):
    monkeypatch.setattr("moebert_kernels.serve.preparation.FEWEST_ROWS", 50)
    monkeypatch.setattr("moebert_kernels.serve.packed.available", lambda dtype: available(dtype)[-1:])


TIED = [
    ("bert", AutoModelForMaskedLM, {}), ("gpt2", AutoModelForCausalLM, {}), ("gemma3_text", AutoModelForCausalLM, {}),
    ("t5", AutoModelForSeq2SeqLM, {}), ("bart", AutoModelForSeq2SeqLM, {"scale_embedding": True}),
]  # fmt: skip


@pytest.mark.parametrize("family, auto, changes", TIED)
@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32"])
def test_tied_tables_are_saved_once(family, auto, changes, dtype, tmp_path):
    inputs, model = make_inputs(family), made(family, "dense", auto, vocab_size=1000, **changes)
    expected = run(model, inputs)
    model.save_pretrained(tmp_path / "dense")
    prepared = prepare(model, dtype)
    got = run(prepared, inputs)
    assert distance(got, expected) < 2 * CLOSE[dtype]
    prepared.save_pretrained(tmp_path / "first")
    tables = [tensor for tensor in load_file(tmp_path / "first/model.safetensors").values() if len(tensor) == 1000]
    assert sum(tensor.dim() == 2 for tensor in tables) == 1
    loaded = auto.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    again = auto.from_pretrained(tmp_path / "second")
    for one in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded)), again):
        assert torch.equal(run(one, inputs), got)
    if dtype == "int8":
        sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("dense", "first")]
        assert sizes[1] < 0.5 * sizes[0]  # of tiny models, in which scales and norms count


def test_tables_that_a_checkpoint_keeps_apart_stay_so(tmp_path):
    """A head that somebody untied, and checkpoints of before."""
    inputs, model = make_inputs("gpt2"), make("gpt2", AutoModelForCausalLM)
    model.lm_head.weight = nn.Parameter(-model.lm_head.weight.detach())
    prepared = prepare(model)
    prepared.save_pretrained(tmp_path)
    got = run(prepared, inputs)
    assert torch.equal(run(AutoModelForCausalLM.from_pretrained(tmp_path), inputs), got)


def test_a_shared_embedding_that_no_model_calls_its_own_is_packed():
    """Marian's encoder and decoder have one each, tied to a third."""
    sizes = FAMILIES["bart"][1]
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("marian", **sizes)).eval()
    expected, prepared = run(model, make_inputs("bart")), prepare(model)
    assert isinstance(prepared.model.shared, PackedEmbedding)
    assert distance(run(prepared, make_inputs("bart")), expected) < CLOSE["int8"]


@pytest.mark.parametrize("kind", ["dense", "hash"])
@pytest.mark.parametrize("dtype", ["int8", "float32"])
@pytest.mark.parametrize("auto", [AutoModelForTokenClassification, AutoModelForMaskedLM])
def test_a_model_without_a_pooler_is_loaded_without_a_head(auto, dtype, kind, tmp_path):
    inputs, prepared = make_inputs("bert"), prepare(made("bert", kind, auto), dtype)
    prepared.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = AutoModel.from_pretrained(tmp_path)
    assert [str(one.message) for one in caught if "pooler" in str(one.message)] == [
        "checkpoint: it has no pooler, so the model gets none, and its pooler_output is None"
    ]
    with torch.no_grad():
        got, wanted = loaded(**inputs), prepared.bert(**inputs)
    assert torch.equal(got.last_hidden_state, wanted.last_hidden_state) and got.pooler_output is None
    loaded.save_pretrained(tmp_path / "bare")
    assert torch.equal(run(AutoModel.from_pretrained(tmp_path / "bare"), inputs), got.last_hidden_state)
    with pytest.raises(UserError, match=r"checkpoint: expected a tensor bert\.pooler\.dense\.weight, got none"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("auto", [AutoModelForTextEncoding, AutoModelForTokenClassification])
@pytest.mark.parametrize("family", ["t5", "umt5"])
def test_an_encoder_alone_is_no_encoder_and_decoder(family, auto, tmp_path):
    """T5's classes draw missing weights by name, which int8 ones refuse."""
    prepare(made(family, "dense", auto)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"checkpoint: expected a tensor decoder\..*weight, got none"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", ["int8", "float32"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_prepared_vocabulary_stays(family, dtype):
    prepared = prepare(make(family, AutoModelForCausalLM if family == "gpt2" else AutoModelForMaskedLM), dtype)
    expected = run(prepared, make_inputs(family))
    with pytest.raises(UserError, match="resize_token_embeddings: expected a model that is not prepared; resize it"):
        prepared.resize_token_embeddings(120)
    assert torch.equal(run(prepared, make_inputs(family)), expected)
