"""Fixtures of the engine's tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.engine import peft_zoo


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A base of each architecture, written when it is first asked for."""

    class Bases(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = peft_zoo.write_base(name, tmp_path_factory.mktemp("bases") / name.replace(" ", "-"))
            return self[name]

    return Bases()
