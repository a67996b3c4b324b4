"""The options of the commands, each defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_TRAINING = "Training"
_TABLE = "A table of your own (--task custom)"

ModelName = Annotated[
    str, typer.Option("--model", help="A folder (also a training run's output) or a model's name on the Hub.")
]
TaskName = Annotated[
    str,
    typer.Option(
        "--task",
        help="cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli, squad, squad_v2, lm for running text and a language"
        " model, or custom for a table of your own.",
    ),
]
TaskNames = Annotated[
    list[str],
    typer.Option("--task", help="As for eval; several times for a model with a head for each, and --data TASK=FOLDER."),
]
TaskTemperature = Annotated[
    float,
    typer.Option(
        "--task-temperature",
        min=1.0,
        help="Of several tasks: 1 draws them in proportion to their data, more draws small ones more often.",
        rich_help_panel=_TRAINING,
    ),
]
OptionalTaskNames = Annotated[
    list[str] | None, typer.Option("--task", help="With --router hash-balance: whose data to count; task: the tasks.")
]
OptionalTaskName = Annotated[
    str | None, typer.Option("--task", help="As for finetune; read only where data is needed.")
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="A folder with train.tsv, dev.tsv and the like; a file; SPLIT=FILE, once for each split; or a dataset's"
        " name on the Hub. Without it, the task's own dataset on the Hub.",
    ),
]
OutputFolder = Annotated[Path, typer.Option("--output", help="The folder to write.")]
OutputFile = Annotated[Path, typer.Option("--output", help="The file to write.")]
OptionalOutputFile = Annotated[Path | None, typer.Option("--output", help="A JSON file to write the result to.")]
Seed = Annotated[int, typer.Option("--seed", help="Of everything random.")]

TextColumns = Annotated[
    list[str] | None,
    typer.Option("--text-column", help="A column of text; once or twice.", rich_help_panel=_TABLE),
]
LabelColumn = Annotated[
    str, typer.Option("--label-column", help="The column of labels or scores.", rich_help_panel=_TABLE)
]
Regression = Annotated[
    bool, typer.Option("--regression", help="The labels are scores, not classes.", rich_help_panel=_TABLE)
]

MaxLength = Annotated[
    int | None,
    typer.Option(
        "--max-length",
        min=8,
        help="Tokens of a text at most. Default: those that the model was trained with, else the task's preset.",
    ),
]
DocStride = Annotated[
    int | None,
    typer.Option(
        "--doc-stride",
        min=0,
        help="Tokens that neighbouring windows share. Default: as in training, else 128 for questions, 1 for running"
        " text.",
    ),
]
HoldOut = Annotated[
    str | None,
    typer.Option(
        "--hold-out",
        help="Make a validation split: a share of the training rows such as 0.1, of each class. Or a test split: halves"
        " (half of validation) or train-rows (1,000 training rows become validation, and validation the test split).",
    ),
]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help="Sequences at once.")]
Split = Annotated[str, typer.Option("--split", help="train, validation or test.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what --output holds.")]

RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="microbert, microbert-two-stage, microbert-lean, kd, finetune or a YAML file. Any value can be given"
        " as --KEY VALUE, or --STAGE.KEY VALUE for one stage.",
    ),
]
ExtraText = Annotated[
    Path | None,
    typer.Option("--extra-text", help="With --recipe: texts without labels, a table with the task's text columns."),
]

Epochs = Annotated[int | None, typer.Option("--epochs", min=1, rich_help_panel=_TRAINING)]
LearningRate = Annotated[float | None, typer.Option("--learning-rate", min=0.0, rich_help_panel=_TRAINING)]
Accumulation = Annotated[
    int, typer.Option("--accumulation", min=1, help="Batches per optimizer step.", rich_help_panel=_TRAINING)
]
WeightDecay = Annotated[float | None, typer.Option("--weight-decay", min=0.0, rich_help_panel=_TRAINING)]
RouterLearningRate = Annotated[
    float | None,
    typer.Option(
        "--router-learning-rate", min=0.0, help="Of learned routers. Default: as all others.", rich_help_panel=_TRAINING
    ),
]
WarmupRatio = Annotated[float, typer.Option("--warmup-ratio", min=0.0, max=1.0, rich_help_panel=_TRAINING)]
MixedPrecision = Annotated[str, typer.Option("--mixed-precision", help="no, fp16 or bf16.", rich_help_panel=_TRAINING)]
EvalSteps = Annotated[
    int | None,
    typer.Option("--eval-steps", min=1, help="Evaluate so often. Default: each epoch.", rich_help_panel=_TRAINING),
]
SaveSteps = Annotated[
    int, typer.Option("--save-steps", min=1, help="Write a checkpoint so often.", rich_help_panel=_TRAINING)
]
Patience = Annotated[
    int | None,
    typer.Option(
        "--patience", min=1, help="Stop after so many evaluations without a new best.", rich_help_panel=_TRAINING
    ),
]
MaxSteps = Annotated[
    int | None, typer.Option("--max-steps", min=1, help="Optimizer steps at most.", rich_help_panel=_TRAINING)
]
LabelSmoothing = Annotated[
    float,
    typer.Option(
        "--label-smoothing", min=0.0, max=0.99, help="For models that answer in text.", rich_help_panel=_TRAINING
    ),
]
GradientMask = Annotated[
    float,
    typer.Option(
        "--gradient-mask",
        min=0.0,
        max=1.0,
        help="MPOE: share of steps that leave the central tensors as they are.",
        rich_help_panel=_TRAINING,
    ),
]
SharedFold = Annotated[
    bool,
    typer.Option(
        "--shared-fold", help="MPOE: fold the experts' weights once per step, not per batch.", rich_help_panel=_TRAINING
    ),
]
Restart = Annotated[
    bool,
    typer.Option("--restart", help="Drop an unfinished run instead of going on with it.", rich_help_panel=_TRAINING),
]
