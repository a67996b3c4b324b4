"""Models of which accelerate keeps parts on disk or in CPU memory and loads them around each module's forward."""

import accelerate
import pytest
import torch
from transformers import logging

from moebert_kernels.convert import convert_to_moe, convert_to_moe
from moebert_kernels.layers import MoEConfig
from moebert_kernels.nn import HashRouter, MPOWeight
from tests.convert.models import dense_model, inputs
from tests.models import tiny

MOE = {"num_experts": 4, "expert_size": 12, "shared": 0}


def in_place(config, **options):
    return convert_to_moe(dense_model("bert-cls"), config, **options)


KINDS = {
    "hash": lambda: convert_to_moe(dense_model("bert-cls"), None, **MOE),
    "gate": lambda: convert_to_moe(dense_model("bert-cls"), None, router="gate-token", **MOE),
    "task": lambda: tiny.model(router="task"),
    "mpoe hash": lambda: in_place(MoEConfig.mpoe(router="hash-random", num_experts=4), noise=0.1),
    "mpoe switch": lambda: in_place(MoEConfig.mpoe(num_experts=4), noise=0.1),
    "norm of each expert": lambda: in_place(MoEConfig(expert_size=12), importance=torch.rand(2, 48)),
}
BATCH = inputs()


@pytest.fixture(autouse=True)
def no_progress_bars():
    logging.disable_progress_bar()


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


def on_cpu_and_disk(model, folder, **options):
    """Loaded with the second layer, and what comes after it, on disk."""
    model.save_pretrained(folder)
    places = {f"{model.base_model_prefix}.{name}": "cpu" for name in ("embeddings", "encoder.layer.0")}
    places |= {f"{model.base_model_prefix}.{name}": "disk" for name in ("encoder.layer.1", "pooler")}
    places["classifier"] = "disk"
    return type(model).from_pretrained(folder, device_map=places, offload_folder=folder / "parts", **options)


def all_on_disk(model, folder, **options):
    accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"), **options)
    return model


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("offload", [on_cpu_and_disk, all_on_disk])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_logits(kind, offload, buffers, tmp_path):
    model = KINDS[kind]().eval()
    wanted = logits(model)
    offloaded = offload(model, tmp_path, offload_buffers=buffers)
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    tables = [module.table for module in offloaded.modules() if isinstance(module, HashRouter)]
    assert not tables or tables[1].is_meta == buffers
    for _ in range(2):
        torch.testing.assert_close(logits(offloaded), wanted, rtol=0, atol=1e-5)


def test_folded_weights_of_offloaded_experts_are_not_kept(tmp_path):
    model = all_on_disk(KINDS["mpoe switch"]().eval(), tmp_path)
    logits(model)
    assert all(module._folded is None for module in model.modules() if isinstance(module, MPOWeight))
