"""POST /merges and /merges/plan."""

from __future__ import annotations

import secrets

import pytest
import redis
import yaml

from app.api.examples import RECIPE, RECIPE_YAML
from app.records.bell import queue_names
from tests.api.serving import ServedApi, problem


def test_a_submission_is_accepted_with_everything_a_client_needs_next(api: ServedApi) -> None:
    response = api.http.post("/merges", json={"recipe": RECIPE, "labels": {"team": "search"}, "priority": 5})
    merge = response.json()
    assert response.status_code == 202
    assert response.headers["location"] == f"/merges/{merge['id']}" == merge["urls"]["self"]
    assert int(response.headers["retry-after"]) >= 1
    assert (merge["status"], merge["stage"], merge["attempt"]) == ("queued", None, 0)
    assert merge["labels"] == {"team": "search"}
    assert merge["progress"]["bytes_done"] == 0 < merge["progress"]["bytes_total"]
    assert merge["artifact"] is None and merge["error"] is None
    assert merge["recipe"] == RECIPE
    assert merge["resolved"]["base_model"] == "models:smollm2-135m-instruct"


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/yaml", RECIPE_YAML),
        ("text/yaml; charset=utf-8", RECIPE_YAML),
        ("application/x-yaml", RECIPE_YAML),
    ],
)
def test_a_bare_yaml_recipe_means_the_same_as_the_envelope(api: ServedApi, content_type: str, body: str) -> None:
    response = api.http.post("/merges", content=body, headers={"content-type": content_type})
    assert response.status_code == 202, response.text
    assert response.json()["fingerprint"] == api.submit()["fingerprint"]


def test_yaml_text_in_the_envelope_means_the_same_as_an_object(api: ServedApi) -> None:
    response = api.http.post("/merges", json={"recipe": RECIPE_YAML})
    assert response.json()["fingerprint"] == api.submit()["fingerprint"]


def test_the_resolved_recipe_can_be_submitted_again(api: ServedApi) -> None:
    first = api.submit()
    again = api.http.post("/merges", json={"recipe": first["resolved"]})
    assert again.json()["fingerprint"] == first["fingerprint"]


def test_a_submission_rings_its_queue(api: ServedApi, api_broker: str) -> None:
    queue = f"rung-{secrets.token_hex(4)}"
    api.submit(queue=queue)
    with redis.Redis(unix_socket_path=api_broker.removeprefix("redis+socket://")) as client:
        assert sum(client.llen(name) for name in queue_names(queue)) == 1


def test_a_plan_shows_what_a_merge_would_do_and_queues_nothing(fresh_api: ServedApi) -> None:
    response = fresh_api.http.post("/merges/plan", json={"recipe": RECIPE})
    plan = response.json()
    assert response.status_code == 200, response.text
    assert plan["method"] == "ties"
    assert plan["base"] == {
        "reference": "models:smollm2-135m-instruct",
        "role": "base",
        "size": plan["base"]["size"],
        "files": ["model.safetensors"],
    }
    assert [source["role"] for source in plan["sources"]] == ["adapter", "adapter"]
    assert plan["estimates"]["tensors_touched"] == len(plan["touched"]) == 4
    assert plan["touched"][0]["sources"] == [0, 1]
    assert plan["shards"] == [{"filename": "model.safetensors", "tensors": 6, "size": 1040}]
    assert len(plan["fingerprint"]) == 64
    assert fresh_api.http.get("/merges").json()["items"] == []


def test_a_plan_lists_every_problem_with_its_place(api: ServedApi) -> None:
    recipe = {**RECIPE, "models": [{"adapter": "models:adapters/nowhere"}, {"adapter": "models:adapters/neither"}]}
    document = problem(api.http.post("/merges/plan", json={"recipe": recipe}), 422, "source_not_found")
    assert [found["where"] for found in document["problems"]] == ["models[0].adapter", "models[1].adapter"]


