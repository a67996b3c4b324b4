"""Two whole models of the original code, imported: one training step's loss, hidden states, logits and gradients."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from moebert_kernels.convert import convert_to_moe, from_original
from moebert_kernels.distill.objectives import LayerwiseObjective
from moebert_kernels.layers import MoEConfig, moe_layers
from moebert_kernels.nn import GateRouter
from tests.golden_arrays import assert_golden, golden

CONFIG = dict(
    vocab_size=60, hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=20, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
CASES = {"cls_hash": "hash-random", "cls_gatetoken": "gate-token"}
DISTILL, BALANCE = 2.0, 0.1


def imported(case):
    router = CASES[case]
    student = golden(f"f_model_{case}", "student.")
    tables = golden(f"f_model_{case}").get("hash_lists") if router == "hash-random" else None
    options = {"load_balance": BALANCE} if router == "gate-token" else {}
    return from_original(
        student, BertConfig(**CONFIG), hash_tables=tables, router=router, route_padding=True, expert_dropout=0.0,
        **options,
    )  # fmt: skip


def teacher(case):
    model = BertForSequenceClassification(BertConfig(**CONFIG))
    model.load_state_dict(golden(f"f_model_{case}", "teacher."))
    return model.eval()


def batch_of(arrays):
    names = {"input_ids": "ids", "attention_mask": "mask", "token_type_ids": "type_ids", "labels": "labels"}
    return {name: arrays[key] for name, key in names.items()}


def original_gradients(model):
    """Gradients of an imported model under the original's key names."""
    gradients = {}
    names = {"w1": "fc1.weight", "b1": "fc1.bias", "w2": "fc2.weight", "b2": "fc2.bias"}
    names |= {"norm_weight": "LayerNorm.weight", "norm_bias": "LayerNorm.bias"}
    for key, parameter in model.named_parameters():
        key = key.replace(".output.experts.", ".experts.").replace("output.router.gate", "experts.gate")
        layer, _, name = key.rpartition(".")
        if name in names:
            for e, gradient in enumerate(parameter.grad):
                gradients[f"{layer}.experts.{e}.{names[name]}"] = gradient
        else:
            gradients[key] = parameter.grad
    return gradients


@pytest.mark.parametrize("case", CASES)
def test_training_step_equals_the_original(case):
    arrays = golden(f"f_model_{case}")
    model, batch = imported(case).train(), batch_of(arrays)
    outputs = model(**batch, output_hidden_states=True)
    with torch.no_grad():
        teacher_outputs = teacher(case)(**batch, output_hidden_states=True)
    terms = LayerwiseObjective("classification", preset="paper")(outputs, teacher_outputs, batch)
    loss = outputs.loss + DISTILL * (terms["hidden"] + terms["prediction"])
    loss.backward()

    for n, state in enumerate(outputs.hidden_states):
        assert_golden(state, arrays["hidden_states"][n], name=f"hidden_states[{n}]")
    assert_golden(outputs.logits, arrays["logits"], name="logits")
    assert_golden(loss.view(1), arrays["loss_total"], name="loss_total")
    gradients = original_gradients(model)
    wanted = golden(f"f_model_{case}", "grad.")
    norms = golden(f"f_model_{case}", "gradnorm.")
    assert gradients.keys() == (wanted or norms).keys()
    for key, gradient in (wanted or norms).items():
        got = gradients[key] if wanted else gradients[key].norm().view(1)
        if key.endswith("attention.self.key.bias"):
            # a constant added to all keys cancels in the softmax: the exact gradient is 0, the golden one is rounding
            assert max(got.abs().max(), gradient.abs().max()) < 1e-6 * arrays["loss_total"]
        else:
            assert_golden(got, gradient, name=key)


@pytest.mark.parametrize("case", CASES)
def test_eval_loss_equals_the_original(case):
    arrays = golden(f"f_model_{case}")
    with torch.no_grad():
        outputs = imported(case)(**batch_of(arrays))
    assert_golden(outputs.loss.view(1), arrays["loss_eval"], name="loss_eval")


@pytest.mark.parametrize("case", CASES)
def test_padding_skipped_gives_the_same_logits(case):
    """Attention masks padding, so what the experts make of it reaches no real token."""
    arrays = golden(f"f_model_{case}")
    batch = batch_of(arrays) | {"labels": None}
    model = imported(case)
    with torch.no_grad():
        routed = model(**batch).logits
        config = model.config.quantization_config
        config.route_padding = False
        for layer in moe_layers(model):
            if isinstance(layer.router, GateRouter):
                layer.router.route_padding = False
        assert_golden(model(**batch).logits, routed, 1e-6)


def test_the_students_start_is_the_converted_teacher():
    """The golden student is the converted teacher plus 0.05 noise: near our conversion, far from another split."""
    arrays = golden("f_model_cls_hash")
    student = imported("cls_hash")
    E, F, _ = moe_layers(student)[0].experts.w1.shape
    differences = []
    for shared in range(F + 1):
        config = MoEConfig(num_experts=E, expert_size=F, num_shared_neurons=shared)
        ours = convert_to_moe(teacher("cls_hash"), config, importance=arrays["importance"], tables=arrays["hash_lists"])
        pairs = zip(moe_layers(ours), moe_layers(student), strict=True)
        differences.append(sum((a.experts.w1 - b.experts.w1).std().item() for a, b in pairs) / 2)
    assert min(differences) < 0.06
    assert sum(difference < 0.06 for difference in differences) == 1
