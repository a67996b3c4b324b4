"""Whole models with heads: `torch.export` to a file, and `torch.compile` of a training step without graph breaks."""

import pytest
import torch

from moebert_kernels.layers import moe_layers
from moebert_kernels.serve import prepare
from tests.layers import kinds

KINDS = ("split-bert-hash", "split-bert-sentence", "split-bert-task")  # a gate per token is a part of one per sentence


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


@pytest.fixture
def poison_uninitialised_memory():
    """Off here: the compiler traces through the allocators that this fixture patches elsewhere."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_export(tmp_path, kind):
    model, inputs = kinds.model(kind), kinds.batch(kind)
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=24)}
    dynamic = {name: {n: sizes[n] for n in range(tensor.ndim)} for name, tensor in inputs.items()}
    exported = torch.export.export(model, (), inputs, dynamic_shapes=dynamic)
    torch.export.save(exported, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for length in (8, 17, 6):
        inputs = {name: torch.cat([t, t]) for name, t in kinds.batch(kind, 1, length).items()}
        torch.testing.assert_close(program(**inputs).logits, model(**inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS[:2])
def test_compile(kind):
    model = kinds.model(kind, **{"load_balance": 0.1} if kind in kinds.LEARNED else {})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed, length in enumerate((8, 11)):
        inputs, gradients = kinds.batch(kind, seed, length, labels=True), []
        for run in (model, compiled):
            model.zero_grad()
            output = run(**inputs)
            output.loss.backward()
            gradients.append([output.loss, output.logits, *(p.grad.clone() for p in model.parameters())])
        torch.testing.assert_close(gradients[1], gradients[0])


def breaks_before_experts(model):
    for layer in moe_layers(model):
        layer.experts.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())


@pytest.mark.parametrize("kind", ["split-bert-hash", pytest.param("mpoe-gpt2-hash", marks=pytest.mark.slow)])
def test_each_layer_has_its_own_experts_after_a_graph_break(kind):
    model = kinds.model(kind)
    breaks_before_experts(model)
    compiled = torch.compile(model, backend="eager")
    for seed in (0, 1):
        inputs, results = kinds.batch(kind, seed, labels=True), []
        for run in (model, compiled):
            model.zero_grad()
            output = run(**inputs)
            output.loss.backward()
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            results.append([output.loss, output.logits, *gradients])
        torch.testing.assert_close(results[1], results[0])


def test_a_prepared_model_under_compile():
    model, inputs = prepare(kinds.model("split-bert-hash"), "int8"), kinds.batch("split-bert-hash")
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")(**inputs)
        torch.testing.assert_close(compiled.logits, model(**inputs).logits)
