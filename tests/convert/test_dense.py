"""Dense models from others: what experts merge into, with the same numbers and names, and narrower students."""

import copy
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from moebert_kernels.convert import convert_to_moe, dense_student, merge
from moebert_kernels.convert.sites import common_width, find_sites
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig
from tests.convert.families import make
from tests.convert.models import CLASSES, D, L, dense_model, inputs, moe_model
from tests.convert.test_tasks import LABELS, task_moe
from tests.golden_arrays import assert_golden


def trained(name, tasks, **options):
    """A MoE of random weights, with routers that are far from equal."""
    dense = dense_model(name, max_position_embeddings=20, classifier_dropout=0.3)
    options.setdefault("importance", torch.rand(L, D))
    moe = task_moe(dense, tasks, spread=2.0, **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return moe, inputs(pad_token_id=dense.config.pad_token_id)


def outputs(model, batch, **options):
    with torch.no_grad():
        out = model(**batch, **options)
    return {
        name: out[name]
        for name in ("logits", "start_logits", "end_logits", "pooler_output")
        if out.get(name) is not None
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 1},
        {"top_k": 4},
        {"norm": "expert"},
        {"experts": "copy", "num_experts": 3},
        {"experts": "mpo"},
        {"route_padding": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["bert-cls", "roberta-cls"])
def test_each_task_gives_the_same_logits(name, options):
    moe, batch = trained(name, LABELS, **options)
    for task, (task_name, names) in enumerate(LABELS.items()):
        plain = merge(moe, task_name)
        assert type(plain) is CLASSES[name][1] and not hasattr(plain.config, "quantization_config")
        width = D if options.get("experts", "split") != "split" else D // 4
        assert plain.config.intermediate_size == moe.config.quantization_config.top_k * width
        assert [plain.config.id2label[i] for i in range(plain.config.num_labels)] == (names or ["LABEL_0"])
        wanted, got = moe(**batch, task_ids=task).logits, plain(**batch).logits
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(moe(**batch, task_ids=0).logits, moe(**batch, task_ids=2).logits[:, :2])


@pytest.mark.parametrize("name", [name for name in CLASSES if not name.startswith(("camembert", "xlm"))])
def test_every_head(name):
    moe, batch = trained(name, ["one", "two"])
    plain = merge(moe, "two")
    assert type(plain) is CLASSES[name][1] and not plain.training
    wanted, got = outputs(moe, batch, task_ids=1), outputs(plain, batch)
    assert wanted.keys() == got.keys()
    for key, tensor in wanted.items():
        real = batch["attention_mask"] != 0 if tensor.shape[:2] == batch["attention_mask"].shape else slice(None)
        torch.testing.assert_close(got[key][real], tensor[real], rtol=0, atol=1e-5)
    for field in (
        "hidden_act",
        "max_position_embeddings",
        "vocab_size",
        "pad_token_id",
        "id2label",
        "classifier_dropout",
    ):
        assert getattr(plain.config, field) == getattr(moe.config, field), field


def test_all_hidden_states_are_the_same_in_float64():
    moe, batch = trained("bert-cls", LABELS)
    batch["attention_mask"].fill_(1)
    moe = moe.double()
    wanted = moe.bert(**batch, task_ids=1, output_hidden_states=True).hidden_states
    got = merge(moe, "score").bert(**batch, output_hidden_states=True).hidden_states
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_the_moe_is_not_changed_and_nothing_is_shared():
    moe, _ = trained("bert-cls", LABELS)
    before = {key: tensor.clone() for key, tensor in moe.state_dict().items()}
    plain = merge(moe, "mood")
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[key]) for key, tensor in moe.state_dict().items())


def test_dtype_and_mode_are_kept():
    moe, _ = trained("bert-cls", LABELS)
    plain = merge(moe.bfloat16().train(), "mood")
    assert plain.dtype == torch.bfloat16 and plain.training


@pytest.mark.parametrize("family", ["llama", "modernbert"])
def test_frequencies_of_positions_stay_as_they_are(family):
    model = make(family).bfloat16()
    for name, buffer in model.named_buffers():
        buffer.data = dict(make(family).named_buffers())[name]  # as from_pretrained leaves them
    student = dense_student(model, torch.rand(2, common_width(find_sites(model))), 8)
    wanted = {name: buffer for name, buffer in model.named_buffers() if "inv_freq" in name}
    got = dict(student.named_buffers())
    assert wanted and all(
        torch.equal(got[name], buffer) and got[name].dtype == torch.float32 for name, buffer in wanted.items()
    )
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}


