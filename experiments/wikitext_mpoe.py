"""MPOE on a small language model: experts with a shared central tensor beside Switch's experts and the dense model.

    python experiments/wikitext_mpoe.py --data FOLDER                    # all that is not done yet, then the report
    python experiments/wikitext_mpoe.py --data FOLDER --models base      # the model that all others start from
    python experiments/wikitext_mpoe.py --data FOLDER --seeds 1          # then several processes may share the work
    python experiments/wikitext_mpoe.py --data FOLDER --report           # the report of what is done

FOLDER holds train.txt, valid.txt and test.txt (or .gz). Without train.txt, training uses valid.txt but for its last
tenth, which then chooses. One GPT-2-style model is trained from scratch until its perplexity on the validation text
stops falling; from there each arm trains on under the same rules, once for each seed, which decides the order of the
data, dropout, routers and masks. The test text is read once per run, after the choice. A run that was interrupted goes
on. Writes runs/, table.md and chart.png into experiments/wikitext_mpoe.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from filelock import FileLock  # comes with torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from moebert_kernels.bench.clocks import WallTimer
from moebert_kernels.bench.tables import millions
from moebert_kernels.bench.timing import interleaved
from moebert_kernels.convert import convert_to_moe, parameter_counts
from moebert_kernels.data.files import find_split_files, read_text
from moebert_kernels.data.split import TokenizedSplit
from moebert_kernels.data.tasks import get_task
from moebert_kernels.demo.run import step
from moebert_kernels.distill.evaluation import Evaluator
from moebert_kernels.distill.identity import changed, described
from moebert_kernels.distill.recipe import Recipe as Stages
from moebert_kernels.distill.recipe import Stage
from moebert_kernels.distill.run import train_stages
from moebert_kernels.files import write_text
from moebert_kernels.layers import MoEConfig
from moebert_kernels.nn import GradientMask

HERE = Path(__file__).resolve().parent / "wikitext_mpoe"
START = "<|endoftext|>"
E = 8
BASE_SEED = 0


@dataclass(frozen=True)
class Recipe:
    """Sizes and settings of all runs."""

    vocab_size: int = 4096
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    block: int = 128
    dropout: float = 0.2
    batch_size: int = 16
    weight_decay: float = 0.01
    base_learning_rate: float = 2e-3
    base_epochs: int = 8
    base_evaluations_per_epoch: int = 2
    base_patience: int = 4
    learning_rate: float = 1e-3
    epochs: int = 2
    evaluations_per_epoch: int = 4
    patience: int = 3
    load_balance: float = 0.01


@dataclass(frozen=True)
class Arm:
    """What a model is turned into, and how often its central tensors are masked."""

    label: str
    option: str | None = None  # experts of MoEConfig; None: the dense model as it is
    masked: float = 0.0


ARMS = {
    "dense": Arm("dense, trained on"),
    "switch": Arm(f"Switch, {E} experts", "copy"),
    "mpoe": Arm(f"MPOE, {E} experts", "mpo"),
    "mpoe-mask-0.5": Arm(f"MPOE, {E} experts, mask 1/2", "mpo", 0.5),
    "mpoe-mask-0.875": Arm(f"MPOE, {E} experts, mask 7/8", "mpo", 0.875),
}

NAMES = ("base", *ARMS)

Result = Mapping[str, Any]


def label_of(name: str) -> str:
    """What a reader calls a model."""
    return ARMS[name].label if name in ARMS else "base (dense)"


def read_parts(data: Path) -> dict[str, str]:
    """The training, validation and test text of a folder."""
    texts = {split: read_text(file) for split, file in find_split_files(data).items()}
    missing = [split for split in ("validation", "test") if split not in texts]
    if missing:
        raise SystemExit(f"data: expected a {missing[0]} text in {data}, got {', '.join(texts)}")
    if "train" in texts:
        return texts
    lines = texts["validation"].splitlines(keepends=True)
    cut = len(lines) * 9 // 10
    return {"train": "".join(lines[:cut]), "validation": "".join(lines[cut:]), "test": texts["test"]}


def gpt2_config(recipe: Recipe) -> GPT2Config:
    """The dense model; no dropout of attention probabilities, which would take the slow path on a CPU."""
    return GPT2Config(
        vocab_size=recipe.vocab_size, n_positions=recipe.block, n_embd=recipe.hidden_size, n_layer=recipe.layers,
        n_head=recipe.heads, resid_pdrop=recipe.dropout, embd_pdrop=recipe.dropout, attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh", bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def trained_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the training text, with GPT-2's token between documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[START], show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=START, eos_token=START)


class Study:
    """The runs of one seed; those that are finished are not made again.

    Args:
        work: models and checkpoints, of all seeds.
        runs: the folder for the results.
        splits: the parts as windows of tokens, by name.
    """

    def __init__(
        self, work: Path, runs: Path, splits: Mapping[str, TokenizedSplit], recipe: Recipe, seed: int
    ) -> None:  # fmt: skip
        self.work, self.runs, self.recipe, self.seed, self.splits = work, runs, recipe, seed, splits
        self.texts = {f"{name} text": part.fingerprint for name, part in splits.items()}

    def run(self, name: str) -> None:
        """Train and test an arm (or "base"), and the base model before it, unless they are done."""
        place = name if name == "base" else f"seed-{self.seed}-{name}"
        (self.work / "locks").mkdir(parents=True, exist_ok=True)
        with FileLock(self.work / "locks" / place):
            file = self.runs / f"{place}.json"
            if file.exists():
                read_run(file, self.recipe, self.texts)
            else:
                write_text(file, json.dumps(self._made(name, place)) + "\n")

    def _made(self, name: str, place: str) -> Result:
        recipe = self.recipe
        if name == "base":
            torch.manual_seed(BASE_SEED)
            model, arm, seed = GPT2LMHeadModel(gpt2_config(recipe)), ARMS["dense"], BASE_SEED
            settings = (recipe.base_learning_rate, recipe.base_epochs)
            evaluations, patience = recipe.base_evaluations_per_epoch, recipe.base_patience
        else:
            self.run("base")
            arm, seed = ARMS[name], self.seed
            model = converted(GPT2LMHeadModel.from_pretrained(self.work / "base" / "best"), arm, recipe, seed)
            settings = (recipe.learning_rate, recipe.epochs)
            evaluations, patience = recipe.evaluations_per_epoch, recipe.patience
        steps = -(-len(self.splits["train"]) // recipe.batch_size)  # of an epoch
        told = {
            "learning_rate": settings[0], "num_train_epochs": settings[1], "early_stopping_patience": patience,
            "per_device_train_batch_size": recipe.batch_size, "weight_decay": recipe.weight_decay,
            "warmup_steps": 0.05, "seed": seed, "eval_strategy": "steps", "eval_steps": max(1, steps // evaluations),
            **({"gradient_mask": {"probability": arm.masked}} if arm.masked else {}),
        }  # fmt: skip
        return {"name": name, "seed": seed, **self._train(place, model, told, steps)}

    def _train(self, place: str, model: Any, settings: dict[str, Any], steps: int) -> dict[str, Any]:
        """Train with early stopping, and test what validation chose."""
        judge = Evaluator(self.splits["validation"])
        before = judge(model)
        with clock(self.work / f"{place}.seconds") as seconds:
            result = train_stages(
                model, Stages(place, (Stage(settings=settings),)), self.splits["train"], output_dir=self.work / place,
                evaluate=judge, best_metric="perplexity", greater_is_better=False,
            )  # fmt: skip
        return {
            "perplexity_before": before["perplexity"],
            "perplexity_validation": result.best_metrics["perplexity"],
            "perplexity_test": Evaluator(self.splits["test"])(model)["perplexity"],
            "steps": result.step,
            "best_step": result.best_step,
            "steps_per_epoch": steps,
            "stopped_early": result.stopped_early,
            "cpu_seconds": seconds(),
            **parameter_counts(model),
            "history": [[entry["step"], entry["metrics"]["perplexity"]] for entry in result.history],
            "recipe": asdict(self.recipe),
            "texts": self.texts,
        }


def read_run(file: Path, recipe: Recipe, texts: Mapping[str, str], strict: bool = True) -> Result:
    """A result, of this recipe and these texts; unless `strict` also one that does not know its texts."""
    found = json.loads(file.read_text())
    wanted = asdict(recipe) | (dict(texts) if strict or "texts" in found else {})
    changes = changed(found["recipe"] | found.get("texts", {}), wanted)
    if changes:
        raise SystemExit(f"output: expected a new folder, got {file} of a run with other {described(changes)}")
    return found


@contextmanager
def clock(file: Path) -> Iterator[Callable[[], float]]:
    """CPU seconds spent inside, with those of interrupted calls before, kept in `file`."""
    before = float(file.read_text()) if file.exists() else 0.0
    started = time.process_time()
    try:
        yield lambda: before + time.process_time() - started
    finally:
        write_text(file, str(before + time.process_time() - started))


def converted(model: nn.Module, arm: Arm, recipe: Recipe, seed: int) -> nn.Module:
    """The arm's model, with the dense one's weights."""
    if arm.option is None:
        return model
    config = MoEConfig.mpoe(num_experts=E, experts=arm.option, load_balance=recipe.load_balance)
    return convert_to_moe(model, config, seed=seed)


def step_times(recipe: Recipe) -> dict[str, float]:
    """Median milliseconds of a training step of each kind of model, in turns; "mpoe, masked" never trains C."""
    kinds = {"dense": ARMS["dense"], "switch": ARMS["switch"], "mpoe": ARMS["mpoe"], "mpoe, masked": ARMS["mpoe"]}
    ids = torch.randint(recipe.vocab_size, (recipe.batch_size, recipe.block))
    steps = {kind: WallTimer(_training_step(kind, arm, recipe, ids)).warm_ms for kind, arm in kinds.items()}
    return {kind: statistics.median(values) for kind, values in interleaved(steps, rounds=11).items()}


def _training_step(kind: str, arm: Arm, recipe: Recipe, ids: torch.Tensor) -> Callable[[], None]:
    torch.manual_seed(0)
    model = converted(GPT2LMHeadModel(gpt2_config(recipe)), arm, recipe, 0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    mask = GradientMask(model, 1.0) if kind.endswith("masked") else None

    def take() -> None:
        with mask.step(0) if mask is not None else nullcontext():
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return take


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation of a few values."""
    mean = f"{statistics.mean(values):{sign}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def table(runs: Mapping[str, Sequence[Result]], times: Mapping[str, float], facts: Mapping[str, Any]) -> str:
    """The runs of each arm (and "base"), in the order of their seeds, as Markdown."""
    recipe = runs["base"][0]["recipe"]
    lines = [
        f"GPT-2-style, {recipe['layers']} layers, hidden size {recipe['hidden_size']}, vocabulary"
        f" {recipe['vocab_size']}, {len(runs['dense'])} seeds. Training {facts['train']} tokens, validation"
        f" {facts['validation']}, test {facts['test']}.",
        f"Perplexity per token in windows of {recipe['block']} tokens that share one; mean ± standard deviation over"
        " the seeds, differences paired by seed.",
        "Every arm starts from the base model and stops when validation does not improve; the chosen weights are"
        " tested.",
        "",
        "| model | parameters | active | validation | test | test, minus dense | best step | steps | CPU minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, results in runs.items():
        test = [result["perplexity_test"] for result in results]
        pairs = [a - b["perplexity_test"] for a, b in zip(test, runs["dense"], strict=False)]
        lines.append(
            f"| {label_of(name)} | {millions(results[0]['total_parameters'])}"
            f" | {millions(results[0]['active_parameters'])}"
            f" | {spread([result['perplexity_validation'] for result in results])} | {spread(test)}"
            f" | {spread(pairs, '+') if name not in ('base', 'dense') else ''}"
            f" | {' '.join(str(result['best_step']) for result in results)}"
            f" | {' '.join(str(result['steps']) for result in results)}"
            f" | {spread([result['cpu_seconds'] / 60 for result in results])} |"
        )
    lines += [
        "",
        f"A training step of {recipe['batch_size']} windows, medians of steps in turns, {facts['threads']} thread(s): "
        + ", ".join(f"{kind} {milliseconds:.0f} ms" for kind, milliseconds in times.items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def draw(runs: Mapping[str, Sequence[Result]], file: Path) -> None:
    """Test perplexity against parameters, and validation perplexity while training; every seed is shown."""
    from matplotlib.figure import Figure

    colours = dict(zip(ARMS, ("#777777", "#d98c21", "#0b3c5d", "#1b6ca8", "#6fb1e0"), strict=True))
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, results in runs.items():
        if name == "base":
            continue
        colour = colours[name]
        values = [result["perplexity_test"] for result in results]
        parameters = results[0]["total_parameters"] / 1e6
        left.scatter([parameters] * len(values), values, color=colour, alpha=0.4, s=22)
        left.scatter([parameters], [statistics.mean(values)], color=colour, marker="_", s=300, label=ARMS[name].label)
        for result in results:
            steps, perplexities = zip(*result["history"], strict=True)
            right.plot(
                [0, *steps], [result["perplexity_before"], *perplexities], color=colour, alpha=0.6, linewidth=1.2
            )
    left.set_xlabel("parameters, millions")
    left.set_ylabel("perplexity on the test text")
    left.legend(fontsize=8)
    right.set_xlabel("step")
    right.set_ylabel("perplexity on the validation text")
    figure.suptitle(f"From one pretrained model, {len(runs['dense'])} seeds (points, lines) and their mean (bars)")
    figure.savefig(file, dpi=120)


def main() -> None:
    """Run what is missing, and report on the seeds that are complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES, help="default: all")
    parser.add_argument("--work", type=Path, default=Path("demo/wikitext_mpoe"), help="models and checkpoints")
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--report", action="store_true", help="train nothing")
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    arguments = parser.parse_args()

    recipe = Recipe(**{name: getattr(arguments, name) for name in asdict(Recipe())})
    parts = read_parts(arguments.data)
    tokenizer = trained_tokenizer(parts["train"], recipe.vocab_size)
    recipe = replace(recipe, vocab_size=len(tokenizer))
    splits = {
        name: TokenizedSplit(Dataset.from_dict({"text": [text]}), get_task("lm"), tokenizer, max_length=recipe.block)
        for name, text in parts.items()
        if name in ("train", "validation", "test")
    }
    runs = arguments.output / "runs"
    if not arguments.report:
        for seed in arguments.seeds:
            study = Study(arguments.work, runs, splits, recipe, seed)
            for name in arguments.models:
                step(f"seed {seed}", label_of(name))
                study.run(name)
    report(runs, arguments.output, recipe, splits)


def report(runs: Path, output: Path, recipe: Recipe, splits: Mapping[str, TokenizedSplit]) -> None:
    """Write the table and the chart of the arms that are done for every seed that was begun, if there are any."""
    texts = {f"{name} text": part.fingerprint for name, part in splits.items()}
    done = [read_run(file, recipe, texts, strict=False) for file in sorted(runs.glob("*.json"))]
    seeds = sorted({run["seed"] for run in done if run["name"] != "base"})
    results = {name: [run for run in done if run["name"] == name] for name in NAMES}
    results = {name: found for name, found in results.items() if len(found) == (1 if name == "base" else len(seeds))}
    if "dense" not in results or not seeds:
        print("no arm is complete yet")
        return
    facts = {
        "threads": torch.get_num_threads(),
        **{name: sum(sum(label != -100 for label in labels) for labels in part.columns["labels"])
           for name, part in splits.items()},
    }  # fmt: skip
    text = table(results, step_times(recipe), facts)
    write_text(output / "table.md", text)
    draw(results, output / "chart.png")
    print(text)


if __name__ == "__main__":
    main()
