"""`moebert importance` and `moebert convert`."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import typer

from moebert_kernels.cli import inputs
from moebert_kernels.cli import options as o
from moebert_kernels.cli.outputs import already_written, check_output_file, write_model
from moebert_kernels.cli.sizes import check_same_scores, holds_scores, say_kept, say_scores, say_sizes
from moebert_kernels.cli.tasks import convert_for_tasks
from moebert_kernels.errors import UserError

METHODS = ("moebert", "dense", "mpoe")
_EXPERTS = {"mpo": "mpo", "dense": "copy"}  # of --method mpoe: option -> field of MoEConfig
_MPOE, _TASKS = "With --method mpoe", "With --router task"


def importance(
    model: o.ModelName,
    task: o.TaskName,
    output: o.OutputFile,
    data: o.Data = None,
    seed: o.Seed = 0,
    split: Annotated[
        str, typer.Option("--split", help="The split to score on. validation is what the original code does.")
    ] = "train",
    max_examples: Annotated[
        int | None,
        typer.Option("--max-examples", min=1, help="Score on so many examples, drawn by --seed. Default: all."),
    ] = None,
    text_column: o.TextColumns = None,
    label_column: o.LabelColumn = "label",
    regression: o.Regression = False,
    hold_out: o.HoldOut = None,
    max_length: o.MaxLength = None,
    doc_stride: o.DocStride = None,
    batch_size: o.ScoringBatchSize = 32,
    force: o.Force = False,
) -> None:
    """Score every feed-forward neuron of a fine-tuned dense model, in one backward pass per batch."""
    from moebert_kernels.convert.encoders import dense_ffns
    from moebert_kernels.distill.loading import load_model, load_tokenizer
    from moebert_kernels.distill.scoring import score_split
    from moebert_kernels.distill.tasks import TaskData

    check_output_file(output, holds_scores, "importance.safetensors")
    split = inputs.split_called(split)
    inputs.check_models(model=model)
    _check_dense(model)
    wanted = inputs.make_task(task, text_column, label_column, regression, model)
    loaded = inputs.load_data(wanted, data, split, hold_out)
    teacher = load_model(model, loaded.task)
    dense_ffns(teacher)
    loaded = inputs.labels_as_in(loaded, teacher.config)
    tokenizer = load_tokenizer(model)
    length, doc_stride = inputs.lengths_for(teacher.config, loaded.task, tokenizer, max_length, doc_stride)
    rows = _joined([loaded.split(name) for name in inputs.splits_named(loaded, split)])
    if max_examples is not None and max_examples < len(rows):
        rows = rows.shuffle(seed=seed).select(range(max_examples))
    features = inputs.tokenized(
        TaskData(loaded.task, {split: rows}), split, tokenizer, length, doc_stride, teacher.config
    )
    facts = {
        "split": split, "task": loaded.task.name, "max_length": length, "doc_stride": doc_stride,
        "max_examples": max_examples, "seed": seed if max_examples else None, "hold_out": hold_out,
    }  # fmt: skip
    if output.exists() and not force:
        check_same_scores(output, teacher, facts, features)
        say_scores(output)
        print(f"{output} is there already")
        return
    score_split(
        teacher.to(inputs.device()), features, output, batch_size=batch_size,
        data=inputs.described(data, loaded.task), split=split, task=loaded.task.name, call=facts,
    )  # fmt: skip
    say_scores(output)
    print(f"saved in {output}")


def convert(
    output: o.OutputFolder,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="The fine-tuned dense model: a folder or a name on the Hub. Default: none; see --from-original.",
        ),
    ] = None,
    importance: Annotated[
        Path | None, typer.Option("--importance", help="What moebert importance wrote. Without it: a random ranking.")
    ] = None,
    task: o.OptionalTaskNames = None,
    data: o.Data = None,
    seed: o.Seed = 0,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="Default: moebert, experts out of a BERT's neurons. Or dense: its top --expert-size neurons, for"
            " comparison; or mpoe: experts of the whole feed-forward, of models of other families too, that share a"
            " central tensor.",
        ),
    ] = None,
    num_experts: Annotated[
        int | None, typer.Option("--num-experts", min=1, help="Experts of a layer. Default: 4.")
    ] = None,
    expert_size: Annotated[
        int | None,
        typer.Option(
            "--expert-size",
            min=1,
            help="Neurons of an expert. Default: a quarter of the dense layer's, 768 of BERT-base's"
            " 3,072; with --router task all of them, divided up. With --method dense: the neurons that are kept.",
        ),
    ] = None,
    shared: Annotated[
        int | None,
        typer.Option(
            "--shared",
            min=0,
            help="Most important neurons, in every expert. Default: two thirds of an expert's,"
            " 512 of 768; with --router task 0.",
        ),
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(
            "--router",
            help="Default: hash-random. Or hash-balance (counts --data), gate-token, gate-sentence or task (with a"
            " head for each --task); with --method mpoe switch (its default), top2, gate-token, gate-sentence,"
            " hash-random or hash-balance.",
        ),
    ] = None,
    load_balance: Annotated[
        float | None,
        typer.Option("--load-balance", min=0.0, help="Weight of the gates' loss. Default: 0, with --method mpoe 0.01."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset", help="Default: default, which skips padding; paper routes it, as the original code does."
        ),
    ] = None,
    from_original: Annotated[
        Path | None,
        typer.Option(
            "--from-original", help="A checkpoint of the original MoEBERT code, in place of --model. Default: none."
        ),
    ] = None,
    hash_tables: Annotated[
        Path | None,
        typer.Option(
            "--hash-tables",
            help="Tables to use: the original's .pkl, or JSON, with an expert's number for each token of the"
            " vocabulary, or a list of them for each layer. Default: made by --router.",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k", min=1, help="Experts of a task. Default: 2, with --norm expert 1.", rich_help_panel=_TASKS
        ),
    ] = None,
    norm: Annotated[
        str | None,
        typer.Option(
            "--norm", help="Default: layer, around all experts; expert: in each, one per task.", rich_help_panel=_TASKS
        ),
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option(
            "--experts",
            help="Default: mpo; or dense: whole copies, as in Switch. With --router task importance (its default), copy"
            " (whole copies) or mpo.",
            rich_help_panel=_MPOE,
        ),
    ] = None,
    sites: Annotated[
        int | None,
        typer.Option("--sites", min=2, max=6, help="Tensors of each weight. Default: 5.", rich_help_panel=_MPOE),
    ] = None,
    max_bond: Annotated[
        int | None, typer.Option("--max-bond", min=1, help="Cut the bonds. Default: exact.", rich_help_panel=_MPOE)
    ] = None,
    low_bonds: Annotated[
        bool | None,
        typer.Option(
            "--low-bonds", help="Take bonds at which experts are slow. Default: refuse them.", rich_help_panel=_MPOE
        ),
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(
            "--noise", min=0.0, help="On auxiliary tensors, relative to their size. Default: 0.", rich_help_panel=_MPOE
        ),
    ] = None,
    text_column: o.TextColumns = None,
    label_column: o.LabelColumn = "label",
    max_length: o.MaxLength = None,
    force: o.Force = False,
) -> None:
    """Make a dense model's feed-forward layers mixtures of experts, or import a checkpoint of the original code."""
    from moebert_kernels.distill.identity import file_digest, model_files

    if (model is None) == (from_original is None):
        raise UserError(
            f"model: expected either --model or --from-original, got {'neither' if model is None else 'both'}"
        )
    split = {"shared": shared, "preset": preset}
    bonds = {"sites": sites, "max-bond": max_bond, "low-bonds": low_bonds}
    for_any = {"router": router, "load-balance": load_balance, "num-experts": num_experts}
    by_task_alone = {"top-k": top_k, "norm": norm}
    ours = {"method": method, "importance": importance, "expert-size": expert_size, "experts": experts, "noise": noise}
    _check_unused("--model", from_original is not None, ours | for_any | split | bonds | by_task_alone)
    method = method or "moebert"
    if method not in METHODS:
        raise UserError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if method == "mpoe" and importance is not None:
        raise UserError(f"importance: expected none with --method mpoe, which keeps all neurons, got {importance}")
    by_task = method == "moebert" and router == "task"
    _check_unused("--router task", not by_task, by_task_alone)
    _check_unused("--method mpoe or --router task", method != "mpoe" and not by_task, {"experts": experts})
    _check_unused("--method mpoe", method != "mpoe", bonds | {"noise": noise})
    _check_unused("--experts mpo", method == "mpoe" and experts == "dense", bonds)
    _check_unused("--method moebert", method != "moebert", split)
    _check_unused("--method moebert or dense", method == "mpoe", {"expert-size": expert_size})
    _check_unused("--method moebert or mpoe", method == "dense", for_any | {"hash-tables": hash_tables})
    num_experts, preset = num_experts or 4, preset or "default"
    if method != "mpoe":
        router, load_balance = router or "hash-random", load_balance or 0.0
    identity: dict[str, Any] = {
        "command": "convert", "model": model and str(Path(model)), "importance": importance and str(importance),
        "task": task, "data": data, "seed": seed, "method": method, "num_experts": num_experts,
        "expert_size": expert_size, "shared": shared, "router": router, "load_balance": load_balance, "preset": preset,
        "from_original": from_original and str(from_original), "hash_tables": hash_tables and str(hash_tables),
    }  # fmt: skip
    shape = {
        "experts": experts or "mpo", "max_bond": max_bond, "num_sites": sites or 5, "force": bool(low_bonds),
        "noise": noise or 0.0,
    }  # fmt: skip
    if method == "mpoe":
        identity |= shape
    by_task_options = {"top_k": top_k, "norm": norm or "layer", "experts": experts or "importance"}
    if by_task:
        identity |= by_task_options
    inputs.check_models(model=model)
    counted = method != "dense" and router == "hash-balance" and hash_tables is None and model is not None
    counts = _count(model or "", task, data, text_column, label_column, max_length) if counted else None
    identity |= {
        "training texts": None if counts is None else sha256(repr(counts.tolist()).encode()).hexdigest()[:16],
        "files of the model": model_files(model or from_original), "file of importance": file_digest(importance),
        "file of hash tables": file_digest(hash_tables),
    }  # fmt: skip
    if already_written(output, identity, force, model, from_original):
        print(f"{output} is there already")
        return
    if from_original is not None:
        tables = None if hash_tables is None else inputs.read_tables(hash_tables)
        converted, tokenizer = _import_original(from_original, tables, seed)
    else:
        assert model is not None
        options: dict[str, Any] = {"load_balance": load_balance}
        if hash_tables is not None:
            options["tables"] = inputs.read_tables(hash_tables)
        elif router == "hash-balance":
            options["token_counts"] = counts
        if method == "mpoe":
            options |= shape | {"num_experts": num_experts, "router": router or "switch", "seed": seed}
            converted, tokenizer = _convert_to_moe(model, **options)
        elif by_task:
            _check_dense(model)
            options |= {"preset": preset, "num_experts": num_experts, "seed": seed} | by_task_options
            converted, tokenizer = convert_for_tasks(model, task or [], importance, expert_size, shared, options)
        else:
            assert router is not None
            converted, tokenizer = _convert(
                model, importance, method, num_experts, expert_size, shared, router, seed, options | {"preset": preset}
            )
    write_model(output, converted, tokenizer, identity)


