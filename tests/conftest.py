"""Every test starts from the same seed, and no test may read memory that nothing wrote."""

import gc
import os
import random
import signal

# Before torch: bitwise tests compare this process with those that it starts. OMP_NUM_THREADS=2 runs the suite so.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.captures import captures  # noqa: F401  a fixture

SLOW_TIMEOUT = 1200  # seconds; the longest of them took 48 on two cores, and on a slow machine over 300
signal.signal(signal.SIGINT, signal.default_int_handler)  # the processes of pytest-xdist ignore it; tests send it
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, so before any kernel module
with torch.device("meta"):
    torch.empty(0)  # torch notes its allocators now, before a test patches them: or "meta" would allocate
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test never depends on a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tests fork


def pytest_collection_finish():
    """Every training ends with a collection of garbage: 0.3 s less each without what was imported."""
    gc.freeze()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def device() -> torch.device:
    """Where ops run in this session: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def begin() -> None:
    """Seed torch and the standard library; a test that needs numpy takes its own generator."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # a test may have changed it
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture(autouse=True)
def seeded() -> None:
    begin()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef) -> None:
    """Fixtures of a module or session come before `seeded`, behind whatever test this process ran last."""
    if fixturedef.scope != "function":
        begin()


def poisoned(allocate):
    """`allocate`, with NaN in every floating-point result: a kernel that forgets a store gives NaN, not luck.

    Bytes are those of NaN, as they may be scratch of any type, and other integers the lowest.
    """
    wrong = {torch.uint8: 255, torch.int32: torch.iinfo(torch.int32).min, torch.int64: torch.iinfo(torch.int64).min}

    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if (tensor.is_floating_point() or tensor.dtype in wrong) and not tensor.is_meta:
            with torch.no_grad():
                tensor.fill_(wrong.get(tensor.dtype, float("nan")))
        return tensor

    return wrapper


@pytest.fixture(autouse=True)
def poison_uninitialised_memory(monkeypatch) -> None:
    """Patch the allocators, since torch.use_deterministic_algorithms would also hide nondeterminism of ours."""
    if os.environ.get("MOEBERT_KERNELS_TESTS_FILL") == "0":
        return  # a tool looks for reads of what nothing wrote
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
