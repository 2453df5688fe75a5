"""The models and mergekit's figures, written and read once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.figures import Figures, read_figures
from tests.conformance.models import ARCHITECTURES, write_root


@pytest.fixture(scope="package")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model root for each architecture; read only."""
    return {name: write_root(tmp_path_factory.mktemp(name), name) for name in ARCHITECTURES}


@pytest.fixture(scope="package")
def figures() -> dict[str, dict[str, Figures]]:
    """By architecture and case."""
    return {name: read_figures(name) for name in ARCHITECTURES}
