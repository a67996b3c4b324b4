"""The options that commands share, and what stands at the end of their help; other options are in their docstrings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from moebert_kernels.errors import UserError

_TABLE = "A table of your own (--task custom)"
_TASK = (
    "cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte or wnli of GLUE; squad or squad_v2; lm for running text and a"
    " language model; or custom for a table of your own"
)
_YAML = (
    "finetune or a YAML file of training arguments, which the command line overrides; --STAGE.NAME VALUE holds for one"
    " stage, --loss_weights.TERM VALUE for one term."
)
_CONFIG = f"microbert, microbert-two-stage, microbert-lean, kd, {_YAML}"
_OTHERS = "others"  # STS-B, WNLI and tables of one's own


@cache
def _presets() -> dict[str, dict[str, Any]]:
    """Task -> training arguments, `max_length` and `distill_weight`."""
    # the folder's package is not imported: a help text would wait for transformers
    return yaml.safe_load((files("moebert_kernels") / "distill/presets.yaml").read_text(encoding="utf-8"))


def preset_for(task: str) -> dict[str, Any]:
    """The settings of a task; of one without any, those of the others."""
    return dict(_presets().get(task) or _presets()[_OTHERS])


def defaults_by_task() -> str:
    """The end of the help of commands that train."""
    rows = []
    for task, values in _presets().items():
        words = " ".join(
            f"--{'max-length' if name == 'max_length' else name} {value}"
            for name, value in values.items() if name != "distill_weight"
        )  # fmt: skip
        name = "custom, stsb, wnli" if task == _OTHERS else task
        rows.append(f"{name}: {words} (distillation terms {values['distill_weight']})")
    return "\n\n".join(
        (
            "Defaults by task (the published ones where MoEBERT's authors give any):", *rows,
            "Several tasks together: as custom, but each with its own --max-length. With --gradient_accumulation_steps"
            " N a batch is one Nth of what is listed. With --config all defaults are the file's. All training"
            " arguments: https://huggingface.co/docs/transformers/main_classes/trainer, and docs/guide/trainer.md.",
        )
    )  # fmt: skip


# at the end of each command's help
EXAMPLES = {
    "doctor": "moebert doctor --json",
    "finetune": "moebert finetune --model bert-base-uncased --task mrpc --output teacher --learning_rate 3e-5",
    "importance": "moebert importance --model teacher --task mrpc --output importance.safetensors",
    "convert": "moebert convert --model teacher --method chosen --task custom --data texts.csv --output moe",
    "distill": "moebert distill --model moe --teacher teacher --task mrpc --output student --num_train_epochs 5",
    "ablate": "moebert ablate --model small --teacher teacher --task mrpc --seeds 3 --output ablation",
    "merge": "moebert merge --model routed --task mrpc --output mrpc-teacher",
    "student": "moebert student --model teacher --layers 3 --output small",
    "quantize": "moebert quantize --model student --data texts.txt --output student-int8",
    "export": "moebert export --model student --output student-onnx",
    "eval": "moebert eval --model student --task mrpc",
    "bench": "moebert bench --model student --against teacher --batch-size 1 --batch-size 32",
    "demo": "moebert demo --quick",
}


def given(options: Any, *but: str) -> dict[str, Any]:
    """The fields of a dataclass of options that have another value than their default, `but` for these."""
    pairs = ((field, getattr(options, field.name)) for field in fields(options) if field.name not in but)
    return {field.name: value for field, value in pairs if value != field.default}


def check_unused(where: str, unused: bool, options: Mapping[str, Any]) -> None:
    """Raise UserError for the first of these options that is given and is not None, where they are `unused`."""
    for name, value in options.items():
        if unused and value is not None:
            got = str(value) if isinstance(value, Path) else value
            raise UserError(f"{name.replace('_', '-')}: it is used only with {where}; leave it out (got {got!r})")


def _path(text: str) -> Path:
    """A path that somebody typed; an empty one would be the current folder."""
    if not text.strip():
        raise typer.BadParameter("expected a path, got an empty one")
    return Path(text)


def _file(name: str, text: str) -> Any:
    return typer.Option(parser=_path, metavar=name, help=text)


Number = Annotated[int, typer.Option(min=1)]
AtLeastOne = Annotated[int | None, typer.Option(min=1)]

ModelName = Annotated[str, typer.Option(help="A folder (also a training run's output) or a model's name on the Hub.")]
TaskName = Annotated[str, typer.Option(help=f"{_TASK}.")]
TaskNames = Annotated[
    list[str],
    typer.Option(
        help=f"{_TASK}. Several times, for tasks of GLUE, with a model that has a head for each (moebert convert"
        " --router task), and then --data TASK=FOLDER."
    ),
]
OptionalTaskName = Annotated[
    str | None,
    typer.Option(help=f"Take the batches of its data. Without it they are of random tokens, of any model. {_TASK}."),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="A folder with train.tsv, dev.tsv and the like; a file; SPLIT=FILE, once for each split (train, validation"
        " or dev, test); or a dataset's name on the Hub. Without it, the task's own dataset on the Hub."
    ),
]
OutputFolder = Annotated[Path, _file("FOLDER", "The folder to write: a new one, or an earlier call's.")]
OutputFile = Annotated[Path, _file("FILE", "The file to write.")]
OptionalOutputFile = Annotated[
    Path | None, _file("FILE", "A JSON file to write the result to. Without it, it is printed alone.")
]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn at random.")]

TextColumns = Annotated[
    list[str] | None, typer.Option(help="A column of text; once or twice. Default: text.", rich_help_panel=_TABLE)
]
LabelColumn = Annotated[str, typer.Option(help="The column of labels or scores.", rich_help_panel=_TABLE)]
Regression = Annotated[
    bool, typer.Option("--regression", help="The labels are scores, not classes.", rich_help_panel=_TABLE)
]

MaxLength = Annotated[
    int | None,
    typer.Option(
        min=8,
        help="Tokens of a text at most. Default: as in the model's training, else by task (moebert finetune --help"
        " lists them), 128 for custom, as far as the model reaches.",
    ),
]
DocStride = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Tokens that neighbouring windows share. Default: as in the model's training, else 128 for questions, 1"
        " for running text.",
    ),
]
HoldOut = Annotated[
    str | None,
    typer.Option(
        help="Make a validation split: a share of the training rows such as 0.1, of each class. Or a test split: halves"
        " (half of validation) or train-rows (1,000 training rows become validation, and validation the test split)."
        " Default: none is made."
    ),
]
EvaluationBatchSize = Annotated[
    int | None, typer.Option(min=1, help="Sequences at once. Default: 64, with --task lm 16.")
]
Split = Annotated[str, typer.Option(help="train, validation or test.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what an earlier call left in --output.")]

FinetuneConfig = Annotated[str | None, typer.Option(help=f"{_YAML} Default: by task, see below.")]
Config = Annotated[
    str | None,
    typer.Option(help=f"{_CONFIG} Default: by task, see below, and the teacher is followed layer by layer."),
]
AblationConfig = Annotated[str, typer.Option(help=_CONFIG)]
