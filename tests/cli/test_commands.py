"""The commands that need no service: plan, merge, and what every command does with what is wrong."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from app.api.examples import RECIPE, RECIPE_YAML
from tests import files
from tests.cli.commands import environment, mergeyard


@pytest.fixture
def recipe(tmp_path: Path, sources_root: Path) -> Path:
    """A recipe with plain paths, one of them relative to it."""
    (tmp_path / "sql").symlink_to(sources_root / "adapters" / "sql")
    models = [{"adapter": "sql"}, {"adapter": str(sources_root / "adapters" / "json")}]
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**RECIPE, "base_model": str(sources_root / "smollm2-135m-instruct"), "models": models}))
    return path


class TestHelp:
    def test_needs_neither_torch_nor_the_service(self) -> None:
        code = (
            "import sys, typer.testing, mergeyard.cli as c; r = typer.testing.CliRunner().invoke(c.cli, ['--help']);"
            "print(r.exit_code, [m for m in ('torch', 'fastapi', 'sqlalchemy', 'httpx', 'app') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "0 []"

    def test_names_the_commands_of_the_design(self) -> None:
        out = mergeyard("--help").out
        for command in [
            "merge",
            "plan",
            "extract",
            "evaluate",
            "up",
            "api",
            "worker",
            "migrate",
            "submit",
            "list",
            "status",
            "events",
            "cancel",
            "download",
        ]:  # fixed: other things are built on them
            assert f" {command} " in out


class TestPlan:
    def test_shows_sources_and_what_it_takes(self, recipe: Path) -> None:
        ran = mergeyard("plan", recipe)
        assert ran.code == 0
        for text in ("base", "adapter", "4 of 6", "peak memory", "fingerprint", "model.layers.0.mlp.up_proj.weight"):
            assert text in ran.out

    def test_as_json_is_what_the_api_answers(self, recipe: Path) -> None:
        ran = mergeyard("plan", recipe, "--json")
        assert (ran.code, ran.json["method"], ran.json["estimates"]["tensors_touched"]) == (0, "ties", 4)

    def test_shows_each_document(self, recipe: Path) -> None:
        both = {**json.loads(recipe.read_text()), "name": "both"}
        averaged = {"merge_method": "linear", "models": [{"model": both["base_model"]}, {"model": "both"}]}
        recipe.write_text("\n---\n".join(json.dumps(part) for part in (both, averaged)))
        ran = mergeyard("plan", recipe)
        assert ran.code == 0, ran.err
        for text in ("both: ties, 1.0 kB until the result is finished", "the result: linear", "beside it"):
            assert text in ran.out

    def test_takes_references_below_the_roots(self, tmp_path: Path, sources_root: Path) -> None:
        ran = mergeyard("plan", "-", "--json", stdin=RECIPE_YAML, MERGEYARD_MODEL_ROOTS=str(sources_root))
        assert ran.json["base"]["reference"] == "models:smollm2-135m-instruct"

    def test_lists_every_problem_with_its_place(self, recipe: Path) -> None:
        wrong = json.loads(recipe.read_text())
        wrong["parameters"] = {"densty": 0.5}
        wrong["models"][0]["parameters"] = {"density": 7}
        recipe.write_text(json.dumps(wrong))
        ran = mergeyard("plan", recipe)
        assert (ran.code, ran.out) == (2, "")
        assert "2 problems:" in ran.err
        assert "unknown_key at parameters.densty" in ran.err and "did you mean `density`?" in ran.err
        assert "parameter_invalid at models[0].parameters.density" in ran.err

    def test_shows_warnings(self, recipe: Path) -> None:
        negative = json.loads(recipe.read_text())
        negative["models"][0]["parameters"] = {"weight": -0.5}
        negative["parameters"] = {"normalize": True}
        recipe.write_text(json.dumps(negative))
        ran = mergeyard("plan", recipe)
        assert ran.code == 0
        assert "warning" in ran.err


class TestMerge:
    def test_writes_a_folder_that_its_manifest_describes(self, recipe: Path, tmp_path: Path) -> None:
        ran = mergeyard("merge", recipe, tmp_path / "out", "--threads", "1", MERGEYARD_DATA_DIR=str(tmp_path / "data"))
        assert ran.code == 0, ran.err
        assert not (tmp_path / "data").exists()  # a folder of one's own is not strewn with ours
        manifest = json.loads((tmp_path / "out" / "mergeyard.json").read_text())
        for file in manifest["files"]:
            data = (tmp_path / "out" / file["name"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (file["size"], file["sha256"])
        assert len(load_file(tmp_path / "out" / "model.safetensors")) == 6
        assert f"files, {sum(f['size'] for f in manifest['files']) / 1000:.1f} kB" in ran.out

    def test_as_json_prints_the_manifest_and_nothing_else(self, recipe: Path, tmp_path: Path) -> None:
        ran = mergeyard("merge", recipe, tmp_path / "out", "--json")
        manifest = json.loads((tmp_path / "out" / "mergeyard.json").read_text())
        assert {key: value for key, value in ran.json.items() if key != "out"} == manifest

    def test_sources_are_hashed_once_where_there_is_a_data_folder(self, recipe: Path, tmp_path: Path) -> None:
        data = tmp_path / "data"
        data.mkdir()
        mergeyard("merge", recipe, tmp_path / "first", MERGEYARD_DATA_DIR=str(data))
        remembered = list((data / "digests").iterdir())
        assert remembered
        for path in remembered:
            path.write_text("0" * 64 + "\n")
        mergeyard("merge", recipe, tmp_path / "second", MERGEYARD_DATA_DIR=str(data))
        manifest = json.loads((tmp_path / "second" / "mergeyard.json").read_text())
        assert {digest for source in manifest["sources"] for digest in source["files"].values()} == {"0" * 64}

    def test_does_not_touch_a_folder_that_is_there(self, recipe: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / "mine").write_text("mine")
        ran = mergeyard("merge", recipe, out)
        assert (ran.code, [path.name for path in out.iterdir()]) == (2, ["mine"])
        assert "output_exists" in ran.err

    def test_that_meets_nan_fails_and_leaves_nothing(self, recipe: Path, tmp_path: Path) -> None:
        tensors = files.lora_tensors(seed=3)
        next(iter(tensors.values()))[0, 0] = float("nan")
        files.write_adapter(tmp_path / "nan", tensors)
        wrong = json.loads(recipe.read_text())
        wrong["models"] = [{"adapter": "nan"}]
        recipe.write_text(json.dumps(wrong))
        ran = mergeyard("merge", recipe, tmp_path / "out", "--json")
        assert (ran.code, ran.json["error"]["code"]) == (1, "source_not_finite")
        assert not [path for path in tmp_path.iterdir() if "out" in path.name]

    def test_on_a_device_this_machine_has_not_is_a_wrong_request(self, recipe: Path, tmp_path: Path) -> None:
        hidden = {"CUDA_VISIBLE_DEVICES": ""}
        ran = mergeyard("merge", recipe, tmp_path / "out", "--device", "cuda", "--json", **hidden)
        assert (ran.code, ran.json["error"]["code"]) == (2, "not_supported")


class TestExtract:
    """A fine-tune of the tiny Llama whose every tensor moved, and one that moved by a product of rank 2."""

    @pytest.fixture
    def models(self, tmp_path: Path) -> Path:
        base = files.llama_tensors()
        adapted = dict(base)
        low_rank = files.lora_tensors(rank=2)
        for name in base:
            key = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{key}.lora_A.weight" in low_rank:
                adapted[name] = base[name] + low_rank[f"{key}.lora_B.weight"] @ low_rank[f"{key}.lora_A.weight"]
        files.write_model(tmp_path / "base", base)
        files.write_model(tmp_path / "low-rank", adapted)
        files.write_model(tmp_path / "tuned", files.llama_tensors(seed=5))
        return tmp_path

    def test_returns_what_is_of_the_rank_whole(self, models: Path) -> None:
        ran = mergeyard("extract", "base", "low-rank", "out", "--rank", "2", "--json", cwd=models)
        assert ran.code == 0, ran.err
        energies = {name: entry["retained_energy"] for name, entry in ran.json["statistics"].items()}
        assert set(energies) == set(files.llama_tensors())
        assert all(energy == pytest.approx(1, abs=1e-10) for energy in energies.values())
        found, expected = load_file(models / "out" / "adapter_model.safetensors"), files.lora_tensors(rank=2)
        assert set(found) == set(expected)
        for key in (key for key in found if "lora_A" in key):
            B = key.replace("lora_A", "lora_B")
            difference = found[B] @ found[key] - expected[B] @ expected[key]
            assert difference.abs().max() < 1e-5

    def test_names_what_an_lora_cannot_hold(self, models: Path) -> None:
        ran = mergeyard("extract", "base", "tuned", "out", "--rank", "2", "--json", cwd=models)
        assert (ran.code, ran.json["error"]["code"]) == (1, "lora_cannot_hold")
        assert "model.embed_tokens.weight, model.norm.weight" in json.dumps(ran.json["error"])
        assert not (models / "out").exists()

    def test_drops_or_saves_it_on_demand(self, models: Path) -> None:
        dropped = mergeyard("extract", "base", "tuned", "dropped", "--rank", "8", "--other", "drop", cwd=models)
        saved = mergeyard("extract", "base", "tuned", "saved", "--rank", "8", "--other", "save", cwd=models)
        assert (dropped.code, saved.code) == (0, 0)
        assert "warning" in dropped.err and "vLLM refuses" in saved.err
        assert "base_model.model.model.norm.weight" not in load_file(models / "dropped" / "adapter_model.safetensors")
        assert "base_model.model.model.norm.weight" in load_file(models / "saved" / "adapter_model.safetensors")

    def test_fails_where_too_little_is_kept(self, models: Path) -> None:
        options = ("--rank", "1", "--other", "drop", "--min-retained-energy", "0.99", "--json")
        ran = mergeyard("extract", "base", "tuned", "out", *options, cwd=models)
        assert (ran.code, ran.json["error"]["code"]) == (1, "energy_too_low")
        assert not (models / "out").exists()

    def test_of_something_that_is_not_there_is_a_wrong_request(self, models: Path) -> None:
        ran = mergeyard("extract", "base", "nowhere", "out", "--rank", "8", "--json", cwd=models)
        assert (ran.code, ran.json["error"]["code"]) == (2, "source_not_found")


class TestWhatIsWrong:
    @pytest.mark.parametrize(
        "arguments",
        [
            ("plan", "nowhere.yaml"),
            ("plan", "."),
            ("plan",),
            ("merge", "nowhere.yaml", "out"),
            ("submit", "nowhere.yaml"),
            ("submit", "recipe.yaml", "--label", "x"),
            ("lst",),
            ("up", "--port", "70000"),
            ("up", "--data-dir", "recipe.yaml"),
            ("up", "--host", "0.0.0.0"),
            ("download", "x", "--url", "not a url"),
        ],
    )
    def test_in_the_command_is_exit_code_2(self, recipe: Path, arguments: tuple[str, ...]) -> None:
        ran = mergeyard(*arguments, cwd=recipe.parent, MERGEYARD_DATA_DIR=str(recipe.parent / "data"))
        assert ran.code == 2, ran
        assert ran.err

    def test_in_a_setting_names_the_variable(self) -> None:
        ran = mergeyard("migrate", MERGEYARD_PORT="x")
        assert ran.code == 2 and "MERGEYARD_PORT" in ran.err

    def test_with_the_service_is_exit_code_1(self) -> None:
        ran = mergeyard("status", "mrg-1", "--json", MERGEYARD_URL="http://127.0.0.1:9")
        assert (ran.code, ran.json["error"]["code"]) == (1, "unreachable")

    def test_a_database_that_is_not_migrated_says_what_to_run(self, tmp_path: Path) -> None:
        ran = mergeyard("api", MERGEYARD_DATA_DIR=str(tmp_path))
        assert ran.code == 1 and "mergeyard migrate" in ran.err

    @pytest.mark.parametrize(
        ("variable", "value", "code"),
        [
            ("MERGEYARD_DATABASE_URL", "postgresql://127.0.0.1:9/x", "database_unavailable"),
            ("MERGEYARD_BROKER_URL", "redis://127.0.0.1:9/0", "broker_unavailable"),
        ],
    )
    def test_servers_that_do_not_answer_are_named_before_anything_starts(
        self, tmp_path: Path, variable: str, value: str, code: str
    ) -> None:
        ran = mergeyard("up", "--port", "0", "--data-dir", tmp_path, **{variable: value})
        assert ran.code == 1 and ran.err.startswith(code)
        assert not (tmp_path / "logs").exists()

    def test_is_a_trace_for_who_wants_one(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "mergeyard.cli", "plan", "nowhere.yaml"],
            env=environment(MERGEYARD_DEBUG="1"),
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Traceback" in done.stderr


def test_migrate_can_run_any_number_of_times(tmp_path: Path) -> None:
    for _ in range(2):
        assert mergeyard("migrate", MERGEYARD_DATA_DIR=str(tmp_path)).code == 0
    assert (tmp_path / "mergeyard.sqlite3").exists()


def test_the_client_commands_work_where_only_the_client_is_installed() -> None:
    missing = ["app", "worker", "fastapi", "sqlalchemy", "torch"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing})); from mergeyard.cli import main;"
        "sys.argv = ['mergeyard', 'status', 'x', '--url', 'http://127.0.0.1:9']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.split(":")[0]) == (1, "unreachable"), done.stderr
