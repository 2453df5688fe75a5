"""A sweep on this machine: the model in memory is every point's checkpoint to the bit, and nothing is scored twice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from app.errors import MergeyardError
from app.planning.plan import Plan
from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.sources.adapters import load_adapter
from app.sources.resolver import Resolver
from app.sweeps.grid import expand, only_source
from app.sweeps.planning import SweptTask, plan_sweep
from app.sweeps.results import Row, kept
from app.tasks.task import Example, Message, Task, TaskScore
from mergeyard.plots import draw
from tests.cli.commands import mergeyard
from tests.evaluation.chat import LEARNT, write_chat_root
from worker.engine.digests import DigestCache
from worker.engine.kernels import load
from worker.engine.run import merge_to_folder
from worker.evaluation.loading import loaded
from worker.evaluation.memory import ModelInMemory
from worker.evaluation.scoring import score


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model, two adapters on it, a task for each, and a recipe."""
    root = tmp_path_factory.mktemp("models")
    write_chat_root(root)
    (root / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return root


RECIPE: dict[str, Any] = {
    "base_model": "chat",
    "merge_method": "ties",
    "models": [
        {"adapter": "one", "parameters": {"weight": 1.0, "density": 0.9}},
        {"adapter": "two", "parameters": {"weight": 0.5, "density": 0.9}},
    ],
}


def planned(root: Path, recipe: Mapping[str, Any]) -> Plan:
    return make_plan(parse_recipe(recipe), Resolver(local=root))


class Onlooker:
    def stage(self, name: str) -> None: ...
    def progress(self, bytes_done: int, bytes_total: int) -> None: ...
    def scored(self, score: TaskScore) -> None: ...
    def check(self) -> None: ...


class TestTheGrid:
    def test_points_in_order_the_last_axis_fastest(self) -> None:
        points = expand(RECIPE, {"lambda": [0.5, 1], "models[1].weight": [1, 2]})
        assert [dict(point.settings) for point in points] == [
            {"lambda": lam, "models[1].weight": weight} for lam in (0.5, 1) for weight in (1, 2)
        ]
        assert [point.number for point in points] == [0, 1, 2, 3]
        last = points[3].recipe
        assert last["parameters"] == {"lambda": 1}
        assert last["models"][0] == RECIPE["models"][0] and last["models"][1]["parameters"]["weight"] == 2
        assert RECIPE["models"][1]["parameters"]["weight"] == 0.5, "the recipe itself is as it was"

    def test_what_is_each_sources_is_set_for_every_source(self) -> None:
        (point,) = expand({**RECIPE, "evaluation": {"tasks": []}}, {"density": [0.2]})
        assert [entry["parameters"]["density"] for entry in point.recipe["models"]] == [0.2, 0.2]
        assert "parameters" not in point.recipe and "evaluation" not in point.recipe

    def test_sources_are_read_once_for_all_points(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        read: list[str] = []

        def reading(*given: Any) -> Any:
            read.append(given[1])
            return load_adapter(*given)

        monkeypatch.setattr("app.sources.resolver.load_adapter", reading)
        task = SweptTask(file=str(root / "first.jsonl"), source=0)
        swept = plan_sweep(RECIPE, {"density": [0.2, 0.4, 0.6]}, [task], Resolver(local=root))
        assert sorted(read) == ["one", "two"] and len({point.plan_digest for point in swept.points}) == 5

    def test_a_method_and_a_dialect_are_axes_too(self, root: Path) -> None:
        points = expand(RECIPE, {"dialect": ["mergekit", "peft", "paper", "article"]})
        assert len({planned(root, point.recipe).digest for point in points}) == 4
        linear = {**RECIPE, "models": [{"adapter": "one"}, {"adapter": "two"}]}
        methods = expand(linear, {"merge_method": ["ties", "task_arithmetic", "dare_ties"]})
        assert [planned(root, point.recipe).method for point in methods] == ["ties", "task_arithmetic", "dare_ties"]

    @pytest.mark.parametrize(
        ("axes", "where", "says"),
        [
            ({}, "grid", "1 to 20 axes"),
            ({"density": []}, "grid.density", "needs a list"),
            ({"density": 0.5}, "grid.density", "needs a list"),
            ({"density": [[0.5]]}, "grid.density", "are numbers"),
            ({"density": [None]}, "grid.density", "are numbers"),
            ({"density": [0.5, 0.5]}, "grid.density", "a value twice"),
            ({"models[2].weight": [1]}, "grid.models[2].weight", "2 models, counted from 0"),
            ({"models[x].weight": [1]}, "grid.models[x].weight", "is no axis"),
            ({"a b": [1]}, "grid.a b", "is no axis"),
        ],
    )
    def test_what_is_wrong_has_its_place(self, axes: Any, where: str, says: str) -> None:
        with pytest.raises(MergeyardError) as refused:
            expand(RECIPE, axes)
        assert (refused.value.code, refused.value.where) == ("grid_invalid", where) and says in refused.value.message

    def test_a_million_points_are_refused_by_their_number_and_not_made(self) -> None:
        axes = {f"models[{index}].{name}": list(range(10)) for index in (0, 1) for name in ("weight", "density", "x")}
        with pytest.raises(MergeyardError, match="The grid has 1000000 points") as refused:
            expand(RECIPE, axes)
        assert refused.value.code == "grid_invalid"

    @pytest.mark.parametrize(
        "value", [{"documents": [RECIPE]}, {"merge_method": "linear", "slices": []}, {"models": []}]
    )
    def test_what_is_no_list_of_models_cannot_be_swept(self, value: Any) -> None:
        with pytest.raises(MergeyardError, match="one document"):
            expand(value, {"density": [0.5]})

    def test_the_base_and_a_source_by_itself(self, root: Path, tmp_path: Path) -> None:
        merge_to_folder(planned(root, only_source(RECIPE, 1, 0.0)), tmp_path / "base", device="cpu")
        assert same(load_file(tmp_path / "base" / "model.safetensors"), load_file(root / "chat" / "model.safetensors"))
        alone = only_source({**RECIPE, "out_dtype": "bfloat16"}, 1)
        assert alone["models"] == [{"adapter": "two", "parameters": {"weight": 1.0}}]
        assert alone["out_dtype"] == "bfloat16"


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("changes", "axes"),
    [
        ({}, {"density": [0.2, 0.7], "lambda": [0.5, 1.5]}),
        ({"out_dtype": "bfloat16"}, {"models[0].weight": [-1.0, 2.0], "normalize": [False]}),
        ({"output": {"max_shard_size": "60KB"}}, {"dialect": ["paper", "article"]}),
    ],
)
def test_the_model_in_memory_is_the_checkpoint_of_every_point(
    root: Path, tmp_path: Path, changes: dict[str, Any], axes: dict[str, list[Any]]
) -> None:
    points = expand({**RECIPE, **changes}, axes)
    plans = [planned(root, point.recipe) for point in points]
    (folder := tmp_path / "memory").mkdir()
    model = ModelInMemory(plans[0], folder, "cpu")
    task = Task(name="t", metric="nll", examples=tuple(asked(pair) for pair in LEARNT), max_new_tokens=8)
    text = Task(name="t", metric="contains", examples=tuple(asked(pair) for pair in LEARNT), max_new_tokens=16)
    order = [*range(len(plans)), 0]  # back to the first: nothing of another point is left
    for number in order:
        out = tmp_path / f"{number}-{order.index(number)}-{len(list(tmp_path.iterdir()))}"
        merge_to_folder(plans[number], out, device="cpu")
        model.become(plans[number], kernels=load("cpu"), control=Onlooker(), digests=DigestCache(None))
        with loaded(out, "cpu") as written:
            assert same(model.loaded.model.state_dict(), written.model.state_dict())
            assert {p.dtype for p in written.model.parameters()} == {p.dtype for p in model.loaded.model.parameters()}
            assert score(model.loaded, task) == score(written, task)
            assert score(model.loaded, text) == score(written, text)


def asked(pair: tuple[str, str]) -> Example:
    return Example(line=1, prompt=None, messages=(Message(role="user", content=pair[0]),), answer=pair[1])


def test_a_point_of_another_shape_is_refused(root: Path, tmp_path: Path) -> None:
    model = ModelInMemory(planned(root, RECIPE), tmp_path, "cpu")
    other = planned(root, {**RECIPE, "out_dtype": "float16"})
    with pytest.raises(MergeyardError) as refused:
        model.become(other, kernels=load("cpu"), control=Onlooker(), digests=DigestCache(None))
    assert refused.value.code == "not_supported"


def test_a_checkpoint_that_is_renamed_on_loading_is_refused(root: Path, tmp_path: Path) -> None:
    other = {"merge_method": "passthrough", "models": [{"model": "renamed"}]}
    tensors = load_file(root / "chat" / "model.safetensors")
    (root / "renamed").mkdir(exist_ok=True)
    for path in (root / "chat").iterdir():
        (root / "renamed" / path.name).write_bytes(path.read_bytes())
    renamed = {name.replace("mlp", "ffn"): value for name, value in tensors.items()}
    save_file(renamed, root / "renamed" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeyardError, match="ffn") as refused:
        ModelInMemory(planned(root, other), tmp_path, "cpu")
    assert refused.value.code == "not_supported"


def reached(value: float, metric: Any = "exact_match") -> TaskScore:
    return TaskScore(name="t", metric=metric, score=value, standard_error=0.0, examples=1)


@pytest.mark.parametrize(
    ("metric", "found", "base", "own", "share"),
    [
        ("exact_match", 0.5, 0.1, 0.9, 0.5),
        ("exact_match", 1.0, 0.0, 0.5, 2.0),
        ("nll", 1.0, 3.0, 1.0, 1.0),
        ("nll", 4.0, 3.0, 1.0, -0.5),
        ("exact_match", 0.5, 0.9, 0.1, None),
        ("nll", 1.0, 1.0, 3.0, None),
        ("exact_match", 0.5, 0.5, 0.5, None),
    ],
)
def test_the_share_of_the_gain_that_is_kept(
    metric: Any, found: float, base: float, own: float, share: float | None
) -> None:
    assert kept(reached(found, metric), reached(base, metric), reached(own, metric)) == pytest.approx(share)


class TestTheCommand:
    def ran(self, root: Path, *arguments: Any) -> dict[str, Any]:
        done = mergeyard("sweep", root / "recipe.yaml", *arguments, "--json", cwd=root)
        assert done.code == 0, done.err
        return dict(json.loads(done.out))

    def test_every_point_is_scored_and_the_best_can_be_merged(self, root: Path, tmp_path: Path) -> None:
        arguments = ["--tasks", "first.jsonl@0", "--tasks", "second.jsonl=exact_match", "--grid", "density=0.2,0.8"]
        kept_in, best, plots = tmp_path / "scores.jsonl", tmp_path / "best.yaml", tmp_path / "plots"
        arguments += ["--grid", "lambda=0.5,1.0", "--out", kept_in, "--best", best, "--plots", plots]
        found = self.ran(root, *arguments)
        assert [point["settings"] for point in found["points"]] == [
            {"density": density, "lambda": lam} for density in (0.2, 0.8) for lam in (0.5, 1.0)
        ]
        assert set(found["against"]) == {"base", "model 0 alone"}
        assert all(set(point["scores"]) == {"first", "second"} for point in found["points"])
        assert yaml.safe_load(best.read_text()) == found["best"]["recipe"]
        assert {path.name for path in plots.iterdir()} >= {"by-density.png", "density-by-lambda.svg", "best-so-far.png"}

        lines = kept_in.read_text().splitlines()
        assert len(lines) == 6, "four points, the base, and a source by itself"
        kept_in.write_text("\n".join(lines[:4]) + "\n")  # as if it had been stopped
        assert self.ran(root, *arguments) == found
        again = kept_in.read_text().splitlines()
        assert again == lines, "what had been scored was not scored again"
        other = self.ran(root, *arguments[:2], "--grid", "density=0.2", "--out", kept_in)
        assert len(kept_in.read_text().splitlines()) > 6 and other["points"][0]["scores"].keys() == {"first"}

        # and a checkpoint of the best one has the scores of the sweep
        scored = mergeyard("merge", best, tmp_path / "model", cwd=root)
        assert scored.code == 2, "its paths are relative to the recipe"
        (root / "best.yaml").write_text(best.read_text())
        assert mergeyard("merge", root / "best.yaml", tmp_path / "model").code == 0
        nll = mergeyard("evaluate", tmp_path / "model", "--tasks", f"{root / 'first.jsonl'}=nll", "--json")
        point = found["points"][found["best"]["point"]]
        assert json.loads(nll.out)["scores"][0]["score"] == pytest.approx(point["scores"]["first"], rel=1e-6)

    def test_people_get_a_table(self, root: Path) -> None:
        done = mergeyard("sweep", "recipe.yaml", "--tasks", "first.jsonl", "--grid", "density=0.2,0.8", cwd=root)
        assert done.code == 0 and "density" in done.out and "first" in done.out and "*" in done.out, done.err
        assert "base: first" in done.err

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--tasks", "first.jsonl@2", "--grid", "density=0.2"], "2 models"),
            (["--tasks", "first.jsonl", "--grid", "density"], "NAME=V1,V2"),
            (["--tasks", "first.jsonl", "--grid", "density=0.2", "--grid", "density=0.3"], "twice"),
            (["--tasks", "first.jsonl", "--grid", "density=2"], "density"),
            (["--tasks", "first.jsonl", "--grid", "denisty=0.2"], "denisty"),
            (["--tasks", "nothing.jsonl", "--grid", "density=0.2"], "nothing.jsonl"),
            (["--tasks", "first.jsonl"], "--grid"),
        ],
    )
    def test_what_is_wrong_is_a_sentence_and_exit_code_2(self, root: Path, arguments: Sequence[str], says: str) -> None:
        done = mergeyard("sweep", "recipe.yaml", *arguments, cwd=root)
        assert done.code == 2 and says in done.err, (done.code, done.err)


def test_drawings_of_one_axis_and_one_task(tmp_path: Path) -> None:
    rows = [
        Row(
            name="a point",
            settings={"density": density, "dialect": "paper"},
            scores={"t": density},
            kept={},
            losses=frozenset({"t"}),
        )
        for density in (0.2, 0.4)
    ]
    assert rows[0].worth > rows[1].worth
    made = draw(rows, tmp_path / "plots")
    assert {path.stem for path in made} == {"by-density", "best-so-far"}
    assert all(path.stat().st_size > 1000 for path in made)