def _convert(
    name: str, importance: Path | None, method: str, num_experts: int, expert_size: int | None, shared: int | None,
    router: str, seed: int, options: dict[str, Any],
) -> tuple[Any, Any]:  # fmt: skip
    from moebert_kernels.convert import convert_to_moe, dense_student, load_importance
    from moebert_kernels.distill.loading import load_as_saved, load_tokenizer

    _check_dense(name)
    dense, tokenizer = load_as_saved(name), load_tokenizer(name)
    scores = None if importance is None else load_importance(importance, dense).scores
    if method == "dense":
        student = dense_student(dense, scores, expert_size, seed)
        say_sizes(student, dense)
        say_kept(scores, student.config)
        return student, tokenizer
    moe = convert_to_moe(
        dense,
        scores,
        num_experts=num_experts,
        expert_size=expert_size,
        shared=shared,
        router=router,
        seed=seed,
        **options,
    )
    say_sizes(moe, dense)
    say_kept(scores, moe.config)
    return moe, tokenizer


def _convert_to_moe(name: str, *, experts: str, **options: Any) -> tuple[Any, Any]:
    """The model with experts that are whole feed-forwards."""
    from moebert_kernels.convert import convert_to_moe, mpoe_report
    from moebert_kernels.distill.loading import load_as_saved, load_tokenizer
    from moebert_kernels.layers import MoEConfig

    if experts not in _EXPERTS:
        raise UserError(f"experts: expected one of {', '.join(_EXPERTS)} with --method mpoe, got {experts!r}")
    fields = {field: options.pop(field) for field in ("num_experts", "router", "max_bond", "load_balance")}
    config = MoEConfig(experts=_EXPERTS[experts], **fields)
    model, tokenizer = load_as_saved(name), load_tokenizer(name)
    convert_to_moe(model, config, **options)
    print(mpoe_report(model))
    return model, tokenizer