@pytest.mark.slow
def test_loads_in_a_fresh_virtual_environment_without_this_package(tmp_path):
    """The environment sees the installed libraries by their folder, in which this package has no files of its own."""
    moe, batch = trained("bert-cls", LABELS)
    merge(moe, "logic").save_pretrained(tmp_path / "plain")
    wanted = moe(**batch, task_ids=2).logits.detach()
    save_file(batch | {"logits": wanted}, tmp_path / "wanted.safetensors")
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    libraries = {str(Path(module.__file__).parents[1]) for module in (torch, transformers)}
    packages = sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")})
    Path(packages, "libraries.pth").write_text("\n".join(libraries))
    program = (
        "import importlib.util, sys\n"
        "if importlib.util.find_spec('moebert_kernels'): sys.exit(77)\n"
        "import torch; from safetensors.torch import load_file\n"
        "from transformers import AutoModelForSequenceClassification\n"
        "batch = load_file('wanted.safetensors'); wanted = batch.pop('logits')\n"
        "model = AutoModelForSequenceClassification.from_pretrained('plain')\n"
        "assert type(model).__name__ == 'BertForSequenceClassification', type(model)\n"
        "assert list(model.config.id2label.values()) == ['yes', 'no', 'perhaps']\n"
        "torch.testing.assert_close(model(**batch).logits, wanted, rtol=0, atol=1e-5)\n"
        "assert not any(name.startswith('moebert') for name in sys.modules)\n"
    )
    command = [str(python), "-I", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("this package is installed beside the libraries")
    assert done.returncode == 0, done.stderr


def test_one_expert_is_a_dense_layer_whatever_routes():
    for router in ("hash-random", "gate-token"):
        moe = moe_model(num_experts=1, expert_size=20, num_shared_neurons=20, router=router)
        plain, batch = merge(moe), inputs()
        if router == "gate-token":  # the softmax over one expert is 1
            assert plain.config.intermediate_size == 20
        assert_golden(outputs(plain, batch)["logits"], outputs(moe, batch)["logits"], 1e-6)


def test_refuses_by_name():
    moe, _ = trained("bert-cls", LABELS)
    with pytest.raises(UserError, match="task: expected one of the model's tasks, mood, score, logic, got 'rte'"):
        merge(moe, "rte")
    with pytest.raises(UserError, match="task: expected one of the model's tasks, mood, score, logic, got none"):
        merge(moe)
    for router in ("hash-random", "gate-token", "gate-sentence"):
        with pytest.raises(
            UserError, match=f"model: expected experts that a task chooses, or one, got 4 of router='{router}'"
        ):
            merge(moe_model("bert", router=router))
        with pytest.raises(UserError, match=rf"task: expected one of the model's tasks, none \(router='{router}'\)"):
            merge(moe_model("bert", router=router), "mood")
    with pytest.raises(UserError, match="model: expected one with experts, got a BertModel without"):
        merge(dense_model("bert"), "mood")


def test_dense_student_keeps_the_top_neurons():
    dense, importance = dense_model("bert-cls"), torch.rand(L, D)
    before = {key: tensor.clone() for key, tensor in dense.state_dict().items()}
    student = dense_student(dense, importance, 20)
    assert type(student) is type(dense)
    assert student.config.intermediate_size == 20
    assert student.config.id2label == dense.config.id2label
    assert dense.config.intermediate_size == D
    kept = importance[1].argsort(descending=True)[:20]
    old, new = dense.bert.encoder.layer[1], student.bert.encoder.layer[1]
    assert torch.equal(new.intermediate.dense.weight, old.intermediate.dense.weight[kept])
    assert torch.equal(new.intermediate.dense.bias, old.intermediate.dense.bias[kept])
    assert torch.equal(new.output.dense.weight, old.output.dense.weight[:, kept])
    whole = dense_student(dense, importance, D)
    batch = inputs()
    assert_golden(outputs(whole, batch)["logits"], outputs(dense, batch)["logits"], 1e-6)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[key]) for key, tensor in dense.state_dict().items())


def test_dense_student_without_sizes_or_scores():
    dense = dense_model("bert-cls").bfloat16().train()
    with pytest.warns(UserWarning, match="neurons are ranked at random"):
        student = dense_student(dense, None)
    assert student.config.intermediate_size == D // 4 and student.training and student.dtype == torch.bfloat16
    bare = CLASSES["bert"][1](dense.config, add_pooling_layer=False)
    assert dense_student(bare, torch.rand(L, D), 8).pooler is None


def test_dense_student_equals_one_expert_with_those_neurons():
    dense, importance = dense_model("roberta-cls"), torch.rand(L, D)
    config = MoEConfig(num_experts=1, expert_size=20, num_shared_neurons=20)
    moe = convert_to_moe(copy.deepcopy(dense), config, importance=importance)
    batch = inputs(pad_token_id=1)
    student = dense_student(dense, importance, 20)
    assert_golden(outputs(student, batch)["logits"], outputs(moe, batch)["logits"], 1e-6)
    merged = merge(moe).state_dict()
    assert all(torch.equal(tensor, merged[key]) for key, tensor in student.state_dict().items())


@pytest.mark.parametrize("width", [0, 49])
def test_dense_student_refuses_other_widths(width):
    with pytest.raises(UserError, match=f"width: expected 1 to the dense layer's 48 neurons, got {width}"):
        dense_student(dense_model("bert-cls"), torch.rand(L, D), width)


def test_dense_student_refuses_what_is_converted():
    with pytest.raises(UserError, match="model: expected a dense model, got BertForSequenceClassification with exp"):
        dense_student(moe_model(), torch.rand(L, D), 8)


def test_layers_that_were_not_converted_keep_their_weights():
    some = {"num_experts": 1, "router": "gate-token", "target_modules": ["layer.0.output"]}
    moe = moe_model(experts="copy", **some)
    plain, batch = merge(moe), inputs()
    assert_golden(outputs(plain, batch)["logits"], outputs(moe, batch)["logits"], 1e-6)
    config = MoEConfig(expert_size=8, num_shared_neurons=0, **some)
    narrow = convert_to_moe(dense_model("bert-cls"), config, importance=torch.rand(1, D))
    with pytest.raises(UserError, match="model: expected the weights of a BertForSequenceClassification, got others"):
        merge(narrow)
