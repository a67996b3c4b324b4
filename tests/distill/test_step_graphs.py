"""Training steps that are replayed, on a stand-in for CUDA's graphs: the numbers of a run without them."""

from types import SimpleNamespace

import pytest
import torch

from moebert_kernels.convert import convert_to_moe
from moebert_kernels.distill import step_graphs
from moebert_kernels.distill.discriminator import AdversaryConfig
from moebert_kernels.distill.microbert import TERMS, MicroBertObjective
from moebert_kernels.distill.named_objectives import make_objective
from moebert_kernels.distill.objectives import LayerwiseObjective
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig
from tests.distill.test_trainer_kinds import KINDS, labelled
from tests.distill.tiny import assert_same_weights, tiny_bert, weights
from tests.distill.tiny_text import tiny_mpoe
from tests.distill.tiny_trainer import mostly_slow, terms_of, text_data, tiny_data, tiny_tokenizer, trainer


def routed(dropout=0.0, **options):
    return convert_to_moe(tiny_bert(0, dropout=dropout), MoEConfig.moebert(**options), importance=torch.rand(2, 32))


def layerwise(**options):
    return {"teacher": tiny_bert(1), "objective": LayerwiseObjective("classification"), **options}


GATED = {"router": "gate-token", "load_balance": 0.5}


def texts(folder):
    """A decoder in two stacks, each with padding, by its teacher's predictions."""
    make, objective, collate = KINDS["text to text"]
    student, teacher = make(0), make(1)
    objective = make_objective(objective, None, student, teacher)
    return student, {
        "data": labelled("text to text"), "teacher": teacher, "objective": objective,
        "collator": collate(tiny_tokenizer()),
    }  # fmt: skip


RUNS = {  # a model and options; 18 sequences are four batches of 4 and one of 2
    "hashes": lambda folder: (routed(0.2), layerwise()),
    "balance of windows": lambda folder: (routed(0.2, **GATED), layerwise(gradient_accumulation_steps=3)),
    "bfloat16": lambda folder: (routed(0.2, **GATED), layerwise(bf16=True)),
    "kept outputs": lambda folder: (routed(), layerwise(teacher_outputs=str(folder / "kept"))),
    "maps and relations": lambda folder: (
        routed(),
        {
            "teacher": tiny_bert(1, hidden=32),
            "objective": MicroBertObjective("classification", [term for term in TERMS if term != "adversarial"]),
            "gradient_accumulation_steps": 2,
        },
    ),
    "labels by token and a mask": lambda folder: (
        tiny_mpoe(dropout=0.2, load_balance=0.5),
        {
            "data": text_data(18), "gradient_mask": {"probability": 0.5, "seed": 5}, "weight_decay": 0.1,
            "gradient_accumulation_steps": 2, "pad_to_multiple_of": 9, "num_train_epochs": 5,
        },
    ),
    "text to text": texts,
}  # fmt: skip


@pytest.mark.parametrize("name", mostly_slow(RUNS, {"hashes", "balance of windows"}))
def test_a_run_of_replays_ends_as_one_without(name, tmp_path, captures):
    """Also with dropout, and batches and windows of other sizes in between."""
    ended = []
    for graphs in (False, True):
        torch.manual_seed(0)
        model, options = RUNS[name](tmp_path)
        run = trainer(
            tmp_path, model, **{"data": tiny_data(18), "pad_to_multiple_of": 10, "cuda_graphs": graphs, **options}
        )
        run.train()
        ended.append(run)
    eager, replayed = ended
    tolerance = 1e-5 if name == "text to text" else 0  # its objective leaves no position out in a graph
    for term in run._names:
        assert terms_of(replayed, term) == pytest.approx(terms_of(eager, term), rel=tolerance, abs=0)
    assert_same_weights(replayed.model, weights(eager.model), tolerance)
    assert captures.count("captured") >= 1 and captures.count("replayed") >= 4


class Reads(LayerwiseObjective):
    """Looks at a value, for which a GPU's graph cannot wait."""

    def __call__(self, student_outputs, teacher_outputs, batch):
        terms = super().__call__(student_outputs, teacher_outputs, batch)
        return {name: term for name, term in terms.items() if float(term) >= 0}


