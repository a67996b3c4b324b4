"""Models whose parameters FSDP2 shards: each layer has its own whole while it runs, and no longer."""

import copy

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.layers.test_offload import KINDS, batch_of, model_of


@pytest.fixture
def mesh(tmp_path):
    """Of one process; its parameters are sharded tensors all the same."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_the_whole_model(kind, mesh):
    model = model_of(kind)
    sharded = copy.deepcopy(model)
    for layer in sharded.base_model.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    inputs, labels = batch_of(kind), torch.tensor([0, 1, 2])
    results = []
    for one in (model, sharded):
        output = one(**inputs, labels=labels)
        output.loss.backward()
        results.append(output.logits)
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)
    for (name, whole), part in zip(model.named_parameters(), sharded.parameters(), strict=True):
        assert (whole.grad is None) == (part.grad is None), name
        if whole.grad is not None:
            torch.testing.assert_close(part.grad.full_tensor(), whole.grad, rtol=0, atol=1e-6, msg=name)
