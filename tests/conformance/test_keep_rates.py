"""What DARE and DELLA keep, as statistics: with masks of our own, in place of the ones injected for the comparison.

Seeds are fixed, so nothing here is left to luck; the bounds are four standard deviations of what is counted.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.single_tensor_models import merged

ROWS, COLUMNS = 400, 500


def _kept(tmp_path: Path, method: str, values: torch.Tensor, **parameters: Any) -> torch.Tensor:
    """Which values of a lone source's task vector are in the result."""
    found, _ = merged(tmp_path, method, [values], rescale=False, **parameters)
    assert torch.equal(found, torch.where(found != 0, values, 0.0))
    return found != 0


def _values() -> torch.Tensor:
    """No value is zero, and none is the like of another in its row."""
    ranks = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)).argsort(dim=1) + 1
    signs = torch.randint(2, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(4)) * 2 - 1
    return (ranks * signs).float()


def _bound(rate: float, count: int) -> float:
    return 4 * math.sqrt(rate * (1 - rate) / count)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_the_density_is_the_share_that_stays(method: str, density: float, tmp_path: Path) -> None:
    own = {"epsilon": 0.05} if method.startswith("della") else {}
    kept = _kept(tmp_path, method, _values(), density=density, **own)
    assert kept.double().mean().item() == pytest.approx(density, abs=_bound(density, kept.numel()))


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della_keeps_more_of_the_larger(method: str, tmp_path: Path) -> None:
    """Each tenth of a row's ranks has the rate of its middle: from 0.4 - 0.3 to 0.4 + 0.3."""
    values = _values()
    kept = _kept(tmp_path, method, values, density=0.4, epsilon=0.3)
    tenth = ((values.abs() - 1) * 10 // COLUMNS).long()
    rates = [kept[tenth == step].double().mean().item() for step in range(10)]
    expected = [0.4 - 0.3 + 0.6 * (step * 50 + 24.5) / 499 for step in range(10)]
    assert rates == pytest.approx(expected, abs=_bound(0.5, kept.numel() // 10))


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_two_seeds_and_two_sources_keep_values_independently(method: str, tmp_path: Path) -> None:
    parameters: dict[str, Any] = {"density": 0.5, "rescale": False}
    if method == "della_linear":
        parameters["epsilon"] = 1e-9
    ones = torch.ones(ROWS, COLUMNS)
    # powers of two, so that the sum tells which of the two stayed
    both, _ = merged(tmp_path / "both", method, [ones, ones * 2], **parameters)
    first, _ = merged(tmp_path / "seeded", method, [ones], seed=1, **parameters)
    masks = [(both % 2) == 1, both >= 2, first != 0]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        together = (masks[one] & masks[other]).double().mean().item()
        assert together == pytest.approx(0.25, abs=_bound(0.25, ROWS * COLUMNS))
