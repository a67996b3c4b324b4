"""Models of which accelerate keeps parts on disk or in CPU memory and loads them around each module's forward."""

import accelerate
import pytest
import torch
from transformers import logging

from moebert_kernels.nn import HashRouter, MPOWeight
from tests.layers import kinds

KINDS = (*(kind for kind in kinds.CLASSIFIERS if kind != "split-bert-sentence"), "split-bert-hash-layer")
BATCH = kinds.batch("split-bert-hash")


def model_of(kind):
    return kinds.model(kind.removesuffix("-layer"), **{"norm": "layer"} if kind.endswith("layer") else {})


def batch_of(kind):
    return BATCH | ({"task_ids": 1} if kind.endswith("task") else {})


@pytest.fixture(autouse=True)
def no_progress_bars():
    logging.disable_progress_bar()


def logits(model, kind):
    with torch.no_grad():
        return model(**batch_of(kind)).logits


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
    model = model_of(kind)
    wanted = logits(model, kind)
    offloaded = offload(model, tmp_path, offload_buffers=buffers)
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    tables = [module.table for module in offloaded.modules() if isinstance(module, HashRouter)]
    assert not tables or tables[1].is_meta == buffers
    for _ in range(2):
        torch.testing.assert_close(logits(offloaded, kind), wanted, rtol=0, atol=1e-5)


def test_folded_weights_of_offloaded_experts_are_not_kept(tmp_path):
    model = all_on_disk(model_of("mpoe-bert-switch"), tmp_path)
    logits(model, "mpoe-bert-switch")
    assert all(module._folded is None for module in model.modules() if isinstance(module, MPOWeight))
