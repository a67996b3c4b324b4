"""Sentence embeddings that follow a teacher's, and sentence-transformers' files."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, ModernBertConfig, ModernBertModel, MPNetConfig, MPNetModel

from moebert_kernels.convert import convert_to_moe
from moebert_kernels.distill.embedding import EmbeddingObjective, Pooling, keep_pooling, read_pooling
from moebert_kernels.distill.named_objectives import make_objective
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig
from tests.distill.tiny import VOCAB, assert_same_weights, tiny_bert, weights
from tests.distill.tiny_trainer import mostly_slow, terms_of, tiny_data, tiny_tokenizer, trainer

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def encoder(family="bert", seed=0):
    """A random encoder without a head."""
    torch.manual_seed(seed)
    if family == "modernbert":
        special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
        return ModernBertModel(ModernBertConfig(**SIZES, **special, max_position_embeddings=16))
    if family == "mpnet":
        return MPNetModel(MPNetConfig(**SIZES, max_position_embeddings=16, hidden_dropout_prob=0.0))
    return BertModel(BertConfig(**SIZES, max_position_embeddings=16, hidden_dropout_prob=0.0))


def texts(count=24, seed=0):
    return tiny_data(count, seed, labels=False)


@torch.no_grad()
def embedded(model, data):
    rows = [model.eval()(input_ids=torch.tensor([row])).last_hidden_state for row in data["input_ids"]]
    return torch.cat([Pooling()(hidden, torch.ones(1, hidden.shape[1])) for hidden in rows])


def distance_of(model, teacher, data):
    return float(1 - torch.cosine_similarity(embedded(model, data), embedded(teacher, data)).mean())


@pytest.mark.parametrize("family", mostly_slow(("bert", "mpnet", "modernbert"), {"bert"}))
def test_a_converted_student_comes_to_embed_as_its_teacher(family, tmp_path):
    distance = "mse" if family == "mpnet" else "cosine"
    teacher = encoder(family, seed=1)
    student = convert_to_moe(encoder(family), MoEConfig.moebert(), importance=torch.rand(2, 32))
    before = distance_of(student, teacher, texts(8, 5))
    run = trainer(
        tmp_path, student, texts(), teacher=teacher, objective=EmbeddingObjective(distance=distance),
        num_train_epochs=6, loss_weights={"embedding": 10.0},
    )  # fmt: skip
    run.train()
    assert not terms_of(run, "task")
    for name in ("embedding", "hidden"):
        assert terms_of(run, name)[-1] < 0.7 * terms_of(run, name)[0]
    assert distance_of(student, teacher, texts(8, 5)) < 0.8 * before


def test_evaluation_judges_by_the_objective_and_predicts_embeddings(tmp_path):
    teacher, student, data = encoder(seed=1), encoder(), texts(9, 2)
    run = trainer(tmp_path, student, texts(), teacher=teacher, objective=EmbeddingObjective(layer_map={}))
    run._judging_teacher = None  # whom predictions do not need
    np.testing.assert_allclose(run.predict(data).predictions, embedded(student, data).numpy(), atol=1e-6)
    run._judging_teacher = run.teacher
    assert run.evaluate(data)["eval_loss"] == pytest.approx(distance_of(student, teacher, data), abs=1e-6)


def test_kept_outputs_leave_other_sentences_to_the_teacher(tmp_path):
    teacher, student, data = encoder(seed=1), encoder(), texts(9, 2)
    run = trainer(
        tmp_path, student, texts(), teacher=teacher, objective=EmbeddingObjective(layer_map={}), judged_on=data,
        teacher_outputs=str(tmp_path / "kept"), eval_strategy="epoch", num_train_epochs=1,
    )  # fmt: skip
    run.train()
    assert terms_of(run, "eval_loss") == [pytest.approx(distance_of(student, teacher, data), abs=1e-6)]
    np.testing.assert_allclose(run.predict(data).predictions, embedded(student, data).numpy(), atol=1e-6)


def test_labels_are_not_for_an_encoder(tmp_path):
    """A column `label` is kept by transformers, whatever the model."""
    data = texts(12).add_column("label", [0, 1] * 6)
    run = trainer(tmp_path, encoder(), data, teacher=encoder(seed=1), objective=EmbeddingObjective(), judged_on=data)
    run.train()
    assert not terms_of(run, "task") and run.evaluate()["eval_loss"] > 0
    weighted = {"objective": EmbeddingObjective(), "loss_weights": {"task": 1.0}}
    with pytest.raises(UserError, match="labels: expected in each batch for the task's loss"):
        trainer(tmp_path, encoder(), data, teacher=encoder(seed=1), **weighted).train()


@pytest.mark.parametrize("layer_map", [{}, {1: 1, 2: 2}])
def test_kept_outputs_of_an_encoder_train_as_the_encoder(layer_map, tmp_path):
    ended = []
    for kept in (None, str(tmp_path / "kept")):
        run = trainer(
            tmp_path, encoder(), texts(), teacher=encoder(seed=1), objective=EmbeddingObjective(layer_map=layer_map),
            teacher_outputs=kept, adam_epsilon=1e-4,
        )  # fmt: skip
        run.train()
        ended.append(run.model)
    assert_same_weights(ended[1], weights(ended[0]), tolerance=1e-6)


def test_padding_and_lengths_have_no_influence():
    hidden, mask = torch.randn(2, 5, 4, dtype=torch.float64), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    other = hidden.clone()
    other[0, 3:] = 1e6
    for view in ("mean", "max", "cls"):
        vectors = Pooling(view)(hidden, mask)
        torch.testing.assert_close(Pooling(view)(other, mask), vectors)
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(Pooling("mean", normalize=False)(hidden, mask)[0], hidden[0, :3].mean(0))
    with pytest.raises(UserError, match="pooling: expected one of cls, max, mean, got 'last'"):
        Pooling("last")


def write_modules(folder, kinds, config=None):
    folder.mkdir(exist_ok=True)
    paths = ["", "1_Pooling", "2_Normalize", "3_Dense"]
    modules = [{"idx": n, "name": str(n), "path": paths[n], "type": f"sentence_transformers.models.{kind}"}
               for n, kind in enumerate(kinds)]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling/config.json").write_text(json.dumps(config or {"pooling_mode_cls_token": True}))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 16}')


def test_pooling_is_read_and_kept(tmp_path):
    source, target = tmp_path / "teacher", tmp_path / "student"
    assert read_pooling(tmp_path) is None
    write_modules(source, ["Transformer", "Pooling", "Normalize"])
    assert read_pooling(source) == Pooling("cls", normalize=True)
    keep_pooling(source, target)
    assert read_pooling(target) == Pooling("cls") and (target / "sentence_bert_config.json").exists()
    write_modules(source, ["Transformer", "Pooling"], {"pooling_mode": "max"})
    assert read_pooling(source) == Pooling("max", normalize=False)
    encoder().save_pretrained(source)
    named = make_objective("embedding", {"distance": "mse"}, encoder(), AutoModel.from_pretrained(source))
    assert named.pooling == Pooling("max", normalize=False) and named.distance == "mse"
    assert make_objective("embedding", {"pooling": {"view": "cls"}}, encoder()).pooling == Pooling("cls")
    assert make_objective("embedding", None, encoder(), encoder()).pooling == Pooling("mean")
    for kinds, config, message in (
        (["Transformer", "Pooling", "Dense"], None, "modules.json: expected Transformer, Pooling and Normalize"),
        (["Transformer", "Pooling"], {"pooling_mode": ["cls", "max"]}, "pooling: expected one of .* got cls, max"),
        (["Transformer", "Pooling"], {"pooling_mode_lasttoken": True}, "pooling: expected one of .* got lasttoken"),
    ):
        write_modules(source, kinds, config)
        with pytest.raises(UserError, match=message):
            read_pooling(source)
    (source / "modules.json").write_text("[")
    with pytest.raises(UserError, match=r"modules.json: expected JSON in"):
        read_pooling(source)
    with pytest.raises(UserError, match=r"modules.json: expected a sentence-transformers model"):
        keep_pooling(tmp_path, target)


def test_what_does_not_fit_is_refused(tmp_path):
    for model, objective, message in (
        (tiny_bert(0, hidden=32), EmbeddingObjective(), "hidden_size: expected the teacher's 16, got 32"),
        (encoder(), EmbeddingObjective(layer_map={3: 1}), "layer_map: expected student states between 0 and 2"),
    ):
        with pytest.raises(UserError, match=message):
            trainer(tmp_path, model, texts(), teacher=encoder(seed=1), objective=objective)
    with pytest.raises(UserError, match="distance: expected one of mse, cosine, got 'dot'"):
        EmbeddingObjective(distance="dot")


def test_a_converted_student_is_a_sentence_transformer(tmp_path):
    """Saved with its teacher's modules it gives the embeddings that it was trained for; and back."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    student = convert_to_moe(encoder(), MoEConfig.moebert(), importance=torch.rand(2, 32)).eval()
    write_modules(tmp_path / "teacher", ["Transformer", "Pooling", "Normalize"], {
        "word_embedding_dimension": 16, "pooling_mode_mean_tokens": True,
    })  # fmt: skip
    student.save_pretrained(tmp_path / "student")
    tiny_tokenizer().save_pretrained(tmp_path / "student")
    keep_pooling(tmp_path / "teacher", tmp_path / "student")
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "student"), device="cpu")
    got = loaded.encode(["5 9 3", "7 7 20 31 4"])
    batch = tiny_tokenizer()(["5 9 3", "7 7 20 31 4"], padding=True, return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        wanted = Pooling()(student(**inputs).last_hidden_state, batch["attention_mask"])
    np.testing.assert_allclose(got, wanted.numpy(), atol=1e-6)
    loaded.save(str(tmp_path / "again"))
    assert read_pooling(tmp_path / "again") == Pooling()
    again = AutoModel.from_pretrained(tmp_path / "again")
    assert_same_weights(again, weights(student))
