"""The same YAML gives mergekit's numbers here: every figure of ``figures/``, made by mergekit 0.1.5 in float32.

The figures are made anew by ``benchmarks/peers/mergekit.sh``. Where we differ on purpose stands in docs/mergekit.md.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer

from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.recipe.methods import METHODS
from app.recipe.parse import LATER_KEYS
from app.sources.resolver import Resolver
from tests.conformance.figures import Case, Figures, by_token, cases, read_figures, uniform
from tests.conformance.models import ARCHITECTURES, write_root
from tests.engine.merges import merge, tensors_of
from worker.engine import masks

TOLERANCE = 1e-6  # of the largest magnitude of each tensor

WAITING = frozenset(
    ["filters-alone", "flags-over-layers", "linear-base-unlisted", "karcher-base-unlisted", "adapters-passthrough"]
)  # grammar that is not here yet


def _ready(case: Case) -> bool:
    """Whether this version carries the recipe out."""
    documents = list(yaml.safe_load_all(case.path.read_text()))
    recipe = documents[-1]
    later = any(key in recipe for key in LATER_KEYS) or "+" in recipe.get("base_model", "")
    return len(documents) == 1 and recipe["merge_method"] in METHODS and not later and case.name not in WAITING


CASES = [case for case in cases() if _ready(case)]


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_root(tmp_path_factory.mktemp(name), name) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def figures() -> dict[str, dict[str, Figures]]:
    return {name: read_figures(name) for name in ARCHITECTURES}


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
    wanted = figures[case.architecture][case.name]
    theirs = wanted.tensors
    plan = make_plan(parse_recipe(case.path.read_text()), Resolver(roots=[roots[case.architecture]]))
    merge(plan, tmp_path / "out")
    ours = {name: values.float().numpy() for name, values in tensors_of(tmp_path / "out").items()}
    if wanted.tokens is not None:
        aligned = by_token(ours, Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab())
        assert aligned.tokens == wanted.tokens
        ours = dict(aligned.tensors)
    assert {name: values.shape for name, values in ours.items()} == {n: values.shape for n, values in theirs.items()}
    differing = {
        name: float(error)
        for name, values in theirs.items()
        if (error := np.abs(ours[name] - values).max() / np.abs(values).max()) > TOLERANCE
    }
    assert differing == {}


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
