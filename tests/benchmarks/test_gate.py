"""Nothing wrong is timed: providers with a defect are refused, and the refusal is in the result."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.gate import check
from benchmarks.measuring import Case, Provider, Requirement, Skipped, Target
from benchmarks.results import failures, run_case

T, H = 12, 16
ROOF = {"tflops": 1.0, "gbytes_per_s": 10.0}


@pytest.fixture(autouse=True)
def poison_uninitialised_memory() -> None:
    """Not here: the gate must find unwritten memory by itself, outside the tests too."""


@pytest.fixture
def linear() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(T, H), torch.randn(H, H)


def reference_of(x, w):
    return lambda dtype: (F.linear(x.to(dtype), w.to(dtype)),)


def sound(x, w):
    return lambda: (F.linear(x, w),)


def sign_flipped(x, w):
    return lambda: (-F.linear(x, w),)


def one_sign_flipped(x, w):
    def run():
        y = F.linear(x, w)
        y[3, 5] *= -1
        return (y,)

    return run


def row_unwritten(x, w):
    def run():
        y = torch.empty(T, H)
        y[:-1] = F.linear(x[:-1], w)
        return (y,)

    return run


def row_missing(x, w):
    return lambda: (F.linear(x[:-1], w),)


def output_missing(x, w):
    return lambda: ()


def input_changed(x, w):
    def run():
        y = -F.linear(x, w)
        x.neg_()
        return (y,)

    return run


def right_once(x, w):
    signs = [-1, 1]
    return lambda: (F.linear(x, w) * (signs.pop() if signs else -1),)


def rounded(x, w):
    return lambda: (F.linear(x.bfloat16(), w.bfloat16()),)


def raising(x, w):
    def run():
        raise RuntimeError("out of luck\nand more")

    return run


@pytest.mark.parametrize(
    "sabotage,reason",
    [
        (sign_flipped, "expected an error of at most"),
        (one_sign_flipped, "expected an error of at most"),
        (row_unwritten, f"{H} of {T * H} values are not finite or never written"),
        (row_missing, "expected shape"),
        (output_missing, "IndexError"),
        (input_changed, "expected an error of at most"),
        (right_once, "expected an error of at most"),
        (rounded, "output 0: expected torch.float32, got torch.bfloat16"),
        (raising, "RuntimeError: out of luck"),
    ],
)
def test_sabotaged_provider_is_refused(linear, sabotage, reason):
    checked = check({"sound": Provider(sound(*linear), reference_of(*linear)),
                     "sabotaged": Provider(sabotage(*linear), reference_of(*linear))}, torch.float32)  # fmt: skip
    assert set(checked.passed) == {"sound"}
    assert set(checked.refused) == {"sabotaged"}
    assert reason in checked.refused["sabotaged"]
    assert "\n" not in checked.refused["sabotaged"]


def test_unwritten_row_is_refused_even_where_memory_holds_the_right_values(linear):
    provider = Provider(row_unwritten(*linear), reference_of(*linear))
    for _ in range(5):
        sound(*linear)()  # leaves the right values behind in memory that may be handed out next
        assert check({"sabotaged": provider}).refused


def test_an_unwritten_integer_is_refused_too():
    def tail_unwritten():
        order = torch.empty(T, dtype=torch.int64)
        order[:-2] = torch.arange(T - 2)
        return (order,)

    for _ in range(5):
        torch.arange(T)
        assert check({"sabotaged": Provider(tail_unwritten, lambda dtype: (torch.arange(T).to(dtype),))}).refused


def test_memory_is_poisoned_only_while_providers_are_checked(linear):
    before = torch.empty, torch.Tensor.new_empty
    check({"raising": Provider(raising(*linear), reference_of(*linear))})
    assert (torch.empty, torch.Tensor.new_empty) == before


def test_refused_provider_has_a_reason_and_no_time(linear):
    providers = {"sound": sound, "sabotaged": sign_flipped}
    case = Case(
        name="linear",
        parameters={"T": T},
        providers=tuple(providers),
        build=lambda: {name: Provider(make(*linear), reference_of(*linear)) for name, make in providers.items()},
        baseline="sound",
        requires=(Requirement("sabotaged", "sound", 0.5),),
    )
    entry = run_case(case, Target.of("cpu"), ROOF, seconds=0.0, min_rounds=1)
    assert set(entry["providers"]["sabotaged"]) == {"refused"}
    assert entry["providers"]["sound"]["median_ms"] > 0
    assert entry["requirements"][0]["speed"] is None
    assert not entry["requirements"][0]["passed"]
    assert len(failures({"cases": [entry]})) == 2


def test_skipped_provider_has_a_reason_and_is_not_held_against_us(linear):
    case = Case(
        name="linear",
        parameters={"T": T},
        providers=("sound", "peer", "other"),
        build=lambda: {"sound": Provider(sound(*linear), reference_of(*linear)),
                       "peer": Skipped("not installed"), "other": Skipped("needs sm_90")},
        baseline="peer",
        requires=(Requirement("sound", "peer", 1.2), Requirement("sound", ("peer", "other"), 1.2)),
    )  # fmt: skip
    entry = run_case(case, Target.of("cpu"), ROOF, seconds=0.0, min_rounds=1)
    assert entry["providers"]["peer"] == {"skipped": "not installed"}
    assert "speed_over_baseline" not in entry["providers"]["sound"]
    assert entry["requirements"] == [] and failures({"cases": [entry]}) == []
