"""What comparisons of arms make of their runs, on made-up ones."""

import json

import numpy as np
import pytest
from scipy import stats

from moebert_kernels.data.metrics import compute_metrics
from moebert_kernels.data.tasks import TASKS
from moebert_kernels.distill.recipe import load_recipe
from moebert_kernels.errors import UserError
from moebert_kernels.files import once
from moebert_kernels.study.ablation import ARMS, draw, recipe_of_arm, repeated_arms, summary, table
from moebert_kernels.study.paired import Judged, bootstrap_interval, bootstrap_scores, paired_t


def test_equal_counts_of_examples_do_not_differ():
    assert paired_t([900 / 1043 - 897 / 1043, 911 / 1043 - 908 / 1043]) is None
    assert paired_t([0.1, 0.1]) is None and paired_t([0.1]) is None and paired_t([]) is None
    assert 0 < paired_t([0.1, 0.2]) < 1


NAMES = {name: TASKS[name] for name in ("sst2", "stsb")}


def made_up(arms=("full", "kd"), seeds=(0, 1, 2), rows=80):
    """References and runs whose predictions are right more often in the first arm."""
    generator = np.random.default_rng(0)
    references = {"sst2": generator.integers(2, size=rows).tolist(), "stsb": generator.normal(size=rows).tolist()}
    records = []
    for number, arm in enumerate(arms):
        for name, truth in references.items():
            for seed in seeds:
                noise = np.random.default_rng([number, seed]).normal(size=rows)
                if name == "sst2":
                    predictions = np.where(noise > 1.0 - 0.5 * number, 1 - np.array(truth), truth)
                else:
                    predictions = np.array(truth) + (0.5 + number) * noise
                metrics = compute_metrics(NAMES[name], predictions, truth)
                records.append({
                    "arm": arm, "task": name, "seed": seed, "score": metrics[NAMES[name].main_metric],
                    "teacher_score": 0.9, "predictions": predictions.tolist(), "seconds": 1.0,
                })  # fmt: skip
    return references, records


def test_summary(tmp_path):
    references, records = made_up()
    report = summary(records, NAMES, references, ("full", "kd"), rounds=200)
    scores = {(r["arm"], r["task"], r["seed"]): r["score"] for r in records}
    kd = report["arms"]["kd"]
    assert report["seeds"] == [0, 1, 2] and report["baseline"] == "full"
    assert kd["score"]["sst2"]["values"] == [scores["kd", "sst2", seed] for seed in range(3)]
    averages = [(scores["kd", "sst2", s] + scores["kd", "stsb", s]) / 2 for s in range(3)]
    assert kd["average"]["values"] == pytest.approx(averages)
    assert kd["retention"]["values"] == pytest.approx([value / 0.9 for value in averages])
    ours, theirs = ([scores[arm, t, s] for t in NAMES for s in range(3)] for arm in ("kd", "full"))
    assert kd["difference"]["p"] == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    change = kd["difference"]
    assert change["low"] < change["mean"] < change["high"] < 0
    full = report["arms"]["full"]["difference"]
    assert (full["mean"], full["p"], full["low"], full["high"]) == (0.0, None, 0.0, 0.0)

    text = table(json.loads(json.dumps(report)))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 1 + 2 and len({row.count("|") for row in rows}) == 1
    assert rows[2].startswith("| teacher | 90.0 ± 0.0 | 90.0 ± 0.0 | 90.0 |")
    assert f"| {100 * change['mean']:+.1f} | " in rows[4]
    draw(report, tmp_path / "chart.png", "made up")
    assert (tmp_path / "chart.png").stat().st_size > 1000

    nothing = [record | {"teacher_score": 0.0} for record in records]
    undefined = summary(nothing, NAMES, references, ("full", "kd"), rounds=2)
    assert undefined["arms"]["kd"]["retention"] is None and "|  |" in table(undefined)
    without = [r for r in records if (r["arm"], r["task"], r["seed"]) != ("kd", "stsb", 1)]
    assert summary(without, NAMES, references, ("full", "kd"), rounds=2)["seeds"] == [0, 2]
    with pytest.raises(UserError, match="ablation: expected a seed with runs of full, lean on sst2, stsb, got none"):
        summary(records, NAMES, references, ("full", "lean"))


