"""systemd's units and KEDA's example name commands, settings, metrics and labels that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import promql_parser as promql
import pytest
import typer
import yaml

from app.settings import Settings
from deploy import monitoring
from mergeyard.cli import cli
from tests.api.test_alerts import parts

ROOT = Path(__file__).parents[2]
UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
KEDA = ROOT / "deploy" / "kubernetes" / "keda.yaml"


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_runs_a_command_that_there_is_as_nobody_special(unit: Path) -> None:
    lines = [line.partition("=")[::2] for line in unit.read_text().splitlines() if "=" in line and line[0] != "#"]
    (command,) = [value for name, value in lines if name == "ExecStart"]
    program, word = command.split()
    assert program == "/opt/mergeyard/bin/mergeyard" and word in typer.main.get_command(cli).commands  # type: ignore[attr-defined]
    assert ("User", "mergeyard") in lines and ("NoNewPrivileges", "yes") in lines
    assert ("StateDirectory", "mergeyard") in lines and ("ProtectSystem", "strict") in lines


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed (Debian: systemd)")
    for unit in UNITS:  # its program need not be here
        text = unit.read_text().replace("/opt/mergeyard/bin/mergeyard", "/bin/true")
        (tmp_path / unit.name).write_text(text)
    names = [str(tmp_path / unit.name.replace("@", "@0")) for unit in UNITS if "@" not in unit.name]
    found = subprocess.run(
        [analyze, "verify", "--man=no", *names], check=False, capture_output=True, text=True, timeout=60
    )
    assert not [line for line in found.stderr.splitlines() if "mergeyard" in line], found.stderr


def test_keda_scales_by_figures_that_there_are() -> None:
    scaled = yaml.safe_load(KEDA.read_text())
    assert (scaled["apiVersion"], scaled["kind"]) == ("keda.sh/v1alpha1", "ScaledObject")
    spec = scaled["spec"]
    assert spec["minReplicaCount"] == 0 and spec["scaleTargetRef"]["name"]
    dashboard = json.loads(monitoring.DASHBOARD.read_text())
    exported = json.dumps(dashboard)
    for trigger in spec["triggers"]:
        assert trigger["type"] == "prometheus"
        assert all(isinstance(value, str) for value in trigger["metadata"].values()), "KEDA takes strings alone"
        selectors = [
            part
            for part in parts(promql.parse(trigger["metadata"]["query"]))
            if isinstance(part, promql.VectorSelector)
        ]
        assert selectors
        for selector in selectors:
            assert selector.name in exported
            for matcher in selector.matchers.matchers:
                assert f"by ({matcher.name}) ({selector.name})" in exported


@pytest.mark.parametrize("page", ["deployment.md", "scaling.md"])
def test_a_page_names_settings_and_files_that_there_are(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    known = {f"MERGEYARD_{name.upper()}" for name in Settings.model_fields}
    known |= {"MERGEYARD_STORE", "MERGEYARD_LISTEN", "MERGEYARD_UPSTREAM"}  # nginx's
    assert set(re.findall(r"MERGEYARD_[A-Z_]*[A-Z]", text)) <= known
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (ROOT / "docs" / link).exists(), link
