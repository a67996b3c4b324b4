"""A task-routed MoE becomes a plain model: the same numbers, the same names, and nothing of this package in it."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from moebert_kernels import models
from moebert_kernels.convert import collapse, convert_to_moe, convert_to_task_moe
from moebert_kernels.errors import UserError
from tests.convert.models import CLASSES, D, L, dense_model, inputs

LABELS = {"mood": ["sad", "happy"], "score": [], "logic": ["yes", "no", "perhaps"]}


def trained(name, tasks, **options):
    """A MoE of random weights, with routers that are far from equal."""
    dense = dense_model(name, max_position_embeddings=20, classifier_dropout=0.3)
    options.setdefault("importance", torch.rand(L, D))
    moe = convert_to_task_moe(dense, tasks, router_noise=2.0, **options)
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
        {"preset": "paper"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_each_task_gives_the_same_logits(name, options):
    moe, batch = trained(name, LABELS, **options)
    for task, (task_name, names) in enumerate(LABELS.items()):
        plain = collapse(moe, task_name)
        assert type(plain).__module__.startswith("transformers.")
        assert plain.config.intermediate_size == moe.config.top_k * moe.config.expert_size
        assert [plain.config.id2label[i] for i in range(plain.config.num_labels)] == (names or ["LABEL_0"])
        wanted, got = moe(**batch, task_ids=task).logits, plain(**batch).logits
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(moe(**batch, task_ids=0).logits, moe(**batch, task_ids=2).logits[:, :2])


@pytest.mark.parametrize("name", [name for name in CLASSES if not name.startswith(("camembert", "xlm"))])
def test_every_head(name):
    moe, batch = trained(name, ["one", "two"])
    plain = collapse(moe, "two")
    assert type(plain).__name__ == CLASSES[name][1].__name__ and not plain.training
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
    moe, batch = trained("bert", LABELS)
    batch["attention_mask"].fill_(1)
    moe = moe.double()
    wanted = moe.moebert(**batch, task_ids=1, output_hidden_states=True).hidden_states
    got = collapse(moe, "score").bert(**batch, output_hidden_states=True).hidden_states
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_the_moe_is_not_changed_and_nothing_is_shared():
    moe, _ = trained("bert", LABELS)
    before = {key: tensor.clone() for key, tensor in moe.state_dict().items()}
    plain = collapse(moe, "mood")
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[key]) for key, tensor in moe.state_dict().items())


def test_dtype_and_mode_are_kept():
    moe, _ = trained("bert", LABELS)
    plain = collapse(moe.bfloat16().train(), "mood")
    assert plain.dtype == torch.bfloat16 and plain.training


@pytest.mark.slow
def test_loads_in_a_fresh_virtual_environment_without_this_package(tmp_path):
    """The environment sees the installed libraries by their folder, in which this package has no files of its own."""
    moe, batch = trained("bert", LABELS)
    collapse(moe, "logic").save_pretrained(tmp_path / "plain")
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
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    if done.returncode == 77:
        pytest.skip("this package is installed beside the libraries")
    assert done.returncode == 0, done.stderr


def test_refuses_by_name():
    moe, _ = trained("bert", LABELS)
    with pytest.raises(UserError, match="task: expected one of the model's tasks, mood, score, logic, got 'rte'"):
        collapse(moe, "rte")
    for router in ("hash-random", "gate-token", "gate-sentence"):
        by_token = convert_to_moe(dense_model("bert"), torch.rand(L, D), router=router, expert_size=12, shared=8)
        with pytest.raises(
            UserError, match=f"model: expected a MoEBERT with router='task', got router='{router}', by tok"
        ):
            collapse(by_token, "mood")
    with pytest.raises(
        UserError, match="model: expected a MoEBERT with router='task', got a BertModel, which is no MoE"
    ):
        collapse(dense_model("bert"), "mood")
    with pytest.raises(UserError, match="top_k: expected at most 1 with num_experts=4 and norm='expert', got 2"):
        models.MoEBertConfig(router="task", tasks=["mood"], norm="expert", top_k=2)
