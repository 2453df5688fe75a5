"""The vectors of merging-maths.md for the methods beside TIES, and what each promises of simple inputs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.single_tensor_models import merged
from worker.engine.methods.sparsified import ranked_probabilities

HALF = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("method", "sources", "parameters", "expected"),
    [
        ("model_stock", [[1, 0], [1, 1]], {}, [0.828427, 0.414214]),
        ("sce", [[1, 0.1], [-0.5, 0.2]], {}, [1, 0.122308]),
        ("ram", [[1, 0, 2], [0, 0, 4]], {}, [1, 0, 3]),
        ("nearswap", [[1e-4, 1e-2]], {"t": 0.001}, [1e-4, 1e-3]),
        # x0 changes one parameter alone and one together with x1: 1 + 0.1·min(0.2, 1/1); x1 none alone
        ("ramplus_tl", [[1, 0, 2], [0, 0, 4]], {}, [1.02, 0, 3]),
        # a fifth of ten is dropped as the largest, three tenths stay, the rest is dropped as the smallest
        (
            "breadcrumbs",
            [[1, -2, 3, -4, 5, -6, 7, -8, 9, -10]],
            {"density": 0.3, "gamma": 0.2},
            [0, 0, 0, 0, 0, -6, 7, -8, 0, 0],
        ),
        # int(0.01·10) is none
        (
            "breadcrumbs_ties",
            [[1, -2, 3, -4, 5, -6, 7, -8, 9, -10]],
            {"density": 0.3},
            [0, 0, 0, 0, 0, 0, 0, -8, 9, -10],
        ),
        # eight values of ten stay, so only two of the five outliers can go
        (
            "breadcrumbs",
            [[1, -2, 3, -4, 5, -6, 7, -8, 9, -10]],
            {"density": 0.8, "gamma": 0.5},
            [1, -2, 3, -4, 5, -6, 7, -8, 0, 0],
        ),
        # quartiles at ranks 2, 4, 6 of 0 to 9: 4 + 1.5·4 = 10, and 1000 alone is beyond
        ("arcee_fusion", [[0, 1, 2, 3, 4, 5, 6, 7, 8, 1000]], {}, [0, 0, 0, 0, 0, 0, 0, 0, 0, 1000]),
    ],
)
def test_vectors(
    method: str, sources: list[list[float]], parameters: dict[str, Any], expected: list[float], tmp_path: Path
) -> None:
    found, _ = merged(tmp_path, method, sources, **parameters)
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("method", "parameters", "expected"),
    [
        ("nuslerp", {}, [HALF, HALF]),
        ("multislerp", {}, [HALF, HALF]),
        ("karcher", {}, [HALF, HALF]),
    ],
)
def test_the_middle_of_a_right_angle(
    method: str, parameters: dict[str, Any], expected: list[float], tmp_path: Path
) -> None:
    found, _ = merged(tmp_path, method, [[1, 0], [0, 1]], named_base=False, **parameters)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_slerp_goes_from_the_base_to_the_source(tmp_path: Path) -> None:
    found, _ = merged(tmp_path, "slerp", [[0, 2]], base=[1, 0], t=1 / 3)
    assert found.tolist() == pytest.approx([math.sin(math.pi / 3), 2 * math.sin(math.pi / 6)], abs=1e-6)


def test_slerp_of_parallel_models_is_linear(tmp_path: Path) -> None:
    found, _ = merged(tmp_path, "slerp", [[3, 6]], base=[1, 2], t=0.25)
    assert found.tolist() == pytest.approx([1.5, 3], abs=1e-6)


def test_nuslerp_takes_the_seconds_share_of_the_weights(tmp_path: Path) -> None:
    found, _ = merged(tmp_path, "nuslerp", [[1, 0], [0, 1]], own=[{"weight": 2}, {"weight": 1}], named_base=False)
    assert found.tolist() == pytest.approx([math.sin(math.pi / 3), math.sin(math.pi / 6)], abs=1e-6)


def test_nuslerp_around_a_base_interpolates_task_vectors(tmp_path: Path) -> None:
    found, _ = merged(tmp_path, "nuslerp", [[11, 10], [10, 11]], base=[10, 10])
    assert found.tolist() == pytest.approx([10 + HALF, 10 + HALF], abs=1e-6)


@pytest.mark.parametrize(("row_wise", "expected"), [(False, [[HALF, HALF], [1, 1]]), (True, [[HALF, 1], [HALF, 1]])])
def test_nuslerp_by_vectors_of_the_last_axis_or_the_first(
    row_wise: bool, expected: list[list[float]], tmp_path: Path
) -> None:
    """In one of the vectors the sources stand at a right angle, in the other they are equal."""
    first, second = torch.tensor([[1.0, 0], [1, 1]]), torch.tensor([[0.0, 1], [1, 1]])
    if row_wise:
        first, second = first.T.contiguous(), second.T.contiguous()
    found, _ = merged(
        tmp_path,
        "nuslerp",
        [first, second],
        named_base=False,
        nuslerp_flatten=False,
        nuslerp_row_wise=row_wise,
    )
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_multislerp_has_the_weighted_mean_norm(tmp_path: Path) -> None:
    found, _ = merged(tmp_path, "multislerp", [[3, 0], [0, 1]], own=[{"weight": 1}, {"weight": 3}], named_base=False)
    assert found.norm().item() == pytest.approx(1.5, abs=1e-6)
    assert (found[1] / found[0]).item() == pytest.approx(3, abs=1e-5)


def test_the_karcher_mean_is_as_far_in_angle_from_one_as_from_the_other(tmp_path: Path) -> None:
    """Three directions in a plane at 0°, 30° and 120°: their mean angle is 50°, and the norm the mean of 1, 2 and 3."""
    directions = [
        [n * math.cos(math.radians(a)), n * math.sin(math.radians(a))] for n, a in ((1, 0), (2, 30), (3, 120))
    ]
    found, _ = merged(tmp_path, "karcher", directions, named_base=False, max_iter=50, tol=1e-9)
    assert math.degrees(math.atan2(found[1], found[0])) == pytest.approx(50, abs=1e-4)
    assert found.norm().item() == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize("early", [{"max_iter": 0}, {"tol": 0.5}])
def test_a_karcher_mean_that_stops_early_is_where_it_starts(early: dict[str, Any], tmp_path: Path) -> None:
    """At the direction of the sum of all directions, here 45°; the first step is of 5°, or 0.09."""
    directions = [
        [n * math.cos(math.radians(a)), n * math.sin(math.radians(a))] for n, a in ((1, 0), (2, 30), (3, 120))
    ]
    found, _ = merged(tmp_path, "karcher", directions, named_base=False, **early)
    assert math.degrees(math.atan2(found[1], found[0])) == pytest.approx(45, abs=1e-4)
    assert found.norm().item() == pytest.approx(2, abs=1e-6)


def test_model_stock_by_rows_has_a_ratio_for_each(tmp_path: Path) -> None:
    sources = [[[1.0, 0], [1, 0]], [[1.0, 1], [0, 1]]]
    found, _ = merged(tmp_path, "model_stock", sources, filter_wise=True)
    # the rows of the second are at a right angle: t = 0, and the base stays
    torch.testing.assert_close(found, torch.tensor([[0.828427, 0.414214], [0, 0]]), rtol=1e-6, atol=1e-6)


def test_sce_keeps_the_parameters_of_largest_variance(tmp_path: Path) -> None:
    sources = [[4, 1, 3, 0, 5], [0, 1, -3, 0, 4]]
    found, statistics = merged(tmp_path, "sce", sources, select_topk=0.67)
    # three parameters differ and int(0.67·3) of them stay: variances 4, 0, 9, 0, 0.25
    assert found.tolist() == [4, 0, 3, 0, 0]
    assert statistics.trimmed == pytest.approx((0.6, 0.6))


def test_della_keeps_the_larger_with_more_probability() -> None:
    """The five-wide row of merging-maths.md, density 0.5 and ε 0.1; equals: the lowest index counts as the largest."""
    found = ranked_probabilities(torch.tensor([[3.0, -1, 0.5, 9, -2], [1, 1, 1, -1, 1]]), 0.5, 0.1)
    assert found[0].tolist() == pytest.approx([0.55, 0.45, 0.4, 0.6, 0.5])
    assert found[1].tolist() == pytest.approx([0.6, 0.55, 0.5, 0.45, 0.4])


def test_della_of_a_row_of_one_keeps_it_with_the_density() -> None:
    assert ranked_probabilities(torch.tensor([[3.0], [1.0]]), 0.3, 0.1).tolist() == [[0.3], [0.3]]


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("dare_linear", {}),
        ("dare_ties", {}),
        ("della", {}),
        ("della_linear", {}),
        ("breadcrumbs", {}),
        ("breadcrumbs_ties", {}),
        ("multislerp", {}),
        ("sce", {}),
        ("passthrough", {}),
        ("slerp", {"t": 1.0}),
        ("nearswap", {"t": 100.0}),
    ],
)
def test_one_source_at_weight_one_and_density_one_returns_itself(
    method: str, parameters: dict[str, Any], tmp_path: Path
) -> None:
    values = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    base = torch.randn(20, 30, generator=torch.Generator().manual_seed(2))
    found, statistics = merged(tmp_path, method, [values], base=base, **parameters)
    torch.testing.assert_close(found, values, rtol=0, atol=1e-6)
    assert statistics.trimmed == (0.0,)


def test_the_karcher_mean_counts_a_base_that_is_named(tmp_path: Path) -> None:
    found, _ = merged(tmp_path, "karcher", [[0, 1]], base=[1, 0])
    assert found.tolist() == pytest.approx([HALF, HALF], abs=1e-6)


def test_passthrough_is_exact_and_scales(tmp_path: Path) -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(1)) * 1e-3
    base = torch.randn(500, generator=torch.Generator().manual_seed(2)) * 1e3
    assert torch.equal(merged(tmp_path, "passthrough", [values], base=base)[0], values)
    assert torch.equal(merged(tmp_path, "passthrough", [values], base=base, scale=0.3)[0], values * 0.3)
