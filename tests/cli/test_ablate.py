"""`moebert ablate` on two tiny tasks: every arm, what is written, and that nothing is done twice."""

import json
import re

import pytest
import torch
from transformers import BertModel

from tests.cli.tiny import BAD, GOOD, done, refused, write_base

SHORT = ("--per_device_train_batch_size", "8", "--learning_rate", "1e-2", "--max-length", "12")


def write_task(folder, header, row, rows=24):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(("train", "dev", "test_labeled")):
        generator = torch.Generator().manual_seed(number)
        lines = [header]
        for _ in range(rows):
            label, word = (int(torch.randint(0, n, (1,), generator=generator)) for n in (2, 4))
            lines.append(row((BAD, GOOD)[label][word], label))
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def setting(base, tmp_path_factory):
    """Data of SST-2's and STS-B's form, a task-routed teacher of both, dense ones, and a small encoder."""
    root = tmp_path_factory.mktemp("ablate")
    write_task(root / "sst2", "sentence\tlabel", lambda word, label: f"the film was {word}\t{label}")
    write_task(
        root / "stsb",
        "sentence1\tsentence2\tscore",
        lambda word, label: f"a {word} film\tthe film was {GOOD[0]}\t{5.0 * label + 0.1 * len(word)}",
    )
    tasks = ("--task", "sst2", "--task", "stsb")
    data = ("--data", f"sst2={root / 'sst2'}", "--data", f"stsb={root / 'stsb'}")
    done("convert", "--router", "task", "--model", base, *tasks, "--experts", "copy", "--output", root / "moe")
    done(
        "finetune",
        "--model",
        root / "moe",
        *tasks,
        *data,
        "--output",
        root / "teacher",
        *SHORT,
        "--num_train_epochs",
        "2",
    )
    for task in ("sst2", "stsb"):
        done("finetune", "--model", base, "--task", task, "--data", root / task, "--output", root / f"dense-{task}",
             *SHORT, "--num_train_epochs", "1")  # fmt: skip
    write_base(root / "small", hidden_size=16, num_hidden_layers=1)
    return root, (*tasks, *data)


def words(setting, output, *more):
    root, common = setting
    return ("ablate", "--model", root / "small", "--teacher", root / "teacher", *common, "--output", output,
            "--num_train_epochs", "1", *SHORT, *more)  # fmt: skip


@pytest.mark.slow
def test_arms_of_two_tasks(setting, tmp_path, monkeypatch):
    root, _ = setting
    monkeypatch.setattr("moebert_kernels.study.ablation.ROUNDS", 10)
    dense = ("--dense-teacher", f"sst2={root / 'dense-sst2'}", "--dense-teacher", f"stsb={root / 'dense-stsb'}")
    hot = ("--seeds", "1", "--objective_options.temperature", "3")
    text = done(*words(setting, tmp_path, *dense, *hot))
    labels = ("full", "-FAL", "-GAN", "-MoE", "-hidden", "KD only")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[1:]] == ["teacher of full", "teacher of -MoE", *labels]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["examples"] == {"sst2": 24, "stsb": 24} and report["seeds"] == [0]
    assert (tmp_path / "table.md").read_text() in text
    assert (tmp_path / "chart.png").stat().st_size > 1000
    results = {file: file.stat().st_mtime_ns for file in (tmp_path / "results").iterdir()}
    assert len(results) == 2 * (6 + 2)
    (tmp_path / "results/sst2-kd-0.json").unlink()  # trained, but not judged when it was interrupted
    assert done(*words(setting, tmp_path, *dense, *hot)).count("KD only\n") == 1
    again = {file: file.stat().st_mtime_ns for file in (tmp_path / "results").iterdir()}
    assert {file.name for file in again if again[file] != results[file]} == {"sst2-kd-0.json"}
    line = refused(*words(setting, tmp_path, *dense, "--seeds", "1"))
    other = "student.objective_options.temperature (it was 3 and is 2.0 now)"
    assert f"got {tmp_path} with results of other {other} (use another" in line

    same = words(setting, tmp_path, *dense, *hot)
    table, rows = root / "sst2/train.tsv", (root / "sst2/train.tsv").read_text()
    table.write_text(rows.replace("\t1", "\t0", 1))
    assert "with results of other sst2 training rows (use another" in refused(*same)
    table.write_text(rows)
    model = BertModel.from_pretrained(root / "small")
    torch.nn.init.constant_(model.pooler.dense.bias, 0.5)
    model.save_pretrained(root / "small")
    assert f"with results of other files of {root / 'small'} (use" in refused(*same)
    write_base(root / "small", hidden_size=16, num_hidden_layers=1)
    assert done(*same).count("KD only\n") == 0


def test_refusals(setting, tmp_path):
    root, _ = setting
    for more, message in (
        (("--arm", "full", "--arm", "no-moe"), "dense-teacher: expected one for the arm no-moe, got none"),
        (("--arm", "fal"), "arm: expected some of full, no-fal, .*, each once, got fal"),
        (("--arm", "kd", "--arm", "kd"), "arm: expected .*, each once, got kd, kd"),
        (
            ("--config", "microbert-lean", "--arm", "no-gan"),
            "arm: expected arms that differ for the config microbert-l",
        ),
        (("--dense-teacher", f"sst2={root}"), "dense-teacher: expected one for all tasks, .*, got none for stsb"),
        (("--task", "squad"), "task: expected tasks of GLUE"),
        (("--config", "bert"), "config: expected one of finetune, kd"),
        (("--seed", "5"), "seed: expected none, as the runs of an arm have --seeds' from 0 on, got 5"),
        (("--temprature", "3"), "the nearest is 'objective_options.temperature'"),
    ):
        assert re.search(message, refused(*words(setting, tmp_path / "o", *more)))
