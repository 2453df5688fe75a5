"""A recipe merged here, and how far the result is from another."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.sources.resolver import Resolver
from tests.conformance.models import Tensors
from tests.engine.merges import merge, tensors_of

TOLERANCE = 1e-6  # of the largest magnitude of each tensor


def merged_here(recipe: str, root: Path, out: Path) -> Tensors:
    """The tensors of the result, in float32 whatever the files hold."""
    merge(make_plan(parse_recipe(recipe), Resolver(roots=[root])), out)
    return {name: values.float().numpy() for name, values in tensors_of(out).items()}


def differing(ours: Tensors, theirs: Tensors) -> dict[str, float | str]:
    """The tensors that only one side has, that have two shapes, or whose values differ, and by which share."""
    found: dict[str, float | str] = dict.fromkeys(ours.keys() ^ theirs.keys(), "of one side")
    for name in ours.keys() & theirs.keys():
        one, other = ours[name], theirs[name]
        if one.shape != other.shape:
            found[name] = f"{one.shape} and {other.shape}"
            continue
        error, largest = float(np.abs(one - other).max()), float(np.abs(other).max())
        if not error <= TOLERANCE * largest:  # what is not a number differs
            found[name] = error / largest if largest else error
    return found
