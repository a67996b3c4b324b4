"""The suite as pytest-benchmark sees it: one benchmark per case and provider, refused where the gate says so."""

import gc
from collections.abc import Callable

import pytest
import torch

from benchmarks import clocks, suites
from benchmarks.gate import Checked, check
from benchmarks.measuring import Case, Target


def pytest_addoption(parser, pluginmanager):
    parser.addoption("--smoke", action="store_true", help="tiny shapes: tries every benchmark, proves nothing")
    parser.addoption("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.addoption("--threads", type=int, help="torch's threads (default: 2, with --smoke 1)")
    if not pluginmanager.hasplugin("timeout"):  # pytest-timeout: a machine with a GPU may lack it
        parser.addini("timeout", "of pytest-timeout, without which nothing is ended")


def pytest_configure(config):
    config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout")


def target_of(config) -> Target:
    return Target.of(config.getoption("device"), config.getoption("smoke"))


def pytest_generate_tests(metafunc):
    if {"case", "provider"} <= set(metafunc.fixturenames):
        target = target_of(metafunc.config)
        cases = [case for what in suites.ALL for case in suites.cases(what, target)]
        pairs = [(case, provider) for case in cases for provider in case.providers]
        metafunc.parametrize("case,provider", pairs, ids=[f"{case.name}-{provider}" for case, provider in pairs])


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name == "test_cases.py":
            item.add_marker(pytest.mark.timeout(1800))  # the original's importance takes minutes


class CheckedCases:
    """The providers of the case in hand, built and checked once; those of the case before are let go."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.checked = Checked()

    def __call__(self, case: Case) -> Checked:
        if self.name != case.name:
            self.name, self.checked = None, Checked()
            gc.collect()
            self.checked = check(case.build(), case.dtype)
            self.name = case.name
        return self.checked


@pytest.fixture(scope="session")
def checked_cases(request) -> CheckedCases:
    config = request.config
    torch.set_num_threads(config.getoption("threads") or (1 if config.getoption("smoke") else 2))
    return CheckedCases()


@pytest.fixture
def run_provider(benchmark, checked_cases, request) -> Callable[[Case, str], None]:
    """Time one provider, if the gate lets it through. On a GPU: from the launch to the end of all work."""
    target = target_of(request.config)

    def run(case: Case, name: str) -> None:
        checked = checked_cases(case)
        if name in checked.skipped:
            pytest.skip(checked.skipped[name])
        if name in checked.refused:
            pytest.fail(f"{name} refused: {checked.refused[name]}")
        benchmark.group = case.name
        benchmark.extra_info.update(case.parameters, error_share_of_bound=checked.error_shares[name])
        if name in checked.slow_ms:
            benchmark.extra_info["slow_ms"] = checked.slow_ms[name]
            pytest.skip(f"slow: one call took {checked.slow_ms[name] / 1e3:.1f} s")
        provider = checked.passed[name]
        benchmark.extra_info.update(provider.facts)
        timer = clocks.timer(provider.run, target.device, provider.capture)
        if timer.how:
            benchmark.extra_info.update(how=timer.how, device_ms=timer.warm_ms())
        rounds = 1 if target.smoke else 7
        benchmark.pedantic(timer.finished, rounds=rounds, iterations=1, warmup_rounds=0 if target.smoke else 2)

    return run
