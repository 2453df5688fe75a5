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


@pytest.mark.parametrize(
    ("url", "bucket"),
    [
        ("", None),
        ("/srv/artifacts", None),
        ("s3://yard-1.eu", ("yard-1.eu", "")),
        ("s3://yard/", ("yard", "")),
        ("s3://yard/a/b/", ("yard", "a/b")),
    ],
)
def test_a_store_is_a_folder_or_a_bucket(url: str, bucket: tuple[str, str] | None) -> None:
    assert Settings(artifact_store=url).bucket == bucket


@pytest.mark.parametrize("url", ["gs://yard/x", "s3://", "s3://Yard/x", "s3://yard/a b", "https://yard.s3.test/x"])
def test_any_other_store_is_refused_rather_than_made_a_folder(url: str) -> None:
    with pytest.raises(ValueError, match="s3://BUCKET/PREFIX"):
        Settings(artifact_store=url)


def test_nginx_has_no_way_into_a_bucket() -> None:
    with pytest.raises(ValueError, match="ACCEL_REDIRECT"):
        Settings(artifact_store="s3://yard/x", accel_redirect="/_artifacts/")


def test_the_secret_is_in_no_representation() -> None:
    assert "hush" not in repr(Settings(s3_secret_access_key="hush"))
