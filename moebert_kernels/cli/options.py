"""The options of the commands, each defined once. Every help text says what holds where the option is not given."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_TRAINING = "Training"
_TABLE = "A table of your own (--task custom)"
_TASK = (
    "cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte or wnli of GLUE; squad or squad_v2; lm for running text and a"
    " language model; or custom for a table of your own"
)
_BY_TASK = "Default: by task, see below"
_RECIPES = (
    "microbert, microbert-two-stage, microbert-lean, kd, finetune or a YAML file. Any value can be given as --KEY"
    " VALUE, or --STAGE.KEY VALUE for one stage."
)

# at the end of the help of commands that train; a test compares it with distill/presets.py
DEFAULTS_BY_TASK = "\n\n".join(
    (
        "Defaults by task (the published ones where MoEBERT's authors give any):",
        *(
            f"{tasks}: --learning-rate {rate} --batch-size {batch} --epochs {epochs} --weight-decay {decay}"
            f" --max-length {length} (--distill-weight {weight})"
            for tasks, rate, batch, epochs, decay, length, weight in (
                ("custom, stsb, wnli", "3e-05", 32, 3, "0.0", 128, "1.0"),
                ("cola", "2e-05", 8, 10, "0.0", 512, "3.0"),
                ("sst2", "2e-05", 16, 5, "0.0", 512, "1.0"),
                ("mrpc", "3e-05", 8, 5, "0.0", 512, "2.0"),
                ("qqp", "3e-05", 64, 5, "0.0", 128, "1.0"),
                ("mnli", "5e-05", 64, 5, "0.0", 128, "5.0"),
                ("qnli", "2e-05", 32, 5, "0.0", 512, "2.0"),
                ("rte", "1e-05", 8, 10, "0.01", 512, "1.0"),
                ("squad", "3e-05", 32, 5, "0.01", 384, "2.0"),
                ("squad_v2", "3e-05", 16, 4, "0.1", 384, "1.0"),
                ("lm", "5e-05", 8, 3, "0.01", 1024, "1.0"),
            )
        ),
        "Several tasks together: as custom, but each with its own --max-length. With --accumulation N a batch is one"
        " Nth of what is listed. With --recipe all defaults are the recipe's.",
    )
)


def _path(text: str) -> Path:
    """A path that somebody typed; an empty one would be the current folder."""
    if not text.strip():
        raise typer.BadParameter("expected a path, got an empty one")
    return Path(text)


ModelName = Annotated[
    str, typer.Option("--model", help="A folder (also a training run's output) or a model's name on the Hub.")
]
TaskName = Annotated[str, typer.Option("--task", help=f"{_TASK}.")]
TaskNames = Annotated[
    list[str],
    typer.Option(
        "--task",
        help=f"{_TASK}. Several times, for tasks of GLUE, with a model that has a head for each (moebert convert"
        " --router task), and then --data TASK=FOLDER.",
    ),
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
    list[str] | None,
    typer.Option(
        "--task",
        help="With --router hash-balance: whose data to count. With --router task: the tasks. Without those routers,"
        f" none. {_TASK}.",
    ),
]
OptionalTaskName = Annotated[
    str | None,
    typer.Option(
        "--task", help=f"Take the batches of its data. Without it they are of random tokens, of any model. {_TASK}."
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="A folder with train.tsv, dev.tsv and the like; a file; SPLIT=FILE, once for each split (train, validation"
        " or dev, test); or a dataset's name on the Hub. Without it, the task's own dataset on the Hub.",
    ),
]
OutputFolder = Annotated[
    Path,
    typer.Option(
        "--output", parser=_path, metavar="FOLDER", help="The folder to write: a new one, or an earlier call's."
    ),
]
OutputFile = Annotated[Path, typer.Option("--output", parser=_path, metavar="FILE", help="The file to write.")]
OptionalOutputFile = Annotated[
    Path | None,
    typer.Option(
        "--output",
        parser=_path,
        metavar="FILE",
        help="A JSON file to write the result to. Without it, it is printed alone.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn at random.")]

TextColumns = Annotated[
    list[str] | None,
    typer.Option("--text-column", help="A column of text; once or twice. Default: text.", rich_help_panel=_TABLE),
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
        help="Tokens of a text at most. Default: as in the model's training, else by task (moebert finetune --help"
        " lists them), 128 for custom, as far as the model reaches.",
    ),
]
DocStride = Annotated[
    int | None,
    typer.Option(
        "--doc-stride",
        min=0,
        help="Tokens that neighbouring windows share. Default: as in the model's training, else 128 for questions, 1"
        " for running text.",
    ),
]
HoldOut = Annotated[
    str | None,
    typer.Option(
        "--hold-out",
        help="Make a validation split: a share of the training rows such as 0.1, of each class. Or a test split: halves"
        " (half of validation) or train-rows (1,000 training rows become validation, and validation the test split)."
        " Default: none is made.",
    ),
]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help=f"Sequences at once. {_BY_TASK}.")]
EvaluationBatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, help="Sequences at once. Default: 64, with --task lm 16."),
]
ScoringBatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Sequences at once.")]
Split = Annotated[str, typer.Option("--split", help="train, validation or test.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the earlier result that --output holds.")]

RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help=f"Train a small dense student. {_RECIPES} Without it, a MoE follows its teacher layer by layer.",
    ),
]
AblationRecipe = Annotated[str, typer.Option("--recipe", help=_RECIPES)]
ExtraText = Annotated[
    Path | None,
    typer.Option(
        "--extra-text",
        help="With --recipe: texts without labels, a table with the task's text columns. Default: none.",
    ),
]

Epochs = Annotated[
    int | None,
    typer.Option("--epochs", min=1, help=f"Passes over the training data. {_BY_TASK}.", rich_help_panel=_TRAINING),
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        "--learning-rate",
        min=0.0,
        help=f"At the start; it falls linearly to 0. {_BY_TASK}.",
        rich_help_panel=_TRAINING,
    ),
]
Accumulation = Annotated[
    int, typer.Option("--accumulation", min=1, help="Batches per optimizer step.", rich_help_panel=_TRAINING)
]
WeightDecay = Annotated[
    float | None,
    typer.Option(
        "--weight-decay",
        min=0.0,
        help=f"Of AdamW, but for biases and norms. {_BY_TASK}.",
        rich_help_panel=_TRAINING,
    ),
]
RouterLearningRate = Annotated[
    float | None,
    typer.Option(
        "--router-learning-rate", min=0.0, help="Of learned routers. Default: as all others.", rich_help_panel=_TRAINING
    ),
]
WarmupRatio = Annotated[
    float,
    typer.Option(
        "--warmup-ratio",
        min=0.0,
        max=1.0,
        help="Share of the steps in which the learning rate rises from 0.",
        rich_help_panel=_TRAINING,
    ),
]
MixedPrecision = Annotated[str, typer.Option("--mixed-precision", help="no, fp16 or bf16.", rich_help_panel=_TRAINING)]
EvalSteps = Annotated[
    int | None,
    typer.Option(
        "--eval-steps", min=1, help="Evaluate after so many steps. Default: each epoch.", rich_help_panel=_TRAINING
    ),
]
SaveSteps = Annotated[
    int, typer.Option("--save-steps", min=1, help="Write a checkpoint after so many steps.", rich_help_panel=_TRAINING)
]
Patience = Annotated[
    int | None,
    typer.Option(
        "--patience",
        min=1,
        help="Stop after so many evaluations without a new best. Default: never.",
        rich_help_panel=_TRAINING,
    ),
]
MaxSteps = Annotated[
    int | None,
    typer.Option(
        "--max-steps",
        min=1,
        help="Optimizer steps at most. Default: those of all epochs.",
        rich_help_panel=_TRAINING,
    ),
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
    typer.Option(
        "--restart",
        help="Drop the unfinished run in --output instead of going on with it. A finished one only with --force.",
        rich_help_panel=_TRAINING,
    ),
]
ForceRestart = Annotated[
    bool,
    typer.Option(
        "--force", help="With --restart: replace a finished run and its model too.", rich_help_panel=_TRAINING
    ),
]
