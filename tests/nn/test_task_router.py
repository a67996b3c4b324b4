import pytest
import torch

from moebert_kernels.errors import UserError
from moebert_kernels.nn import TaskRouter

N, E, B, T, H = 3, 4, 5, 6, 8
TASKS = torch.tensor([0, 2, 1, 0, 2])


def inputs():
    mask = torch.ones(B, T, dtype=torch.int64)
    mask[0, 4:] = 0
    mask[3, 1:] = 0
    return torch.randn(B, T, H), mask


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_all_tokens_of_a_task_share_the_most_probable_experts(top_k):
    x, mask = inputs()
    router = TaskRouter(N, E, top_k)
    expert_ids, weights = router(TASKS, x, mask)
    assert expert_ids.shape == weights.shape == (B, T, top_k)
    probabilities = router.logits.softmax(-1)
    for b, task in enumerate(TASKS):
        wanted = probabilities[task].topk(top_k)
        for t in range(T):
            assert expert_ids[b, t].tolist() == (wanted.indices.tolist() if mask[b, t] else [-1] * top_k)
            torch.testing.assert_close(weights[b, t], wanted.values)


def test_one_id_stands_for_the_batch():
    x, mask = inputs()
    router = TaskRouter(N, E)
    for got in (router(1, x, mask), router(torch.tensor(1), x, mask)):
        for one, many in zip(got, router(torch.full((B,), 1), x, mask), strict=True):
            assert torch.equal(one, many)


def test_routed_padding():
    x, mask = inputs()
    assert (TaskRouter(N, E, route_padding=True)(TASKS, x, mask)[0] >= 0).all()
    assert (TaskRouter(N, E)(TASKS, x)[0] >= 0).all()


def test_tasks_start_apart_and_equal_logits_go_to_the_first_experts():
    router = TaskRouter(50, E)
    assert len({tuple(row) for row in router.chosen()[0].tolist()}) > 3
    torch.testing.assert_close(router.chosen()[1], torch.full((50, 2), 1 / E), rtol=0, atol=0.03)
    torch.nn.init.zeros_(router.logits)
    assert router.chosen()[0].tolist() == [[0, 1]] * 50


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_gradient_reaches_every_logit_of_the_tasks_in_the_batch(top_k):
    x, mask = inputs()
    router = TaskRouter(N, E, top_k).double()
    present = torch.tensor([0, 0, 2, 2, 2])
    router(present, x.double(), mask)[1].sum().backward()
    assert (router.logits.grad[[0, 2]] != 0).all() and (router.logits.grad[1] == 0).all()
    routed = lambda logits: torch.func.functional_call(router, {"logits": logits}, (TASKS, x.double(), mask))[1]  # noqa: E731
    torch.autograd.gradcheck(routed, router.logits.detach().clone().requires_grad_())


def test_dtypes():
    x, mask = inputs()
    router = TaskRouter(N, E)
    exact = router.chosen()[0]
    assert router(0, x.bfloat16(), mask)[1].dtype == torch.bfloat16
    assert router.bfloat16().chosen()[1].dtype == torch.float32 and exact.dtype == torch.int64


@pytest.mark.parametrize(
    ("task_ids", "message"),
    [
        (N, r"task_ids: expected ids in \[0, 3\), one for each task, got 3"),
        (-1, r"task_ids: expected ids in \[0, 3\), one for each task, got -1"),
        (torch.tensor([0, 1, 2, 7, 0]), r"task_ids: expected ids in \[0, 3\), one for each task, got 7"),
        (torch.tensor([0, 1, -2, 2, 0]), r"task_ids: expected ids in \[0, 3\), one for each task, got -2"),
        (torch.zeros(B - 1, dtype=torch.int64), r"task_ids: expected shape \(B=5,\), got \(4,\)"),
        (torch.zeros(B), "task_ids: expected integers, got torch.float32"),
    ],
)
def test_wrong_task_ids(task_ids, message):
    with pytest.raises(UserError, match=message):
        TaskRouter(N, E)(task_ids, inputs()[0])


def test_wrong_sizes():
    with pytest.raises(UserError, match="num_tasks: expected an integer of at least 1, got 0"):
        TaskRouter(0, E)
    for top_k in (0, 5):
        with pytest.raises(UserError, match=f"top_k: expected 1 to num_experts=4, got {top_k}"):
            TaskRouter(N, E, top_k)


def test_state():
    router = TaskRouter(N, E)
    assert list(router.state_dict()) == ["logits"]
    assert "num_tasks=3, num_experts=4, top_k=2" in repr(router)
