"""`torch.export` with dynamic batch and length, and `torch.compile` without graph breaks."""

import pytest
import torch

from tests.models import tiny

ROUTERS = ("hash-random", "gate-sentence")  # gate-token is a part of what gate-sentence does


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


@pytest.fixture
def poison_uninitialised_memory():
    """Off here: the compiler traces through the allocators that this fixture patches elsewhere."""


@pytest.mark.slow
@pytest.mark.parametrize("router", ROUTERS)
def test_export(tmp_path, router):
    model = tiny.model(router=router)
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=24)}
    exported = torch.export.export(
        model, (), tiny.inputs(), dynamic_shapes={"input_ids": sizes, "attention_mask": sizes}
    )
    torch.export.save(exported, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for batch, length in ((tiny.B, tiny.T), (5, 17), (1, 6)):
        inputs = tiny.inputs(batch, length)
        torch.testing.assert_close(program(**inputs).logits, model(**inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize("router", ROUTERS)
def test_compile(router):
    model = tiny.model(router=router, load_balance=0.1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (tiny.B, 5):
        inputs = tiny.inputs(batch) | tiny.labels("sequence", batch)
        gradients = []
        for run in (model, compiled):
            model.zero_grad()
            output = run(**inputs)
            output.loss.backward()
            gradients.append([output.logits, *(p.grad.clone() for p in model.parameters())])
        torch.testing.assert_close(gradients[1], gradients[0])