def _check_unused(where: str, unused: bool, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if unused and value is not None:
            got = str(value) if isinstance(value, Path) else value
            raise UserError(f"{name}: expected it with {where} alone, got {got!r}")


def _check_dense(name: str) -> None:
    from moebert_kernels.distill.loading import is_moe, load_config

    if is_moe(load_config(name)):
        raise UserError(f"model: expected a dense checkpoint, got {name}, which is a MoE already")


def _import_original(checkpoint: Path, tables: Any, seed: int) -> tuple[Any, Any]:
    import warnings

    from moebert_kernels.convert import from_original
    from moebert_kernels.distill.loading import load_tokenizer

    converted = from_original(checkpoint, hash_tables=tables, seed=seed)
    say_sizes(converted)
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    try:
        return converted, load_tokenizer(folder)
    except UserError:
        warnings.warn(f"no tokenizer in {folder}: the model is saved without one", stacklevel=2)
        return converted, None


def _count(
    model: str, tasks: list[str] | None, data: list[str] | None, text_column: list[str] | None, label_column: str,
    max_length: int | None,
) -> Any:  # fmt: skip
    """How often each token occurs in the training split."""
    from moebert_kernels.convert import count_tokens
    from moebert_kernels.distill.loading import load_config, load_tokenizer

    if tasks is None or len(tasks) != 1:
        got = ", ".join(tasks or ["none"])
        raise UserError(f"task: expected one, whose training data hash-balance counts, got {got}")
    task = tasks[0]
    config = load_config(model)
    loaded = inputs.load_data(inputs.make_task(task, text_column, label_column, False), data, "train")
    tokenizer = load_tokenizer(model)
    length, _ = inputs.lengths_for(config, loaded.task, tokenizer, max_length)
    features = inputs.tokenized(loaded, "train", tokenizer, length, None, config)
    return count_tokens(features.input_ids, config.vocab_size)


def _joined(parts: list[Any]) -> Any:
    """Splits one after another, with rows numbered anew."""
    from datasets import concatenate_datasets

    from moebert_kernels.distill.held_out import numbered

    return parts[0] if len(parts) == 1 else numbered(concatenate_datasets(parts))
