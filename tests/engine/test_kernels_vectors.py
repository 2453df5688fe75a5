"""The test vectors of merging-maths.md, through every room and cut into blocks of every awkward size."""

from __future__ import annotations

import math

import pytest
import torch

from app.planning.plan import Scalar
from tests.engine.one_tensor import ARTICLE, MERGEKIT, PAPER, PEFT, merge_one_tensor, plan_of
from tests.engine.rooms import room
from worker.engine.kernels import Kernels

A = [[2, 3, 0.1, 2.5, -0.2], [1, 2, 0.3, -2.5, 0.2], [-4, 1.5, -1.2, 0.4, 0.1]]
B = [[1, -0.2, 0.5, -0.9, 0.05, 0.3], [-0.6, 0.4, 0.7, -0.1, 0, -0.3]]
ONES = [1.0, 1.0, 1.0]
UNLIKE = [1.0, 0.5, 2.0]


@pytest.fixture(params=["reference", "cpu", "cuda"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return room(request.param)


@pytest.fixture(params=[None, 1, 2], ids=["whole", "blocks of 1", "blocks of 2"])
def block(request: pytest.FixtureRequest, kernels: Kernels) -> int | None:
    if kernels.name == "cuda" and request.param == 1 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter takes 2 s for each; blocks of 2 show the same")
    return request.param


@pytest.mark.parametrize(
    ("parameters", "weights", "density", "expected"),
    [
        (PAPER, ONES, 0.6, [-4, 2.1667, -1.2, -2.5, 0]),
        (PEFT, ONES, 0.6, [-4, 2.1667, -1.2, 2.5, 0]),
        (MERGEKIT, ONES, 0.6, [-4, 2.1667, -1.2, 2.5, 0]),
        (PEFT | {"elect": "count"}, ONES, 0.6, [1.5, 2.1667, -1.2, 2.5, 0]),
        (ARTICLE, ONES, 0.6, [0, 2.1667, 0, 0, 0]),
        (MERGEKIT, UNLIKE, 0.6, [-4, 2, -1.2, 2.5, 0]),
        (MERGEKIT | {"normalize": False}, UNLIKE, 0.6, [-8, 7, -2.4, 2.5, 0]),
        (PEFT, UNLIKE, 0.6, [-8, 2.3333, -2.4, 2.5, 0]),
        (PEFT | {"elect": "quorum", "quorum": 0.6}, ONES, 0.6, [1.5, 2.1667, 0, 0, 0]),
    ],
    ids=[
        "paper",
        "peft",
        "mergekit",
        "count",
        "article",
        "mergekit weighted",
        "mergekit weighted, not normalised",
        "peft weighted",
        "quorum",
    ],
)
def test_ties_on_vector_a(
    kernels: Kernels,
    block: int | None,
    parameters: dict[str, Scalar],
    weights: list[float],
    density: float,
    expected: list[float],
) -> None:
    merged = merge_one_tensor(kernels, "ties", plan_of(5, parameters, weights, density), torch.tensor(A), block=block)
    assert merged.values.tolist() == pytest.approx(expected, abs=5e-5)
    assert merged.kept == (3, 3, 3)


def test_vector_a_trimmed_as_two_tensors(kernels: Kernels) -> None:
    a = torch.tensor(A)
    left = merge_one_tensor(kernels, "ties", plan_of(2, PEFT, ONES, 0.6), a[:, :2])
    right = merge_one_tensor(kernels, "ties", plan_of(3, PEFT, ONES, 0.6), a[:, 2:])
    assert [*left.values.tolist(), *right.values.tolist()] == pytest.approx([-4, 2.5, -1.2, 2.5, 0])


@pytest.mark.parametrize(
    ("parameters", "weights", "expected"),
    [
        (MERGEKIT, [1.0, 1.0], [1, 0.4, 0.6, -0.9, 0, 0]),
        (MERGEKIT | {"normalize": False}, [1.0, 1.0], [1, 0.4, 1.2, -0.9, 0, 0]),
        (MERGEKIT, [0.2, 0.8], [-0.6, 0.4, 0.66, -0.9, 0, 0]),
    ],
)
def test_ties_on_vector_b(
    kernels: Kernels, block: int | None, parameters: dict[str, Scalar], weights: list[float], expected: list[float]
) -> None:
    merged = merge_one_tensor(kernels, "ties", plan_of(6, parameters, weights, 0.5), torch.tensor(B), block=block)
    assert merged.values.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("deltas", "weights", "expected"),
    [
        pytest.param([[0.5], [-0.5]], [1.0, 1.0], 0.5, id="a tie is positive"),
        pytest.param([[3.0], [-1.0]], [0.2, 0.8], -1.0, id="the weight decides the election"),
        pytest.param([[2.0]], [-0.5], 2.0, id="a negative weight alone normalises itself away"),
        pytest.param([[1.0], [-1.0]], [1.0, -0.9], 19.0, id="nearly cancelling weights explode"),
    ],
)
def test_ties_of_one_parameter(
    kernels: Kernels, deltas: list[list[float]], weights: list[float], expected: float
) -> None:
    merged = merge_one_tensor(kernels, "ties", plan_of(1, MERGEKIT, weights), torch.tensor(deltas))
    assert merged.values.item() == pytest.approx(expected, rel=1e-6)


def test_a_negative_weight_subtracts_without_normalize(kernels: Kernels) -> None:
    tensor = plan_of(1, MERGEKIT | {"normalize": False}, [-0.5])
    assert merge_one_tensor(kernels, "ties", tensor, torch.tensor([[2.0]])).values.item() == -1.0


def test_in_the_paper_a_weight_of_minus_one_subtracts_a_skill(kernels: Kernels) -> None:
    merged = merge_one_tensor(kernels, "ties", plan_of(2, PAPER, [1.0, -1.0]), torch.tensor([[1.0, 2.0], [-3.0, 4.0]]))
    # δ2 becomes [3, -4]: they agree at first and the larger mass wins the second.
    assert merged.values.tolist() == [2.0, -4.0]


def test_an_absent_source_counts_as_zeros_only_in_the_article(kernels: Kernels) -> None:
    agree = torch.tensor([[1.0], [2.0]])
    article = merge_one_tensor(kernels, "ties", plan_of(1, ARTICLE, [1.0, 1.0]), agree, sources=3)
    unanimous = ARTICLE | {"divisor": "agreeing"}
    present = merge_one_tensor(kernels, "ties", plan_of(1, unanimous, [1.0, 1.0]), agree, sources=3)
    assert article.values.item() == 0.0
    assert present.values.item() == 1.5


def test_lambda_scales_what_is_added_to_the_base(kernels: Kernels) -> None:
    tensor = plan_of(2, MERGEKIT | {"lambda": 0.5}, [1.0])
    merged = merge_one_tensor(kernels, "ties", tensor, torch.tensor([[1.0, -2.0]]), base=torch.tensor([10.0, 20.0]))
    assert merged.values.tolist() == [10.5, 19.0]


def test_rescale_keeps_the_l1_norm(kernels: Kernels, block: int | None) -> None:
    tensor = plan_of(4, MERGEKIT | {"rescale": True}, [1.0], 0.5)
    merged = merge_one_tensor(kernels, "ties", tensor, torch.tensor([[1.0, -3.0, 2.0, 4.0]]), block=block)
    assert merged.values.tolist() == pytest.approx([0, -3 * 10 / 7, 0, 4 * 10 / 7])


@pytest.mark.parametrize(
    ("parameters", "weights", "expected"),
    [
        ({"lambda": 0.5, "normalize": False}, [0.6, 0.4], [0.18, 0.02, 0.29, -0.29, 0.015, 0.03]),
        ({"lambda": 1.0, "normalize": False}, [1.0, 1.0], [0.4, 0.2, 1.2, -1.0, 0.05, 0.0]),
        ({"lambda": 1.0, "normalize": True}, [1.0, 1.0], [0.2, 0.1, 0.6, -0.5, 0.025, 0.0]),
        ({"lambda": 1.0, "normalize": True}, [1.0, -1.0], [1.6, -0.6, -0.2, -0.8, 0.05, 0.6]),
    ],
    ids=["weighted, λ ½", "plain sum", "mean", "weights of sum 0 count as 1"],
)
def test_task_arithmetic_on_vector_b(
    kernels: Kernels, block: int | None, parameters: dict[str, Scalar], weights: list[float], expected: list[float]
) -> None:
    tensor = plan_of(6, parameters, weights)
    base = torch.full((6,), 8.0)
    merged = merge_one_tensor(kernels, "task_arithmetic", tensor, torch.tensor(B), base=base, block=block)
    assert merged.values.tolist() == pytest.approx([8 + value for value in expected], abs=1e-6)


def test_plain_sum_of_vector_a(kernels: Kernels, block: int | None) -> None:
    tensor = plan_of(5, {"lambda": 1.0, "normalize": False}, ONES)
    merged = merge_one_tensor(kernels, "task_arithmetic", tensor, torch.tensor(A), block=block)
    assert merged.values.tolist() == pytest.approx([-1, 6.5, -0.8, 0.4, 0.1], abs=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_linear_is_the_weighted_sum_of_the_models(kernels: Kernels, normalize: bool) -> None:
    base = torch.tensor([1.0, -2.0, 0.5, 4.0, 0.0, 3.0])
    models = base + torch.tensor(B)
    weights = torch.tensor([0.25, 1.5])
    expected = (weights[:, None] * models).sum(0) / (weights.sum() if normalize else 1.0)
    tensor = plan_of(6, {"lambda": 1.0, "normalize": normalize}, weights.tolist())
    merged = merge_one_tensor(kernels, "linear", tensor, models - base, base=base)
    torch.testing.assert_close(merged.values, expected)


def test_an_untouched_tensor_still_counts_in_linear(kernels: Kernels) -> None:
    tensor = plan_of(1, {"lambda": 1.0, "normalize": True}, [1.0, 3.0])
    merged = merge_one_tensor(kernels, "linear", tensor, torch.tensor([[4.0], [0.0]]), base=torch.tensor([2.0]))
    assert merged.values.item() == 3.0


@pytest.mark.parametrize("size", [1, 3, 4, 7, 8])
def test_among_equals_the_lowest_flat_index_wins_across_blocks(kernels: Kernels, size: int) -> None:
    delta = torch.tensor([[1.0, -1.0, 2.0, 1.0, -1.0, 0.5, 1.0, 1.0]])
    tensor = plan_of(8, MERGEKIT, [1.0], 0.625)  # five: the 2, and four of the six ones
    merged = merge_one_tensor(kernels, "ties", tensor, delta, block=size)
    assert merged.values.tolist() == [1.0, -1.0, 2.0, 1.0, -1.0, 0.0, 0.0, 0.0]
    assert merged.kept == (5,)


def test_statistics_of_vector_a(kernels: Kernels) -> None:
    merged = merge_one_tensor(kernels, "ties", plan_of(5, PEFT, ONES, 0.6), torch.tensor(A))
    (block,) = merged.blocks
    assert block.kept == (3, 3, 3)
    assert block.squares == pytest.approx([19.3, 11.38, 19.86])
    assert (block.active, block.conflicts) == (4, 2)  # the first and the fourth have both signs
    assert block.merged_square == pytest.approx(16 + (6.5 / 3) ** 2 + 1.44 + 6.25)
    assert block.finite
    assert math.isfinite(sum(block.squares))
