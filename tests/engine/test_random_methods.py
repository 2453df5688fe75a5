"""DARE and DELLA: what they keep, how they scale it, and that only seed, tensor and source decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from app.errors import MergeyardError
from tests.engine.merges import bytes_of, merge, plan_of, tensors_of
from tests.engine.single_tensor_models import merged
from tests.files import write_adapter, write_model
from worker.engine import masks

RANDOM = ["dare_linear", "dare_ties", "della", "della_linear"]


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", RANDOM)
def test_the_share_kept_is_the_density(method: str, tmp_path: Path) -> None:
    """200 000 values: five standard deviations are about half a percent."""
    found, statistics = merged(tmp_path, method, [values(400, 500)], density=0.3)
    kept = found.count_nonzero().item() / found.numel()
    assert kept == pytest.approx(0.3, abs=0.0052)
    assert statistics.trimmed == (pytest.approx(1 - kept),)


def test_della_keeps_the_largest_of_a_row_more_often_than_the_smallest(tmp_path: Path) -> None:
    """10 000 rows of five; the probabilities of merging-maths.md, each within five standard deviations."""
    source = values(10_000, 5)
    found, _ = merged(tmp_path, "della_linear", [source], density=0.5, epsilon=0.1)
    by_rank = (found != 0).gather(1, source.abs().argsort(dim=1)).double().mean(0)
    assert by_rank.tolist() == pytest.approx([0.4, 0.45, 0.5, 0.55, 0.6], abs=0.025)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear", "dare_ties", "della"])
def test_what_is_kept_has_the_l1_norm_of_before(method: str, tmp_path: Path) -> None:
    source = values(50, 80)
    found, statistics = merged(tmp_path, method, [source], density=0.4)
    assert found.abs().sum().item() == pytest.approx(source.abs().sum().item(), rel=1e-5)
    assert statistics.source_norms == (pytest.approx(source.double().norm().item()),)
    kept = found != 0
    ratios = found[kept] / source[kept]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))


def test_the_papers_divide_by_the_probability(tmp_path: Path) -> None:
    source = values(50, 80)
    found, _ = merged(tmp_path, "dare_linear", [source], density=0.4, rescale_by="probability")
    kept = found != 0
    torch.testing.assert_close(found[kept], source[kept] / 0.4)


def test_della_divides_each_value_by_its_own_probability(tmp_path: Path) -> None:
    source = torch.tensor([[1.0, 2, 3, 4, 5]]).repeat(40, 1)
    found, _ = merged(tmp_path, "della_linear", [source], density=0.5, epsilon=0.1, rescale_by="probability")
    expected = source / torch.tensor([0.4, 0.45, 0.5, 0.55, 0.6])
    torch.testing.assert_close(found, torch.where(found != 0, expected, 0.0))


@pytest.mark.parametrize("method", RANDOM)
def test_without_rescale_values_stay_as_they_are(method: str, tmp_path: Path) -> None:
    source = values(50, 80)
    found, _ = merged(tmp_path, method, [source], density=0.4, rescale=False)
    assert torch.equal(found, torch.where(found != 0, source, 0.0))


@pytest.mark.parametrize("method", RANDOM)
def test_a_seed_gives_the_same_values_and_another_seed_others(method: str, tmp_path: Path) -> None:
    first, again, other = (merged(tmp_path, method, [values(50, 80)], density=0.4, seed=seed)[0] for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_another_seed_is_another_merge(tmp_path: Path) -> None:
    write_model(tmp_path / "base")
    write_adapter(tmp_path / "sql")
    wanted: dict[str, Any] = {"base_model": "base", "merge_method": "dare_ties", "models": [{"adapter": "sql"}]}
    plans = [plan_of(tmp_path, {**wanted, "parameters": {"seed": seed}}) for seed in (0, 1)]
    assert plans[0].digest == plan_of(tmp_path, wanted).digest
    assert plans[0].digest != plans[1].digest


@pytest.mark.parametrize("method", RANDOM)
def test_a_source_keeps_its_mask_whatever_stands_beside_it(method: str, tmp_path: Path) -> None:
    """x1 changes nothing where x0 does; alone or second in the recipe, x0 is thinned out alike."""
    left, right = values(20, 30), values(20, 30, seed=1)
    left[10:], right[:10] = 0, 0
    for name, tensor in (("base", torch.zeros(20, 30)), ("x0", left), ("x1", right)):
        write_model(tmp_path / name, {"w": tensor})
    found = []
    for models in ([{"model": "x0"}], [{"model": "x1"}, {"model": "x0"}]):
        parameters = {"density": 0.4, "rescale": False, "normalize": False}
        wanted = {"base_model": "base", "merge_method": method, "models": models, "parameters": parameters}
        out = tmp_path / f"out-{len(models)}"
        merge(plan_of(tmp_path, wanted), out)
        found.append(tensors_of(out)["w"][:10])
    assert torch.equal(*found)


def test_the_same_source_twice_is_thinned_out_in_two_ways(tmp_path: Path) -> None:
    write_model(tmp_path / "base", {"w": torch.zeros(20, 30)})
    write_model(tmp_path / "x", {"w": values(20, 30)})
    wanted = {
        "base_model": "base",
        "merge_method": "dare_linear",
        "models": [{"model": "x"}, {"model": "x"}],
        "parameters": {"density": 0.5, "rescale": False},
    }
    merge(plan_of(tmp_path, wanted), tmp_path / "out")
    counted = (tensors_of(tmp_path / "out")["w"] / values(20, 30)).round().unique().tolist()
    assert counted == [0, 1, 2]  # by none of them, by one, by both


def test_the_masks_can_be_given_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the conformance suite gives mergekit and us the same ones."""

    def every_other(
        _seed: int, tensor: str, source: str, start: int, stop: int, _probabilities: float | torch.Tensor
    ) -> torch.Tensor:
        assert (tensor, source) == ("w", '["models:x0", 0]')
        return torch.arange(start, stop) % 2 == 0

    monkeypatch.setattr(masks, "keep_mask", every_other)
    found, _ = merged(tmp_path, "dare_linear", [[1, 2, 3, 4]], density=0.5, rescale=False)
    assert found.tolist() == [1, 0, 3, 0]


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.9, 0.15), (0.5, 0.5)])
def test_della_refuses_probabilities_beyond_zero_and_one(density: float, epsilon: float, tmp_path: Path) -> None:
    with pytest.raises(MergeyardError, match="density ± epsilon") as refused:
        merged(tmp_path, "della", [values(4, 4)], density=density, epsilon=epsilon)
    assert refused.value.code == "parameter_invalid"


def test_a_merge_of_many_blocks_has_the_bytes_of_its_seed(tmp_path: Path) -> None:
    """Rows of 1037 values, several blocks of the real size, threads and memory as they come."""
    write_model(tmp_path / "base", {"m.q_proj.weight": values(700, 1037).bfloat16()})
    for index in range(2):
        write_model(tmp_path / f"x{index}", {"m.q_proj.weight": values(700, 1037, seed=index + 1).bfloat16()})
    models = [{"model": "x0"}, {"model": "x1"}]
    wanted = {"base_model": "base", "merge_method": "della", "models": models, "parameters": {"density": 0.3}}
    found = []
    for threads, budget in ((1, 0), (4, 1 << 30)):
        merge(plan_of(tmp_path, wanted), tmp_path / f"out-{len(found)}", threads=threads, delta_budget=budget)
        found.append(bytes_of(tmp_path / f"out-{len(found)}"))
    assert found[0] == found[1]
