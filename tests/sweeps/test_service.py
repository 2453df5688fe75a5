"""/sweeps and /evaluations over a real socket on both databases, the work done in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.records.points import Points
from app.sources.resolver import Resolver
from app.tasks.task import TaskScore
from tests.api.serving import PROBLEM, ServedApi
from tests.sweeps.asking import GRID, RECIPE, TASKS, asked
from worker.engine.run import merge_to_folder
from worker.evaluation.loading import loaded
from worker.evaluation.scoring import score
from worker.job import Ending

Do = Callable[[str], Ending]
NAMES = ("first", "second")


def submitted(api: ServedApi, path: str, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    answer = api.http.post(path, json=body, headers=headers)
    assert answer.status_code == 202, answer.text
    found: dict[str, Any] = answer.json()
    assert answer.headers["Location"] == f"{path.partition('/swp')[0]}/{found['id']}" or path.endswith("/merges")
    return found


def got(api: ServedApi, path: str) -> Any:
    answer = api.http.get(path)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(api: ServedApi, path: str, body: Any) -> list[tuple[str, str]]:
    answer = api.http.post(path, json=body)
    assert answer.headers["content-type"] == PROBLEM and 400 <= answer.status_code < 500, answer.text
    return [(problem["code"], problem["where"]) for problem in answer.json()["problems"]]


class TestASweep:
    def test_from_the_grid_to_the_artifact_of_its_best_point(self, yard_api: ServedApi, do: Do) -> None:
        sweep = submitted(yard_api, "/sweeps", asked(labels={"team": "search"}))
        assert (sweep["kind"], sweep["status"], sweep["best"]) == ("sweep", "queued", None)
        assert [point["settings"] for point in sweep["points"]] == [
            {"density": density, "lambda": strength} for density in GRID["density"] for strength in GRID["lambda"]
        ]
        assert [one["name"] for one in sweep["against"]] == ["base", "model 0 alone", "model 1 alone"]
        assert all(one["scores"] is None for one in (*sweep["points"], *sweep["against"]))
        assert sweep["progress"] == {"points_done": 0, "points_total": 7, "fraction": 0.0}
        assert do(sweep["id"]) is Ending.PUBLISHED

        done = got(yard_api, sweep["urls"]["self"])
        assert (done["status"], done["progress"]["points_done"]) == ("succeeded", 7)
        assert all(len(one["scores"]) == 2 for one in (*done["points"], *done["against"]))
        scores = {one["name"]: [score["score"] for score in one["scores"]] for one in done["against"]}
        for point in done["points"]:
            for place, name in enumerate(("first", "second")):
                own, base = scores[f"model {place} alone"][place], scores["base"][place]
                share = (point["scores"][place]["score"] - base) / (own - base)
                assert point["kept"][name] == (pytest.approx(share) if own < base else None)
        means = [point["mean"] for point in done["points"]]
        if all(mean is not None for mean in means):
            assert done["best"] == means.index(max(means))
        assert len({point["scores"][0]["score"] for point in done["points"]}) == 4

        merge = submitted(yard_api, f"/sweeps/{sweep['id']}/merges", {"point": 2, "labels": {"of": "sweep"}})
        parameters = [entry["parameters"] for entry in merge["recipe"]["models"]]
        assert [own["density"] for own in parameters] == [0.9, 0.9] and merge["recipe"]["parameters"] == {"lambda": 0.5}
        assert merge["labels"] == {"of": "sweep"} and do(merge["id"]) is Ending.PUBLISHED
        tasks = [{key: value for key, value in task.items() if key != "source"} for task in TASKS]
        found = submitted(yard_api, "/evaluations", {"model": f"merge:{merge['id']}", "tasks": tasks})
        assert found["scores"] == [] and do(found["id"]) is Ending.PUBLISHED
        evaluation = got(yard_api, f"/evaluations/{found['id']}")
        assert evaluation["scores"] == done["points"][2]["scores"], "the artifact scores what the point scored"

        best = submitted(yard_api, f"/sweeps/{sweep['id']}/merges", {})
        settings = done["points"][done["best"]]["settings"]
        assert best["recipe"]["parameters"] == {"lambda": settings["lambda"]}

    def test_a_points_scores_are_those_of_its_checkpoint(
        self, yard_api: ServedApi, do: Do, chat_root: Path, tmp_path: Path
    ) -> None:
        sweep = submitted(yard_api, "/sweeps", asked(grid={"models[1].weight": [0.25, 2]}))
        do(sweep["id"])
        recipe = json.loads(json.dumps(RECIPE))
        recipe["models"][1]["parameters"]["weight"] = 2
        recipe["evaluation"] = {"tasks": [{**task, "source": 0} for task in TASKS]}
        for task in recipe["evaluation"]["tasks"]:
            del task["source"]
        plan = make_plan(parse_recipe(recipe), Resolver(roots=[chat_root]))
        merge_to_folder(plan, tmp_path / "merged", device="cpu")
        with loaded(tmp_path / "merged", "cpu") as model:
            expected = [score(model, item.task).score for item in plan.tasks]
        point = got(yard_api, f"/sweeps/{sweep['id']}")["points"][1]
        assert [found["score"] for found in point["scores"]] == expected

    def test_its_events_tell_of_every_point_once(self, yard_api: ServedApi, do: Do) -> None:
        sweep = submitted(yard_api, "/sweeps", asked())
        do(sweep["id"])
        events = got(yard_api, f"/sweeps/{sweep['id']}/events")["items"]
        numbers = [event["data"]["number"] for event in events if event["type"] == "point"]
        assert numbers == list(range(7))
        assert set(events[-2]["data"]["scores"]) == {"first", "second"} and events[-1]["type"] == "succeeded"
        with yard_api.http.stream(
            "GET", f"/sweeps/{sweep['id']}/events", headers={"Accept": "text/event-stream"}
        ) as stream:
            assert stream.read().decode().count("event: point") == 7

    def test_polling_is_cheap_while_nothing_changes(self, yard_api: ServedApi) -> None:
        sweep = submitted(yard_api, "/sweeps", asked())
        first = yard_api.http.get(f"/sweeps/{sweep['id']}")
        again = yard_api.http.get(f"/sweeps/{sweep['id']}", headers={"If-None-Match": first.headers["ETag"]})
        assert (again.status_code, again.content) == (304, b"") and first.headers["Retry-After"] == "1"

    def test_a_recipe_may_be_yaml_text(self, yard_api: ServedApi) -> None:
        sweep = submitted(yard_api, "/sweeps", asked(recipe=yaml.safe_dump(RECIPE)))
        assert sweep["recipe"] == RECIPE

    def test_a_retry_finds_it_and_another_request_does_not(self, yard_api: ServedApi) -> None:
        key = {"Idempotency-Key": "one"}
        first = submitted(yard_api, "/sweeps", asked(), **key)
        assert submitted(yard_api, "/sweeps", asked(), **key)["id"] == first["id"]
        other = yard_api.http.post("/sweeps", json=asked(grid={"density": [0.1]}), headers=key)
        assert other.json()["code"] == "idempotency_mismatch"
        merge = yard_api.http.post("/merges", json={"recipe": RECIPE}, headers=key)
        assert merge.json()["code"] == "idempotency_mismatch"
        assert len(got(yard_api, "/sweeps")["items"]) == 1 and got(yard_api, "/merges")["items"] == []

    def test_without_a_task_that_names_its_model_the_best_mean_score_is_best(self, yard_api: ServedApi, do: Do) -> None:
        sweep = submitted(yard_api, "/sweeps", asked(tasks=[{"file": "models:first.jsonl", "metric": "nll"}]))
        assert [one["name"] for one in sweep["against"]] == ["base"]
        do(sweep["id"])
        done = got(yard_api, f"/sweeps/{sweep['id']}")
        scores = [point["scores"][0]["score"] for point in done["points"]]
        assert done["best"] == scores.index(min(scores)) and done["points"][0]["kept"] == {}


class TestKinds:
    def test_each_is_found_under_its_own_path_alone(self, yard_api: ServedApi, do: Do) -> None:
        merge = submitted(yard_api, "/merges", {"recipe": RECIPE})
        sweep = submitted(yard_api, "/sweeps", asked(grid={"density": [0.5]}))
        evaluation = submitted(
            yard_api,
            "/evaluations",
            {"model": "models:chat", "tasks": TASKS[:1]} | {"tasks": [{"file": "models:first.jsonl", "metric": "nll"}]},
        )
        for job in (merge, sweep, evaluation):
            assert do(job["id"]) is Ending.PUBLISHED
        made = {"merges": merge["id"], "sweeps": sweep["id"], "evaluations": evaluation["id"]}
        for path, own in made.items():
            assert [item["id"] for item in got(yard_api, f"/{path}")["items"]] == [own]
            for other, job_id in made.items():
                if other == path:
                    continue
                for tail in ("", "/events", "/webhooks"):
                    answer = yard_api.http.get(f"/{path}/{job_id}{tail}")
                    assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), answer.url
                assert yard_api.http.post(f"/{path}/{job_id}/cancel").status_code == 404
                assert yard_api.http.delete(f"/{path}/{job_id}").status_code == 404
        for path in ("/merges/{}/files", "/merges/{}/archive.tar", "/api/models/merges/{}"):
            assert yard_api.http.get(path.format(sweep["id"])).status_code == 404
        assert yard_api.http.put("/aliases/best", json={"merge": sweep["id"]}).status_code == 404
        reading = {**RECIPE, "base_model": f"merge:{sweep['id']}"}
        assert ("source_not_found", "base_model") in refused(yard_api, "/merges", {"recipe": reading})

    def test_a_page_leads_to_the_next(self, yard_api: ServedApi) -> None:
        ids = [submitted(yard_api, "/sweeps", asked(grid={"density": [value]}))["id"] for value in (0.1, 0.2, 0.3)]
        first = yard_api.http.get("/sweeps?limit=2")
        rest = got(yard_api, first.links["next"]["url"])
        found = [item["id"] for page in (first.json(), rest) for item in page["items"]]
        assert sorted(found) == sorted(ids) and rest["next_cursor"] is None
        assert got(yard_api, "/sweeps?status=succeeded")["items"] == []


class TestEndings:
    def test_a_cancelled_one_keeps_what_is_scored(self, yard_api: ServedApi, do: Do) -> None:
        sweep = submitted(yard_api, "/sweeps", asked())
        cancelled = yard_api.http.post(f"/sweeps/{sweep['id']}/cancel").json()
        assert cancelled["status"] == "cancelled" and do(sweep["id"]) is Ending.NOT_OURS
        assert yard_api.http.delete(f"/sweeps/{sweep['id']}").status_code == 204
        assert yard_api.http.get(f"/sweeps/{sweep['id']}").status_code == 404

    def test_a_merge_that_is_read_stays(self, yard_api: ServedApi, do: Do) -> None:
        merge = submitted(yard_api, "/merges", {"recipe": RECIPE})
        do(merge["id"])
        asking = {"model": f"merge:{merge['id']}", "tasks": [{"file": "models:first.jsonl", "metric": "nll"}]}
        evaluation = submitted(yard_api, "/evaluations", asking)
        assert yard_api.http.delete(f"/merges/{merge['id']}").json()["code"] == "merge_in_use"
        assert do(evaluation["id"]) is Ending.PUBLISHED
        assert yard_api.http.delete(f"/merges/{merge['id']}").status_code == 204
        assert got(yard_api, f"/evaluations/{evaluation['id']}")["scores"]

    def test_files_that_changed_since_are_noticed(self, yard_api: ServedApi, do: Do, chat_root: Path) -> None:
        file = chat_root / "first.jsonl"
        before = file.read_text()
        sweep = submitted(yard_api, "/sweeps", asked())
        try:
            file.write_text(before.replace("hello", "hallo"))
            assert do(sweep["id"]) is Ending.FAILED
        finally:
            file.write_text(before)
        failed = got(yard_api, f"/sweeps/{sweep['id']}")
        assert (failed["status"], failed["error"]["code"]) == ("failed", "source_changed")
        assert all(point["scores"] is None for point in failed["points"]) and failed["best"] is None
        assert refused(yard_api, f"/sweeps/{sweep['id']}/merges", {}) == [("conflict", "")]

    def test_weights_that_changed_since_are_noticed(self, yard_api: ServedApi, do: Do, chat_root: Path) -> None:
        file = chat_root / "two" / "adapter_model.safetensors"
        before = file.read_bytes()
        asking = {"model": "models:chat+models:two", "tasks": [{"file": "models:first.jsonl", "metric": "nll"}]}
        evaluation = submitted(yard_api, "/evaluations", asking)
        try:
            file.write_bytes(before)  # the same bytes at another time: nobody can tell without reading them
            assert do(evaluation["id"]) is Ending.FAILED
        finally:
            file.write_bytes(before)
        assert got(yard_api, f"/evaluations/{evaluation['id']}")["error"]["code"] == "source_changed"

    def test_what_has_scores_is_not_scored_again(
        self, yard_api: ServedApi, do: Do, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sweep = submitted(yard_api, "/sweeps", asked())
        job = yard_api.jobs.claim(sweep["id"], lease_seconds=60)
        assert job is not None and job.lease_token is not None
        points = Points(yard_api.jobs.database)
        for number in (0, 1, 4):
            scores = [TaskScore(name=name, metric="nll", score=number, standard_error=0, examples=1) for name in NAMES]
            points.record(sweep["id"], job.lease_token, number, scores)
        yard_api.jobs.hand_back(sweep["id"], job.lease_token)
        made: list[str] = []

        def counted(model: Any, task: Any, **options: Any) -> TaskScore:
            made.append(task.name)
            return score(model, task, **options)

        monkeypatch.setattr("worker.evaluation.sweep.score", counted)
        assert do(sweep["id"]) is Ending.PUBLISHED
        assert made == [*NAMES] * 4, "four of seven points, two tasks each"
        found = [point.scores for point in points.of(sweep["id"])]
        kept = [one[0].score for one in found if one is not None]
        assert [kept[number] for number in (0, 1, 4)] == [0, 1, 4] and len(kept) == 7


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "code", "where"),
        [
            ({"grid": {}}, "request_invalid", "grid"),
            ({"grid": {"density": []}}, "grid_invalid", "grid.density"),
            ({"grid": {"models[2].weight": [1]}}, "grid_invalid", "grid.models[2].weight"),
            ({"grid": {f"models[{i}].weight": list(range(1, 1001)) for i in (0, 1)}}, "grid_invalid", "grid"),
            ({"grid": {"density": [0.5, 1.5]}}, "parameter_invalid", "models[0].parameters.density"),
            ({"grid": {"densities": [0.5]}}, "unknown_key", "parameters.densities"),
            ({"tasks": []}, "request_invalid", "tasks"),
            ({"tasks": [{**TASKS[0], "source": 2}]}, "task_invalid", "tasks[0].source"),
            ({"tasks": [TASKS[0], {"file": "models:empty.jsonl"}]}, "task_invalid", "tasks[1].file"),
            ({"tasks": [{"file": "models:unfinished.jsonl"}]}, "task_invalid", "tasks[0].file"),
            ({"tasks": [{"file": "models:first.jsonl", "metric": "json"}]}, "task_invalid", "tasks[0].file"),
            ({"tasks": [{"file": "models:nothing.jsonl"}]}, "source_not_found", "tasks[0].file"),
            ({"tasks": [{"file": "models:first.jsonl", "metrics": "nll"}]}, "request_invalid", "tasks[0].metrics"),
            ({"recipe": {**RECIPE, "base_model": "models:nothing"}}, "source_not_found", "base_model"),
            ({"recipe": {**RECIPE, "models": []}}, "no_sources", "models"),
            ({"recipe": {"documents": [RECIPE]}}, "grid_invalid", ""),
            ({"recipe": 5}, "request_invalid", "recipe"),
            ({"labels": {"a": "\x00"}}, "request_invalid", "labels.a"),
            ({"grid": {"density\x00": [0.5]}}, "request_invalid", "grid"),
            ({"grids": {}}, "unknown_key", "grids"),
            ({"queue": "No!"}, "request_invalid", "queue"),
        ],
    )
    def test_what_is_wrong_with_a_sweep_has_its_place(
        self, yard_api: ServedApi, changes: dict[str, Any], code: str, where: str
    ) -> None:
        assert (code, where) in refused(yard_api, "/sweeps", asked(**changes))
        assert got(yard_api, "/sweeps")["items"] == []

    def test_a_million_points_are_refused_by_their_number(self, yard_api: ServedApi) -> None:
        grid = {f"models[{index}].weight": list(range(1, 1001)) for index in (0, 1)}
        answer = yard_api.http.post("/sweeps", json=asked(grid=grid)).json()
        assert answer["code"] == "grid_invalid" and "1000000 points" in answer["detail"]

    def test_a_point_that_cannot_be_planned_is_named(self, yard_api: ServedApi) -> None:
        answer = yard_api.http.post("/sweeps", json=asked(grid={"density": [0.5, 1.5]})).json()
        assert answer["detail"].startswith("At density=1.5: ")

    @pytest.mark.parametrize(
        ("changes", "code", "where"),
        [
            ({"model": "models:nothing"}, "source_not_found", "model"),
            ({"model": "models:one"}, "reference_invalid", "model"),
            ({"model": "gibberish:x"}, "reference_invalid", "model"),
            ({"model": ""}, "request_invalid", "model"),
            ({"tasks": [{"file": "models:empty.jsonl"}]}, "task_invalid", "tasks[0].file"),
            ({"model": "models:silent"}, "chat_template_missing", "tasks[0].file"),
            ({"recipe": RECIPE}, "unknown_key", "recipe"),
        ],
    )
    def test_what_is_wrong_with_an_evaluation_has_its_place(
        self, yard_api: ServedApi, changes: dict[str, Any], code: str, where: str
    ) -> None:
        asking = {"model": "models:chat", "tasks": [{"file": "models:first.jsonl", "metric": "nll"}], **changes}
        assert (code, where) in refused(yard_api, "/evaluations", asking)

    @pytest.mark.parametrize("path", ["/sweeps", "/evaluations"])
    def test_what_is_no_json_object_is_refused(self, yard_api: ServedApi, path: str) -> None:
        for content, media_type, status in (
            (b"[]", "application/json", 422),
            (b"{", "application/json", 422),
            (b"a: 1", "application/yaml", 415),
        ):
            answer = yard_api.http.post(path, content=content, headers={"content-type": media_type})
            assert answer.status_code == status and answer.headers["content-type"] == PROBLEM

    def test_there_is_no_such_point(self, yard_api: ServedApi) -> None:
        sweep = submitted(yard_api, "/sweeps", asked())
        assert refused(yard_api, f"/sweeps/{sweep['id']}/merges", {"point": 4}) == [("request_invalid", "point")]
        assert refused(yard_api, f"/sweeps/{sweep['id']}/merges", {"points": 1}) == [("unknown_key", "points")]
        assert refused(yard_api, "/sweeps/swp-nothing/merges", {"point": 0}) == [("not_found", "")]
