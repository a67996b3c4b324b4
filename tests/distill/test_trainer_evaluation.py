"""`MoETrainer` evaluates and predicts: what the loss is of, and whom it asks."""

import pytest
import torch
import torch.nn.functional as F
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from moebert_kernels.convert import convert_to_moe
from moebert_kernels.distill.microbert import MicroBertObjective
from moebert_kernels.layers import MoEConfig
from tests.distill.tiny import VOCAB, tiny_bert
from tests.distill.tiny_trainer import tiny_data, trainer


def test_the_loss_of_an_evaluation_is_of_the_labels_alone(tmp_path):
    """A gated model adds its balance loss to its own."""
    gated = convert_to_moe(tiny_bert(0), MoEConfig.moebert(router="gate-token", load_balance=0.5))
    run, data = trainer(tmp_path, gated, per_device_eval_batch_size=8), tiny_data(8)
    found = run.predict(data)
    wanted = F.cross_entropy(torch.tensor(found.predictions), torch.tensor(found.label_ids)).item()
    assert run.evaluate(data)["eval_loss"] == pytest.approx(wanted, rel=1e-5)


def test_a_teacher_gets_what_its_student_does_without(tmp_path):
    """DistilBERT takes no token types, and BERT's outputs depend on them."""
    student = DistilBertForSequenceClassification(DistilBertConfig(
        vocab_size=VOCAB, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=16, num_labels=3,
    ))  # fmt: skip
    data, teacher, seen = tiny_data(8), tiny_bert(1), []
    data = data.add_column("token_type_ids", [[0] + [1] * (len(row) - 1) for row in data["input_ids"]])
    teacher.bert.embeddings.register_forward_pre_hook(
        lambda module, args, options: seen.append(options["token_type_ids"].max().item()), with_kwargs=True
    )
    for kept in (None, str(tmp_path / "kept")):
        objective = MicroBertObjective("classification", ("soft", "hidden"))
        run = trainer(tmp_path, student, data, teacher, objective, teacher_outputs=kept, max_steps=2)
        run.train()
        unlabelled = data.remove_columns("labels")
        assert run.evaluate(unlabelled)["eval_loss"] > 0 and len(run.predict(unlabelled).predictions) == 8
    assert len(seen) == 6 and all(seen)