def test_teachers_that_differ_stand_apart():
    references, records = made_up(("full", "no-moe"))
    records = [r | ({"teacher_score": 0.8} if r["arm"] == "no-moe" else {}) for r in records]
    text = table(summary(records, NAMES, references, ("full", "no-moe"), rounds=2))
    assert "| teacher of full | 90.0" in text and "| teacher of -MoE | 80.0" in text


def test_bootstrap_covers_what_it_should():
    """Of many made-up pairs of equally good models, about 95 % of the intervals hold 0; equal predictions give 0."""
    generator, inside, n = np.random.default_rng(0), 0, 60
    for number in range(60):
        truth = generator.integers(2, size=n)
        models = [np.where(generator.random(n) < 0.25, 1 - truth, truth) for _ in range(2)]
        one, other = (
            bootstrap_scores({"sst2": Judged(NAMES["sst2"], truth, [p])}, 100, seed=number) for p in models
        )  # fmt: skip
        low, high = bootstrap_interval(one, other)
        inside += low <= 0 <= high
    assert 50 <= inside <= 60
    assert bootstrap_interval(one, one) == (0.0, 0.0)


def test_paired_t_needs_pairs_that_differ():
    assert paired_t([0.1]) is None and paired_t([0.1, 0.1]) is None
    assert paired_t([0.1, 0.2, 0.3]) == pytest.approx(stats.ttest_rel([1.1, 2.2, 3.3], [1, 2, 3]).pvalue)


def test_arms_leave_out_what_they_say():
    recipe = load_recipe("microbert")
    terms = {arm: recipe.with_values(ARMS[arm].values).active[0].terms for arm in ARMS}
    assert terms["full"] == ("embedding", "hidden", "alignment", "soft", "adversarial") == terms["no-moe"]
    assert terms["no-fal"] == ("embedding", "hidden", "soft", "adversarial")
    assert terms["no-gan"] == ("embedding", "hidden", "alignment", "soft")
    assert terms["no-hidden"] == ("alignment", "soft", "adversarial")
    lean, preset = recipe.with_values(ARMS["lean"].values), load_recipe("microbert-lean")
    assert lean.active[0].weights == preset.active[0].weights
    assert lean.active[0].settings["objective_options"] == preset.active[0].settings["objective_options"]
    assert terms["lean"] == load_recipe("microbert-lean").active[0].terms == ("alignment", "soft")
    assert terms["kd"] == load_recipe("kd").active[0].terms == ("soft",)
    assert terms["finetune"] == () and recipe.with_values(ARMS["finetune"].values).active[0].weights == {"task": 1}
    assert [name for name, arm in ARMS.items() if arm.dense_teacher] == ["no-moe"]


def test_arms_of_two_stages_train_for_as_many_epochs():
    recipe = load_recipe("microbert-two-stage")
    for arm in ARMS:
        epochs = [stage.settings["num_train_epochs"] for stage in recipe_of_arm(recipe, arm).active]
        assert sum(epochs) == 13, arm
    (alone,) = recipe_of_arm(recipe, "kd").active
    assert (alone.name, alone.settings["num_train_epochs"], alone.settings.get("max_steps")) == (
        "predictions",
        13,
        None,
    )
    short = recipe_of_arm(recipe.with_values({"max_steps": 5}), "kd").active[0].settings
    assert (short["num_train_epochs"], short["max_steps"]) == (13, 10)
    assert recipe_of_arm(load_recipe("microbert"), "kd").active[0].settings["num_train_epochs"] == 5


def test_arms_that_do_the_same():
    def repeated(recipe):
        return repeated_arms(load_recipe(recipe), ARMS)

    assert repeated("microbert") == {} == repeated("microbert-two-stage")
    assert repeated("microbert-lean") == {"no-gan": "full", "no-hidden": "full", "lean": "full", "kd": "no-fal"}
    assert {"no-fal", "no-gan", "no-hidden", "kd"} <= set(repeated("kd")) and "no-moe" not in repeated("kd")


def test_once(tmp_path):
    made = []
    for _ in range(2):
        assert once(tmp_path / "a/b.json", lambda: made.append(1) or {"x": 1}) == {"x": 1}
    assert made == [1]
