"""A model root for recipes with plain paths and ``models:`` references."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.api.serving import write_sources


@pytest.fixture(scope="session")
def sources_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("cli-models"))
