"""A converted model in any caller: threads, direct calls, errors in the middle, replicas, other ways of loading."""

import subprocess
import sys
import threading

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from moebert_kernels.convert import convert_in_place
from moebert_kernels.layers import MoEConfig, balance_losses, moe_layers
from moebert_kernels.nn.context import current
from tests.convert.families import make, make_inputs
from tests.convert.test_in_place import KINDS, assert_near, converted, hidden
from tests.helpers import ROOT


def two_batches(family):
    inputs = make_inputs(family)
    return inputs, {name: t.flip(1)[:, :-3] if t.ndim == 2 else t.flip(0) for name, t in inputs.items()}


def wrong_answers_of_two_threads(model, family, calls):
    """How many of `calls` in each thread differ from what the model gives alone."""
    wrong = []

    def call(batch, expected):
        for _ in range(calls):
            if not torch.allclose(hidden(model, batch), expected, atol=1e-5):
                wrong.append(1)

    pairs = [(batch, hidden(model, batch)) for batch in two_batches(family)]
    threads = [threading.Thread(target=call, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(wrong)


@pytest.mark.parametrize("kind", ["hash", "gate"])
def test_two_threads_with_batches_of_different_lengths(kind):
    assert wrong_answers_of_two_threads(converted("bert", kind), "bert", 20) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hash", "gate", "mpoe"])
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_two_threads_and_many_calls(family, kind):
    assert wrong_answers_of_two_threads(converted(family, kind), family, 200) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hash", "gate"])
def test_two_threads_with_a_compiled_model(kind):
    torch._dynamo.reset()
    model = torch.compile(converted("bert", kind), backend="aot_eager", dynamic=True)
    assert wrong_answers_of_two_threads(model, "bert", 200) == 0


@pytest.mark.parametrize("kind", ["hash", "gate"])
def test_every_way_to_call_it(kind):
    model = converted("bert", kind, AutoModelForSequenceClassification)
    inputs = make_inputs("bert")
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(model.forward(**inputs).logits, expected)  # sentence-transformers calls it so
        assert torch.equal(model(inputs["input_ids"], inputs["attention_mask"]).logits, expected)
        assert torch.equal(model(**inputs, return_dict=False)[0], expected)
        encoded = model.bert.forward(**inputs)
        assert torch.equal(model.classifier(encoded.pooler_output), expected)


def test_an_error_in_the_middle_leaves_nothing_behind():
    model, inputs = converted("bert"), make_inputs("bert")
    expected = hidden(model, inputs)

    def fail(*_):
        raise RuntimeError("in the middle")

    handle = model.encoder.layer[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        hidden(model, inputs)
    handle.remove()
    assert current().tokens is None
    assert torch.equal(hidden(model, inputs), expected)


def test_a_call_inside_a_call():
    """A forward of another converted model from within a layer does not disturb the outer one."""
    outer, inner = converted("bert"), converted("gpt2")
    inputs, other = two_batches("bert")
    expected = hidden(outer, inputs)
    outer.encoder.layer[0].register_forward_hook(lambda *_: (hidden(inner, other), None)[1])
    assert torch.equal(hidden(outer, inputs), expected)


def test_replicas_as_data_parallel_makes_them():
    """`replicate` copies modules' dictionaries and shares no list; here without a GPU."""
    model, inputs = converted("bert"), make_inputs("bert")
    expected = hidden(model, inputs)
    replicas = {}
    for module in model.modules():
        replicas[module] = module._replicate_for_data_parallel()
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
        for name, parameter in module._parameters.items():
            if parameter is not None:
                setattr(replica, name, parameter.detach())
        for name, buffer in module._buffers.items():
            replica._buffers[name] = buffer
    assert torch.equal(hidden(replicas[model], inputs), expected)


def test_balance_losses_are_collected_on_request():
    model = converted("bert", "gate", AutoModelForSequenceClassification)
    batch = make_inputs("bert") | {"labels": torch.tensor([0, 1])}
    with balance_losses() as losses:
        pure = model(**batch).loss
    assert [loss.shape for loss in losses] == [torch.Size([]), torch.Size([])]
    torch.testing.assert_close(model(**batch).loss, pure + 0.01 * sum(losses))


def test_loads_sharded_in_another_dtype_and_from_a_subfolder(tmp_path):
    model, inputs = converted("bert"), make_inputs("bert")
    model.save_pretrained(tmp_path / "sub", max_shard_size="20KB")
    assert len(list((tmp_path / "sub").glob("*.safetensors"))) > 1
    loaded = AutoModel.from_pretrained(tmp_path, subfolder="sub", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert moe_layers(loaded)[0].router.table.dtype == torch.uint8
    assert_near(hidden(loaded, inputs).float(), hidden(model, inputs), 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_new_process_loads_it_by_the_auto_class(kind, tmp_path):
    model, inputs = converted("bert", kind, AutoModelForSequenceClassification), make_inputs("bert")
    model.save_pretrained(tmp_path)
    torch.save(inputs, tmp_path / "inputs.pt")
    code = (
        "import sys, torch, moebert_kernels.convert\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        "folder = sys.argv[1]\n"
        "model = Auto.from_pretrained(folder)\n"
        "torch.save(model(**torch.load(folder + '/inputs.pt')).logits.detach(), folder + '/logits.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)
    with torch.no_grad():
        assert_near(torch.load(tmp_path / "logits.pt"), model(**inputs).logits)


@pytest.mark.filterwarnings("ignore:no importance scores given")
def test_what_is_not_a_feed_forward_stays_the_same_object():
    model = make("bert", AutoModelForSequenceClassification)
    embeddings, attention = model.bert.embeddings, model.bert.encoder.layer[0].attention
    norm = model.bert.encoder.layer[0].output.LayerNorm
    moe = convert_in_place(model, MoEConfig(norm="layer", expert_size=18, num_shared_neurons=8, router="gate-token"))
    assert moe is model
    assert moe.bert.embeddings is embeddings and moe.bert.encoder.layer[0].attention is attention
    assert moe.bert.encoder.layer[0].output.norm is norm