class TestSeveralDocuments:
    PARTS = (
        {**RECIPE, "name": "both"},
        {
            "merge_method": "linear",
            "models": [{"model": "models:smollm2-135m-instruct"}, {"model": "both"}],
            "parameters": {"weight": 0.5},
        },
    )

    def test_mean_the_same_in_yaml_and_in_json(self, api: ServedApi) -> None:
        text = "---\n".join(yaml.safe_dump(part) for part in self.PARTS)
        bare = api.http.post("/merges", content=text, headers={"content-type": "application/yaml"}).json()
        for recipe in (text, {"documents": list(self.PARTS)}):
            merge = api.submit(recipe=recipe)
            assert merge["fingerprint"] == bare["fingerprint"]
            assert merge["recipe"] == {"documents": list(self.PARTS)}
        assert api.submit(recipe=bare["resolved"])["fingerprint"] == bare["fingerprint"]
        estimates = bare["estimates"]
        assert bare["progress"]["bytes_total"] == estimates["output_bytes"] + estimates["scratch_bytes"]

    def test_are_planned_one_by_one(self, api: ServedApi) -> None:
        response = api.http.post("/merges/plan", json={"recipe": {"documents": list(self.PARTS)}})
        plan = response.json()
        assert response.status_code == 200, response.text
        (both,) = plan["earlier"]
        assert (both["name"], both["method"], plan["method"]) == ("both", "ties", "linear")
        assert both["estimates"]["output_bytes"] == plan["estimates"]["scratch_bytes"] > 0
        assert [source["reference"] for source in plan["sources"]] == ["both", "models:smollm2-135m-instruct"]

    def test_have_their_problems_where_they_stand(self, fresh_api: ServedApi) -> None:
        wrong = {"documents": [self.PARTS[0], {**self.PARTS[1], "models": [{"model": "boht"}], "name": "\x00"}]}
        document = problem(fresh_api.http.post("/merges", json={"recipe": wrong}), 422, "recipe_invalid")
        assert document["where"] == "documents[0]"
        wrong["documents"][1]["models"].append({"model": "both"})
        document = problem(fresh_api.http.post("/merges", json={"recipe": wrong}), 422, "request_invalid")
        assert document["where"] == "documents[1].name"
        del wrong["documents"][1]["name"]
        document = problem(fresh_api.http.post("/merges", json={"recipe": wrong}), 422, "source_not_found")
        assert document["where"] == "documents[1].models[0].model"
        assert fresh_api.http.get("/merges").json()["items"] == []


class TestIdempotencyKey:
    def test_the_same_request_gives_the_same_merge(self, api: ServedApi) -> None:
        body, headers = {"recipe": RECIPE}, {"Idempotency-Key": "nightly-1"}
        first = api.http.post("/merges", json=body, headers=headers)
        second = api.http.post("/merges", json=body, headers=headers)
        assert first.status_code == second.status_code == 202
        assert first.json()["id"] == second.json()["id"]

    def test_yaml_and_json_that_mean_the_same_are_the_same_request(self, api: ServedApi) -> None:
        headers = {"Idempotency-Key": "nightly-2"}
        first = api.http.post("/merges", json={"recipe": RECIPE}, headers=headers)
        second = api.http.post("/merges", content=RECIPE_YAML, headers={**headers, "content-type": "text/yaml"})
        assert first.json()["id"] == second.json()["id"]

    def test_another_request_under_the_same_key_is_refused(self, api: ServedApi) -> None:
        headers = {"Idempotency-Key": "nightly-3"}
        api.http.post("/merges", json={"recipe": RECIPE}, headers=headers)
        other = api.http.post("/merges", json={"recipe": RECIPE, "priority": 1}, headers=headers)
        problem(other, 422, "idempotency_mismatch")

    def test_a_key_with_spaces_is_refused(self, api: ServedApi) -> None:
        response = api.http.post("/merges", json={"recipe": RECIPE}, headers={"Idempotency-Key": "a b"})
        assert problem(response, 422, "request_invalid")["where"] == "header.Idempotency-Key"

    def test_without_a_key_every_submission_is_a_merge_of_its_own(self, api: ServedApi) -> None:
        assert api.submit()["id"] != api.submit()["id"]


def test_a_submission_survives_a_broker_that_is_away(api: ServedApi, tmp_path, sources_root) -> None:
    from app.settings import Settings
    from tests.api.serving import serving

    settings = Settings(
        data_dir=tmp_path,
        database_url=api.settings.database_url,
        broker_url=f"redis+socket://{tmp_path}/nobody.sock",
        model_roots=str(sources_root),
        janitor_seconds=3600,
    )
    with serving(settings) as alone:
        merge = alone.submit()
        assert alone.http.get(f"/merges/{merge['id']}").json()["status"] == "queued"
        problem(alone.http.get("/readyz"), 503, "broker_unavailable")
