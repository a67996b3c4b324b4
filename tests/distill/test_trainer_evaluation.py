"""`MoETrainer` evaluates and predicts: what the loss is of, and whom it asks."""

import pytest
import torch
import torch.nn.functional as F

from moebert_kernels.convert import convert_to_moe
from moebert_kernels.layers import MoEConfig
from tests.distill.tiny import tiny_bert
from tests.distill.tiny_trainer import tiny_data, trainer


def test_the_loss_of_an_evaluation_is_of_the_labels_alone(tmp_path):
    """A gated model adds its balance loss to its own."""
    gated = convert_to_moe(tiny_bert(0), MoEConfig.moebert(router="gate-token", load_balance=0.5))
    run, data = trainer(tmp_path, gated, per_device_eval_batch_size=8), tiny_data(8)
    found = run.predict(data)
    wanted = F.cross_entropy(torch.tensor(found.predictions), torch.tensor(found.label_ids)).item()
    assert run.evaluate(data)["eval_loss"] == pytest.approx(wanted, rel=1e-5)
