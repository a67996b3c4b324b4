"""Exported language models in ONNX Runtime, with keys and values of earlier tokens, against the model."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from moebert_kernels.errors import UserError
from moebert_kernels.serve import quantise_onnx
from moebert_kernels.serve.forms import OnnxModel
from moebert_kernels.serve.onnx_decoder import PAST, PRESENT, CachedDecoder, example_of_decoder, keys_and_values
from tests.serve.test_onnx import needs_onnx, ragged, session_of
from tests.serve.test_prepare import made


def padded(generator, left):
    """`ragged`, padded on the left for every other batch, with the positions that generation gives."""
    batch = ragged(generator)
    if left:
        batch = {name: tensor.flip(1) for name, tensor in batch.items()}
    return batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def in_two_calls(session, batch, cut):
    """Logits of all tokens: of those before `cut`, and of the rest with the keys and values of the first call."""
    names = [entry.name for entry in session.get_outputs()]
    past = {
        entry.name: torch.zeros(len(batch["input_ids"]), entry.shape[1], 0, entry.shape[3]).numpy()
        for entry in session.get_inputs()
        if entry.name.startswith(PAST)
    }
    logits = []
    for begin, end in ((0, cut), (cut, batch["input_ids"].shape[1])):
        if begin == end:
            continue
        given = {name: tensor[:, begin:end].numpy() for name, tensor in batch.items()}
        given["attention_mask"] = batch["attention_mask"][:, :end].numpy()
        found = dict(zip(names, session.run(None, given | past), strict=True))
        past = {name: found[name.replace(PAST, PRESENT)] for name in past}
        logits.append(torch.from_numpy(found["logits"]))
    return torch.cat(logits, 1)


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize(
    "family, kind, sizes", [("gpt2", "hash", {"n_layer": 1}), ("llama", "gate", {"num_hidden_layers": 1})]
)
def test_fifty_ragged_batches(family, kind, sizes, tmp_path):
    model = made(family, kind, AutoModelForCausalLM, **sizes)
    session = session_of(model, tmp_path / "model.onnx")
    assert [entry.name for entry in session.get_inputs()][2:4] == ["position_ids", "past_key_values.0.key"]
    assert [entry.name for entry in session.get_outputs()][:3] == ["logits", "present.0.key", "present.0.value"]
    check_batches(model, session, 50, 2e-5)
    batch = {name: tensor for name, tensor in padded(seed(), left=False).items() if name != "position_ids"}
    with torch.no_grad():
        expected = model(**batch).logits
    found = OnnxModel(tmp_path / "model.onnx")(**batch)
    assert list(found) == ["logits"]
    assert (found.logits - expected)[batch["attention_mask"] != 0].abs().max() <= 1e-4
    if family == "gpt2":  # its Conv1D become products of integers too
        import onnx

        quantise_onnx(tmp_path / "model.onnx", tmp_path / "model8.onnx")
        check_batches(model, OnnxModel(tmp_path / "model8.onnx").session, 5, 0.05)
        operators = [node.op_type for node in onnx.load(tmp_path / "model8.onnx").graph.node]
        assert operators.count("MatMulInteger") == 2 + 2 * model.config.quantization_config.num_experts + 1


def check_batches(model, session, batches, close):
    generator = seed()
    for number in range(batches):
        batch = padded(generator, left=bool(number % 2))
        with torch.no_grad():
            expected = model(**batch).logits
        cut = int(torch.randint(0, batch["input_ids"].shape[1], (), generator=generator))
        got, real = in_two_calls(session, batch, cut), batch["attention_mask"] != 0
        assert (got - expected)[real].abs().max() <= close * max(1.0, float(expected.abs().max())), (number, cut)


def seed():
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("family, sizes", [("gpt2", {}), ("llama", {}), ("mistral", {"sliding_window": 3})])
def test_what_is_exported(family, sizes):
    """The module that is traced, in torch: tokens behind others, with their keys and values."""
    model = made(family, "hash", AutoModelForCausalLM, **sizes)
    batch = padded(seed(), left=True)
    wrapped, cache = CachedDecoder(model, tuple(batch)), DynamicCache()
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        model(**batch, past_key_values=cache, use_cache=True)
        first = wrapped(*(tensor[:, :4] for tensor in batch.values()), *(x[:, :, :0] for x in keys_and_values(cache)))
        rest = {name: tensor[:, 4:] for name, tensor in batch.items()} | {"attention_mask": batch["attention_mask"]}
        second = wrapped(*rest.values(), *first[1:])
    real = batch["attention_mask"] != 0
    assert (torch.cat([first[0], second[0]], 1) - expected)[real].abs().max() < 1e-5
    for got, want in zip(second[1:], keys_and_values(cache), strict=True):
        assert (got - want).abs().max() < 1e-5


def test_a_decoder_that_keeps_something_else_is_refused():
    inputs = {name: torch.ones(2, 6, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    model = made("gpt2", "dense", AutoModelForCausalLM)
    forward = model.forward

    def without_cache(past_key_values=None, use_cache=None, **given):
        return forward(**given, use_cache=False)

    def of_states(input_ids, attention_mask):
        raise AssertionError("it has no keys and values")

    for other in (without_cache, of_states):
        model.forward = other
        with pytest.raises(
            UserError, match="expected a decoder that keeps keys and values of earlier tokens, got GPT2"
        ):
            example_of_decoder(model, inputs)
