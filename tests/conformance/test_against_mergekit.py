"""The same YAML gives mergekit's numbers here: every figure of ``figures/``, made by mergekit 0.1.5 in float32.

The figures are made anew by ``benchmarks/peers/mergekit.sh``. Where we differ on purpose stands in docs/mergekit.md.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer

from app.recipe.methods import METHODS
from tests.conformance.figures import Case, Figures, by_token, cases, uniform
from tests.conformance.merging import differing, merged_here
from tests.conformance.models import ARCHITECTURES
from worker.engine import masks

CASES = [case for case in cases() if not case.differs]


@pytest.fixture
def mergekit_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The random methods keep what they kept when the figures were made."""

    def keep_mask(
        seed: int, tensor: str, source: str, start: int, stop: int, probabilities: float | torch.Tensor
    ) -> torch.Tensor:
        reference, _ = json.loads(source)
        draws = uniform(tensor, reference.removeprefix("models:"), stop)[start:]
        return torch.from_numpy(draws) < torch.as_tensor(probabilities, dtype=torch.float64)

    monkeypatch.setattr(masks, "keep_mask", keep_mask)


@pytest.mark.usefixtures("mergekit_draws")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_recipe_gives_mergekit_s_numbers(
    case: Case, roots: dict[str, Path], figures: dict[str, dict[str, Figures]], tmp_path: Path
) -> None:
    theirs = figures[case.architecture][case.name]
    ours = merged_here(case.path.read_text(), roots[case.architecture], tmp_path / "out")
    if theirs.tokens is not None:
        aligned = by_token(ours, Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab())
        assert aligned.tokens == theirs.tokens
        ours = aligned.tensors
    assert differing(ours, theirs.tensors) == {}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_method_has_a_figure(architecture: str, figures: dict[str, dict[str, Figures]]) -> None:
    methods = {
        yaml.safe_load(case.path.read_text().split("\n---\n")[-1])["merge_method"]
        for case in cases()
        if case.architecture == architecture and case.name in figures[architecture]
    }
    ours_alone = {"core_space", "tsv", "iso_c", "knots"}
    assert METHODS.keys() - ours_alone <= methods


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_recipe_has_its_figures_and_every_figure_its_recipe(
    architecture: str, figures: dict[str, dict[str, Figures]]
) -> None:
    assert sorted(figures[architecture]) == sorted(case.name for case in cases() if case.architecture == architecture)