def test_a_step_that_waits_stops_the_run(tmp_path, captures):
    run = trainer(
        tmp_path, teacher=tiny_bert(1), objective=Reads("classification"), cuda_graphs=True, pad_to_multiple_of=10
    )
    message = "cuda_graphs: expected a training step that can be captured, got one that cannot: operation not permitted"
    with pytest.raises(UserError, match=message):
        run.train()
    assert run.state.global_step == step_graphs.EAGER


def test_shapes_beyond_the_most_run_as_usual(tmp_path, captures, monkeypatch):
    monkeypatch.setattr(step_graphs, "MOST", 0)
    with pytest.warns(UserWarning, match="cuda_graphs: 0 shapes of batches have graphs, others run as usual"):
        trainer(tmp_path, cuda_graphs=True, pad_to_multiple_of=10).train()
    assert captures == []


def collate(rows):
    return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad_to_multiple_of": None}, "pad_to_multiple_of: expected a number with cuda_graphs, so that batches have"),
        ({"torch_compile": True}, "torch_compile: expected it off with cuda_graphs, got True"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing: expected it off with cuda_graphs, got True"),
        ({"torch_empty_cache_steps": 5}, "torch_empty_cache_steps: expected it off with cuda_graphs, got 5"),
        ({"optim": "lomo"}, "optim: expected it off with cuda_graphs, got"),
        (
            {
                "teacher": tiny_bert(1, hidden=32),
                "objective": MicroBertObjective("classification", TERMS, adversary=AdversaryConfig()),
            },
            "objective: expected none with a discriminator, whose weight changes, with cuda_graphs",
        ),
        ({"model": "task"}, "model: expected routers that read no values back with cuda_graphs, got router='task'"),
        ({"collator": collate}, "pad_to_multiple_of: expected a collator that has it, got collate"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused(options, message, tmp_path, captures):
    if options.get("model") == "task":
        tasks = {"three": ["a", "b", "c"], "two": ["no", "yes"]}
        options = {"model": convert_to_moe(tiny_bert(0), MoEConfig.task(tasks), importance=torch.rand(2, 32))}
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, **{"cuda_graphs": True, "pad_to_multiple_of": 10, **options})


def test_batches_are_tensors(captures):
    graphs = step_graphs.StepGraphs(torch.nn.Linear(1, 1).parameters())
    with pytest.raises(UserError, match="cuda_graphs: expected batches of tensors and plain values, got object"):
        graphs(lambda *_: None, None, {"input_ids": torch.ones(1), "other": object()}, 1.0, None)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"world_size": 2}, "cuda_graphs: expected one process, got 2"),
        ({"is_fsdp_enabled": True}, "fsdp: expected it off with cuda_graphs, got True"),
        ({"is_deepspeed_enabled": True}, "deepspeed: expected it off with cuda_graphs, got True"),
        ({"activation_checkpointing": True}, "gradient_checkpointing: expected it off with cuda_graphs, got True"),
    ],
)
def test_graphs_are_for_one_process(facts, message, tmp_path, captures):
    run = trainer(tmp_path)
    args = SimpleNamespace(**{**vars(run.args), "device": run.args.device, "world_size": 1, **facts})
    with pytest.raises(UserError, match=message):
        step_graphs.check_graphs(SimpleNamespace(**{**vars(run), "args": args, **facts}))


def test_without_a_gpu_there_are_no_graphs(tmp_path):
    with pytest.raises(UserError, match="cuda_graphs: expected a GPU, got cpu"):
        trainer(tmp_path, cuda_graphs=True, pad_to_multiple_of=8)
    with pytest.raises(UserError, match="pad_to_multiple_of: expected a number of at least 1, got 0"):
        trainer(tmp_path, pad_to_multiple_of=0)


def test_batches_are_padded_to_multiples(tmp_path):
    run = trainer(tmp_path, pad_to_multiple_of=8)
    lengths = {batch["input_ids"].shape[1] for batch in run.get_train_dataloader()}
    assert lengths <= {8, 16}


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_on_a_gpu(name, tmp_path):
    ended = []
    for graphs in (False, True):
        torch.manual_seed(0)
        model, options = RUNS[name](tmp_path)
        run = trainer(
            tmp_path, model, use_cpu=False,
            **{"data": tiny_data(18), "pad_to_multiple_of": 10, "cuda_graphs": graphs, **options},
        )  # fmt: skip
        run.train()
        ended.append(terms_of(run, "loss"))
        assert run._graphs is None or run._graphs._ready
    assert ended[1] == pytest.approx(ended[0], rel=1e-2)
