"""Where the defaults of the settings lead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from app.records.database import Database
from app.settings import Settings


@pytest.mark.parametrize("name", ["plain", "a?b", "a#b", "a%20b", "50%", "a b", "é:@&=+"])
def test_the_database_is_in_the_data_folder_whatever_its_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    database = Database(Settings(data_dir=folder, database_url="").database)
    database.migrate()
    database.check()
    database.close()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (folder / "mergeyard.sqlite3").stat().st_size > 0


def test_a_database_that_is_named_is_taken_as_it_is() -> None:
    url = "postgresql://me@db/merges?application_name=x"
    assert Settings(database_url=url).database == url


def test_reading_the_settings_imports_no_database() -> None:
    """`mergeyard --help` and the client's commands read them."""
    code = "import sys, app.settings; app.settings.Settings(); sys.exit('sqlalchemy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_object_storage_is_refused_rather_than_made_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEYARD_ARTIFACT_STORE", "s3://bucket/prefix")
    with pytest.raises(ValueError, match="object storage is not supported yet"):
        Settings()
