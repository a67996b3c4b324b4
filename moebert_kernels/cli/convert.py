"""`moebert convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moebert_kernels.cli import inputs
from moebert_kernels.cli import options as o
from moebert_kernels.cli.outputs import (
    already_written,
    call_of,
    check_model_output,
    drop_parts,
    parts_of,
    tokenizer_of,
    write_model,
)
from moebert_kernels.cli.sizes import say_kept, say_sizes, sizes
from moebert_kernels.cli.tasks import known_tasks
from moebert_kernels.errors import UserError

METHODS = ("moebert", "chosen", "mpoe", "dense")
_SIZES, _COPIES, _TEXTS, _MORE = "Sizes", "With --experts mpo or copy", "Texts and tasks", "More"


def convert(
    ctx: typer.Context,
    *,
    model: str | None = None,
    output: o.OutputFolder,
    method: str | None = None,
    router: str | None = None,
    experts: str | None = None,
    importance: Path | None = None,
    seed: o.Seed = 0,
    force: o.Force = False,
    task: Annotated[list[str] | None, typer.Option(rich_help_panel=_TEXTS)] = None,
    data: Annotated[list[str] | None, typer.Option(rich_help_panel=_TEXTS)] = None,
    text_column: Annotated[list[str] | None, typer.Option(rich_help_panel=_TEXTS)] = None,
    label_column: Annotated[str, typer.Option(rich_help_panel=_TEXTS)] = "label",
    max_length: Annotated[int | None, typer.Option(min=8, rich_help_panel=_TEXTS)] = None,
    num_experts: Annotated[int | None, typer.Option(min=1, rich_help_panel=_SIZES)] = None,
    expert_size: Annotated[int | None, typer.Option(min=1, rich_help_panel=_SIZES)] = None,
    num_shared_neurons: Annotated[int | None, typer.Option(min=0, rich_help_panel=_SIZES)] = None,
    top_k: Annotated[int | None, typer.Option(min=1, rich_help_panel=_SIZES)] = None,
    sites: Annotated[int | None, typer.Option(min=2, max=6, rich_help_panel=_COPIES)] = None,
    max_bond: Annotated[int | None, typer.Option(min=1, rich_help_panel=_COPIES)] = None,
    low_bonds: Annotated[bool | None, typer.Option(rich_help_panel=_COPIES)] = None,
    noise: Annotated[float | None, typer.Option(min=0.0, rich_help_panel=_COPIES)] = None,
    norm: Annotated[str | None, typer.Option(rich_help_panel=_MORE)] = None,
    load_balance: Annotated[float | None, typer.Option(min=0.0, rich_help_panel=_MORE)] = None,
    route_padding: Annotated[bool, typer.Option(rich_help_panel=_MORE)] = False,
    hash_tables: Annotated[Path | None, typer.Option(rich_help_panel=_MORE)] = None,
    from_original: Annotated[Path | None, typer.Option(rich_help_panel=_MORE)] = None,
) -> None:
    """Replace the feed-forward layers of a dense model, of any family and with any head, by mixtures of experts. Or
    import a checkpoint of the original code.

    Args:
        model: A dense model: a folder or a name on the Hub. Without it, --from-original.
        method: chosen: experts and routing fit the texts of --task and --data; labels are not used. moebert: experts by
            --importance, random routing by token ids. mpoe: copies that share a central tensor. dense: a dense model of
            the same FLOPs, to compare with: the --expert-size neurons that fit the texts of --task and --data best, or
            are the most important ones. Default: chosen with --task or --data and without --router, --experts and
            --importance, else moebert.
        router: hash-random, hash-balance, hash-chosen, gate-token, gate-sentence, switch, top2 or task. Default: the
            method's.
        experts: split (parts of the neurons), clustered (parts chosen by text), copy or mpo (the whole feed-forward).
            Default: the method's.
        importance: What moebert importance wrote, for --experts split. Without it, neurons are ranked at random.
        task: With --method chosen or dense, or --router hash-balance, whose texts to read: custom for --data of your
            own, or a task of GLUE. With --router task, the tasks that get a head each. Default: none.
        data: A file, a folder with train.tsv, or a dataset's name on the Hub. Without it, the task's own.
        text_column: A column of text; once or twice. Default: text.
        label_column: The column of labels, which are not used.
        max_length: Tokens of a text at most. Default: as in the model's training, else 128, or the task's.
        num_experts: Experts of a layer. Default: 4, with --method mpoe 8.
        expert_size: Neurons of an expert; with --method dense, those kept. Default: a quarter of the dense layer's;
            with --router task all of them divided up.
        num_shared_neurons: Most important neurons, copied into every expert by --experts split. Default: two thirds of
            an expert's; with --router task 0.
        top_k: With --router task, the experts of a task. Default: 2, with --norm expert 1.
        sites: mpo: the tensors that each weight becomes. Default: 5.
        max_bond: mpo: the largest bond dimension. Default: no limit, which is exact.
        low_bonds: mpo: allow bonds so small that building the weight costs more than the chain of tensors. Default:
            refuse them.
        noise: Noise on each expert's copy, relative to its root mean square. Default: 0.
        norm: expert: a LayerNorm for each expert, where the feed-forward ends in one; layer: the model's own. Default:
            expert with --experts split or clustered and one expert for a token, else layer.
        load_balance: Weight of a learned router's balance loss in the loss. Default: 0.01.
        route_padding: Send padding to experts too, as the original code of MoEBERT does.
        hash_tables: Tables to use: the original's .pkl, or JSON with the expert of each token id, or a list of such for
            each layer. Default: --router makes them.
        from_original: A checkpoint of the original MoEBERT code, in place of --model. Default: none.
    """
    if (model is None) == (from_original is None):
        raise UserError(
            f"model: expected either --model or --from-original, got {'neither' if model is None else 'both'}"
        )
    fields = {
        "router": router, "experts": experts, "num_experts": num_experts, "num_shared_neurons": num_shared_neurons,
        "norm": norm, "load_balance": load_balance, "route_padding": route_padding or None, "top_k": top_k,
        "max_bond": max_bond,
    }  # fmt: skip
    of_mpo = {"sites": sites, "low_bonds": low_bonds}
    o.check_unused("--model", from_original is not None,
                  fields | of_mpo | {"importance": importance, "expert_size": expert_size, "noise": noise,
                                     "method": method, "task": task or None})  # fmt: skip
    if method is None:
        by_text = bool(task or data) and router is None and experts is None and importance is None
        method = "chosen" if by_text else "moebert"
    if method not in METHODS:
        raise UserError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    o.check_unused("--method moebert or mpoe", method == "dense",
                  fields | of_mpo | {"noise": noise, "hash_tables": hash_tables})  # fmt: skip
    config = None
    if method != "dense" and from_original is None:
        from moebert_kernels.layers.config import SPLITS

        config = _config(method, task or [], fields | {"expert_size": expert_size})
        o.check_unused("--experts split", config.experts != "split", {"importance": importance})
        o.check_unused("--experts mpo", config.experts != "mpo", of_mpo)
        o.check_unused("--experts copy or mpo", config.experts in SPLITS, {"noise": noise})
        given = config.router in ("hash-random", "hash-balance")
        o.check_unused("--router hash-random or hash-balance", not given, {"hash_tables": hash_tables})
    counted = config is not None and config.router == "hash-balance" and hash_tables is None
    by_text = config is None and from_original is None and bool(task or data)
    reads = by_text or (config is not None and (counted or config.needs_text))
    of_texts = inputs.Texts(data, text_column, label_column, max_length=max_length)
    o.check_unused("--task and --method chosen or dense, or --router hash-balance", not reads, o.given(of_texts))
    o.check_unused("--method dense without --task and --data", by_text, {"importance": importance})
    inputs.check_models(model=model)
    if model is not None:
        inputs.check_dense(model)
    identity = call_of(ctx)
    check_model_output(output, identity, force, model, from_original)  # before any text is read
    texts = None
    if reads:
        texts = _texts(model or "", counted, task, data, text_column, label_column, max_length)
    identity["training texts"] = texts and texts.fingerprint
    if already_written(output, identity, force, model, from_original):
        return
    tables = None if hash_tables is None else inputs.read_tables(hash_tables)
    reports: list[Any] = []
    if from_original is not None:
        from moebert_kernels.convert import from_original as imported

        converted = imported(from_original, hash_tables=tables, seed=seed)
        say_sizes(converted)
    else:
        options = {
            "seed": seed, "tables": tables, "num_sites": sites or 5, "force": bool(low_bonds), "noise": noise or 0.0,
        }  # fmt: skip
        parts = parts_of(output, identity)
        converted, reports = _converted(model, config, expert_size, importance, texts, parts, options)
    folder = from_original and (from_original if from_original.is_dir() else from_original.parent)
    write_model(output, converted, tokenizer_of(model or folder), identity, reports)
    drop_parts(output)


def _config(method: str, tasks: list[str], fields: dict[str, Any]) -> Any:
    """What a method makes, with the fields that are given; MoEConfig says what is wrong with them."""
    from moebert_kernels.layers import MoEConfig

    given = {name: value for name, value in fields.items() if value is not None}
    if given.get("router") == "task":
        labels = {name: list(known.label_names) for name, known in known_tasks(tasks).items()}
        given |= {"tasks": list(labels), "task_labels": labels}
    config = getattr(MoEConfig, method)(**given)
    needs_task = config.is_task_routed or config.router == "hash-balance" or config.needs_text
    o.check_unused("--method chosen, --router hash-balance or task", not needs_task, {"task": tasks or None})
    return config


def _converted(
    name: Any, config: Any, width: int | None, importance: Path | None, texts: Any, parts: Path, options: dict[str, Any]
) -> tuple[Any, list[Any]]:
    """The converted model, or without a `config` the dense student, and reports of what was chosen.

    What was chosen so far is kept in `parts`.
    """
    from moebert_kernels.convert import convert_to_moe, count_tokens, dense_student, load_importance
    from moebert_kernels.distill.loading import load_as_saved, load_classifier
    from moebert_kernels.layers import MoEConfig

    has_heads, seed = config is not None and config.task_labels is not None, options["seed"]
    model = load_classifier(name, seed) if has_heads else load_as_saved(name)
    scores = None if importance is None else load_importance(importance, model).scores
    before, chosen = sizes(model), None
    if config is not None and config.router == "hash-balance" and texts is not None:
        vocabulary = model.config.get_text_config().vocab_size
        options["token_counts"] = count_tokens(texts.columns["input_ids"], vocabulary)
    if texts is not None and (config is None or (config.experts, config.router) == ("clustered", "hash-chosen")):
        chosen = _chosen(model, texts, config or MoEConfig.chosen(expert_size=width), seed, parts)
    elif config is not None and config.needs_text:  # experts or tables that are given are part of the choice
        options["batches"] = _batches(texts, seed)
    correcting: dict[str, Any] = {} if chosen is None else {"batches": _batches(texts, seed), "progress": True}
    if config is None:
        model = dense_student(model, scores, width, seed, chosen=chosen, **correcting)
    else:
        convert_to_moe(model, config, importance=scores, chosen=chosen, **options, **correcting)
    say_sizes(model, before)
    if chosen is None:
        say_kept(scores, model)
    return model, [choice.report for choice in chosen or ()]


def _batches(texts: Any, seed: int) -> list[Any]:
    """Of the texts in an order of chance, because files may be sorted."""
    import torch

    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    return [texts.collate(rows.tolist()) for rows in order.split(16)]


def _chosen(model: Any, texts: Any, config: Any, seed: int, parts: Path) -> list[Any]:
    """Experts that fit the texts."""
    from moebert_kernels.convert import choose_experts, report_chart, report_table

    chosen = choose_experts(model, _batches(texts, seed), config, seed=seed, folder=parts, progress=True)
    reports = [choice.report for choice in chosen]
    print(
        "Errors of each layer on text that chose nothing, lower is better: of a dense feed-forward of the same FLOPs,"
        " of random tables, of the chosen tables, and if each token had its best expert. `least` and `load` are the"
        " tokens of the emptiest and the fullest expert over an even share."
    )
    print(report_table(reports))
    print(report_chart(reports))
    return chosen


def _texts(
    model: str, counted: bool, tasks: list[str] | None, data: list[str] | None, text_column: list[str] | None,
    label_column: str, max_length: int | None,
) -> Any:  # fmt: skip
    """The tokens of the training split."""
    from moebert_kernels.distill.loading import load_config, load_tokenizer

    if tasks is None or len(tasks) != 1:
        got = ", ".join(tasks or ["none"])
        reads = "hash-balance counts" if counted else "experts are chosen by"
        known = "a task of GLUE, or custom with --data FILE"
        raise UserError(f"task: expected one ({known}), whose training data {reads}, got {got}")
    config = load_config(model)
    reads_windows = tasks[0] == "custom" and inputs.generates(config)
    table = inputs.Table(data, text_column, "label" if reads_windows else label_column)  # of custom, which no one reads
    wanted = table.make_task("lm" if reads_windows else tasks[0])
    loaded = inputs.unlabelled(wanted, data) if wanted.name == "custom" else inputs.load_data(wanted, data, "train")
    reader = inputs.Reader(loaded, config, load_tokenizer(model), max_length, labels=False)
    return reader.split("train")
