import pytest
import torch

from moebert_kernels.errors import UserError
from moebert_kernels.nn import HashRouter


def test_looks_up_and_skips():
    router = HashRouter(torch.tensor([2, 0, 1]), num_experts=3)
    ids = torch.tensor([[0, 1, 2], [2, 5, -1]])
    assert router(ids).tolist() == [[2, 0, 1], [1, -1, -1]]
    assert router(ids, torch.tensor([[1, 0, 1], [0, 1, 1]])).tolist() == [[2, -1, 1], [-1, -1, -1]]


def test_table_is_saved_and_moved():
    router = HashRouter(torch.randint(0, 4, (50,)), 4)
    other = HashRouter(torch.zeros(50, dtype=torch.int64), 4)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.table, router.table)
    assert router.to(torch.float16).table.dtype == torch.uint8
    assert not list(router.parameters())


def test_many_experts_need_a_wider_table():
    table = torch.randint(0, 300, (2000,))
    assert torch.equal(HashRouter(table, 300)(torch.arange(2000)), table.int())


@pytest.mark.parametrize(
    "table, message",
    [
        (torch.tensor([0, 4]), "table: expected experts in [0, 4), got values from 0 to 4"),
        (torch.tensor([-1, 2]), "table: expected experts in [0, 4), got values from -1 to 2"),
        (torch.tensor([256, 1]), "table: expected experts in [0, 4), got values from 1 to 256"),
        (torch.zeros(2), "table: expected integers, got torch.float32"),
        (torch.zeros(2, 2, dtype=torch.int64), "table: expected shape (V,), got (2, 2)"),
    ],
)
def test_rejects_a_bad_table(table, message):
    with pytest.raises(UserError) as error:
        HashRouter(table, 4)
    assert str(error.value) == message


@pytest.mark.parametrize("table", [torch.full((3,), 7), torch.zeros(5, dtype=torch.int64), torch.full((3,), 256)])
def test_rejects_a_bad_table_on_load(table):
    router = HashRouter(torch.tensor([0, 1, 2]), 3)
    with pytest.raises(UserError, match="table: expected"):
        router.load_state_dict({"table": table})
    assert router.table.tolist() == [0, 1, 2]


def test_resize():
    router = HashRouter(torch.tensor([0, 1, 2]), 3)
    router.resize(100)
    assert router.table[:3].tolist() == [0, 1, 2]
    assert router.vocab_size == 100
    assert set(router.table[3:].tolist()) == {0, 1, 2}
    router.resize(2)
    assert router.table.tolist() == [0, 1]
    assert router.state_dict()["table"].tolist() == [0, 1]
