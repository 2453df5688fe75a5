"""``evaluation`` in a recipe: checked before anything is queued, scored before it is published, told everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from app.api.schemas import Merge
from app.artifacts.store import read_whole
from app.errors import MergeyardError
from app.planning.plan import Plan
from app.planning.planner import make_plan
from app.recipe import parse_recipe
from app.records.job import Job, Status
from app.records.key import Caller
from app.records.owned import OwnedUploads
from app.sources.uploads import UploadStore
from mergeyard.local import here, merge_plan, plan_recipe
from tests import tiny
from tests.evaluation.chat import LEARNT, write_chat
from tests.objects.s3 import new_bucket
from tests.worker.attempts import attempt, lonely_yard, place_in
from tests.worker.yard import Yard
from worker.evaluation.loading import loaded
from worker.evaluation.scoring import score
from worker.job import Ending
from worker.sink import READ_BACK


def lines(*values: Any) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def chat(prompt: str, answer: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}], "answer": answer}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a chat model, an adapter on it that changes little, and tasks."""
    root = tmp_path_factory.mktemp("models")
    write_chat(root / "chat")
    tiny.write_lora(root / "chat", root / "small", rank=2)
    (root / "tasks").mkdir()
    (root / "tasks" / "by-heart.jsonl").write_text(lines(*(chat(*pair) for pair in LEARNT)))
    (root / "tasks" / "bad.jsonl").write_text(lines(chat("hi", "hello"), {"prompt": "hi"}))
    (root / "tasks" / "empty.jsonl").write_text("")
    (root / "tasks" / "long.jsonl").write_text(lines(chat("hi", "hello"), chat("a" * 70, "hello")))
    return root


@pytest.fixture
def yard(tmp_path: Path, models: Path) -> Iterator[Yard]:
    with lonely_yard(tmp_path, models) as opened:
        yield opened


def recipe(*tasks: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "base_model": "models:chat",
        "merge_method": "task_arithmetic",
        "models": [{"adapter": "models:small", "parameters": {"weight": 0.05}}],
        "evaluation": {"tasks": list(tasks) or [{"file": "models:tasks/by-heart.jsonl"}]},
        **changes,
    }


def planned(yard: Yard, value: dict[str, Any]) -> Plan:
    return make_plan(parse_recipe(value), yard.resolver("local"))


def refused(ask: Callable[[], Any]) -> list[tuple[str, str]]:
    with pytest.raises(MergeyardError) as found:
        ask()
    return [(problem.code, problem.where) for problem in found.value.problems]


class TestPlanning:
    def test_every_default_is_written_out_and_the_file_is_pinned(self, yard: Yard) -> None:
        plan = planned(yard, recipe())
        [task] = plan.recipe["evaluation"]["tasks"]
        assert len(task.pop("sha256")) == 64
        assert task == {
            "name": "by-heart",
            "file": "models:tasks/by-heart.jsonl",
            "metric": "exact_match",
            "max_new_tokens": 128,
        }
        again = planned(yard, dict(plan.recipe))
        assert again.digest == plan.digest and again.tasks == plan.tasks

    @pytest.mark.parametrize("name", ["my tasks, 2", "é" * 80])
    def test_a_task_is_called_after_its_file_as_far_as_it_can_be(self, yard: Yard, name: str) -> None:
        (yard.settings.roots[0] / f"{name}.jsonl").write_text(lines(chat("hi", "hello")))
        plan = planned(yard, recipe({"file": f"models:{name}.jsonl"}))
        assert planned(yard, dict(plan.recipe)).tasks == plan.tasks

    def test_what_is_asked_is_part_of_the_fingerprint(self, yard: Yard) -> None:
        file = yard.settings.roots[0] / "tasks" / "by-heart.jsonl"
        other = {"file": "models:tasks/by-heart.jsonl", "metric": "nll"}
        found = [planned(yard, recipe()), planned(yard, recipe(other)), planned(yard, recipe({**other, "limit": 2}))]
        without = recipe()
        del without["evaluation"]
        found.append(planned(yard, without))
        file.write_text(lines(chat("hi", "hello")))
        found.append(planned(yard, recipe()))
        assert len({plan.digest for plan in found}) == len(found)
        assert [len(plan.tasks[0].task.examples) for plan in found[:3]] == [5, 5, 2]

    def test_memory_for_the_whole_model_is_estimated(self, yard: Yard) -> None:
        without = recipe()
        del without["evaluation"]
        less, more = planned(yard, without).estimates, planned(yard, recipe()).estimates
        assert more.peak_memory_bytes > less.peak_memory_bytes + 10**9
        assert more.output_bytes == less.output_bytes

    @pytest.mark.parametrize(
        ("task", "code", "where"),
        [
            ({"file": "models:tasks/nothing.jsonl"}, "source_not_found", ".file"),
            ({"file": "models:nowhere/x.jsonl"}, "source_not_found", ".file"),
            ({"file": "models:../x.jsonl"}, "path_outside_roots", ".file"),
            ({"file": "merge:mrg-1"}, "reference_invalid", ".file"),
            ({"file": "hf:org/name"}, "reference_invalid", ".file"),
            ({"file": "shipped:nothing"}, "source_not_found", ".file"),
            ({"file": "upload:sha256-" + "0" * 64}, "source_not_found", ".file"),
            ({"file": "models:tasks/empty.jsonl"}, "task_invalid", ".file"),
            ({"file": "models:tasks/bad.jsonl"}, "task_invalid", ".file"),
            ({"file": "models:tasks/by-heart.jsonl", "metric": "multiple_choice"}, "task_invalid", ".file"),
            ({"file": "models:tasks/by-heart.jsonl", "metric": "bleu"}, "recipe_invalid", ".metric"),
            ({"file": "models:tasks/by-heart.jsonl", "sha256": "0" * 64}, "source_changed", ".sha256"),
            ({"file": "models:tasks/by-heart.jsonl", "limit": 0}, "recipe_invalid", ".limit"),
            ({"file": "models:tasks/by-heart.jsonl", "metrics": "nll"}, "unknown_key", ".metrics"),
            ({}, "recipe_invalid", ".file"),
        ],
    )
    def test_what_is_wrong_has_its_place(self, yard: Yard, task: dict[str, Any], code: str, where: str) -> None:
        wrong = recipe({"file": "models:tasks/by-heart.jsonl"}, task or {"name": "x"})
        assert refused(lambda: planned(yard, wrong)) == [(code, f"evaluation.tasks[1]{where}")]

    def test_all_files_together_are_bounded(self, yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
        size = (yard.settings.roots[0] / "tasks" / "by-heart.jsonl").stat().st_size
        both = recipe(*({"file": "models:tasks/by-heart.jsonl", "name": name} for name in ("a", "b")))
        monkeypatch.setattr("app.planning.tasks.MAX_BYTES", 2 * size)
        assert len(planned(yard, both).tasks) == 2
        monkeypatch.setattr("app.planning.tasks.MAX_BYTES", 2 * size - 1)
        assert refused(lambda: planned(yard, both)) == [("task_invalid", "evaluation.tasks[1].file")]

    def test_everything_else_that_does_not_fit(self, yard: Yard) -> None:
        both = [{"file": "models:tasks/by-heart.jsonl", "metric": metric} for metric in ("exact_match", "nll")]
        assert [item.task.name for item in planned(yard, recipe(*both)).tasks] == ["by-heart", "by-heart-nll"]
        twice = recipe(*({**task, "name": "same"} for task in both))
        assert refused(lambda: planned(yard, twice)) == [("recipe_invalid", "evaluation.tasks")]
        adapter = recipe(output={"kind": "adapter"})
        assert ("not_supported", "evaluation") in refused(lambda: planned(yard, adapter))
        assert refused(lambda: planned(yard, recipe(evaluation={"tasks": []}))) == [
            ("recipe_invalid", "evaluation.tasks")
        ]
        first = {**recipe(), "name": "first"}
        last = {"merge_method": "linear", "models": [{"model": "first", "parameters": {"weight": 1.0}}]}
        assert refused(lambda: planned(yard, {"documents": [first, last]})) == [
            ("not_supported", "documents[0].evaluation")
        ]

    def test_messages_need_a_chat_template_in_the_result(self, yard: Yard) -> None:
        root = yard.settings.roots[0]
        config = json.loads((root / "chat" / "tokenizer_config.json").read_text())
        config.pop("chat_template", None)
        (root / "chat" / "tokenizer_config.json").write_text(json.dumps(config))
        (root / "chat" / "chat_template.jinja").unlink(missing_ok=True)
        assert refused(lambda: planned(yard, recipe())) == [("chat_template_missing", "evaluation.tasks[0].file")]
        assert planned(yard, recipe(chat_template="chatml")).tasks


class TestScoring:
    def test_the_scores_are_told_everywhere_and_are_those_of_the_artifact(self, yard: Yard, tmp_path: Path) -> None:
        tasks = [
            {"file": "models:tasks/by-heart.jsonl"},
            {"file": "models:tasks/by-heart.jsonl", "metric": "nll", "name": "likely"},
            {"file": "models:tasks/by-heart.jsonl", "metric": "contains", "name": "in", "max_new_tokens": 20},
        ]
        job = yard.submit(recipe(*tasks), ring=False)
        assert attempt(place_in(yard), job) is Ending.PUBLISHED
        done = yard.jobs.get(job.id)
        scores = published(yard, done, tmp_path / "model")
        events = [event for event in yard.jobs.events(job.id) if event.type in ("stage", "scored")]
        assert [event.data.get("stage", event.data.get("name")) for event in events] == [
            *("merging", "evaluating", "by-heart", "likely", "in", "publishing")
        ]
        plan = planned(yard, dict(done.resolved))
        with loaded(tmp_path / "model", "cpu") as model:
            assert [asdict(score(model, item.task)) for item in plan.tasks] == scores
        assert scores[0]["score"] == scores[2]["score"] == 1 and 0 < scores[1]["score"] < 1

    def test_it_is_the_same_in_a_bucket(self, tmp_path: Path, models: Path, s3_endpoint: str) -> None:
        bucket = new_bucket(s3_endpoint)
        with lonely_yard(tmp_path, models, **bucket.settings()) as yard:
            job = yard.submit(recipe(output={"max_shard_size": "100KB"}), ring=False)
            assert attempt(place_in(yard), job) is Ending.PUBLISHED
            published(yard, yard.jobs.get(job.id), tmp_path / "model")
            assert not any(READ_BACK in key for key in bucket.sizes()) and list(yard.store.scratched()) == []

    def test_a_prompt_that_is_too_long_fails_the_merge_and_leaves_nothing(self, yard: Yard) -> None:
        job = yard.submit(recipe({"file": "models:tasks/long.jsonl"}), ring=False)
        assert attempt(place_in(yard), job) is Ending.FAILED
        failed = yard.jobs.get(job.id)
        assert failed.status is Status.FAILED and failed.error and failed.error["code"] == "task_too_long"
        assert "Line 2" in failed.error["message"] and yard.files(job) == []

    def test_a_cancel_is_heard_while_it_is_scored(self, yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
        job = yard.submit(recipe(), ring=False)
        record = type(yard.jobs).record_score

        def cancel_then(jobs: Any, job_id: str, token: str, found: Any) -> Any:
            jobs.request_cancel(job_id)
            return record(jobs, job_id, token, found)

        monkeypatch.setattr(type(yard.jobs), "record_score", cancel_then)
        assert attempt(place_in(yard), job) is Ending.CANCELLED
        assert yard.files(job) == []

    def test_a_retry_scores_again_what_it_has_adopted(self, yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
        job = yard.submit(recipe(output={"max_shard_size": "100KB"}), ring=False)
        with monkeypatch.context() as broken:
            broken.setattr("worker.evaluation.evaluate.score", lambda *_, **__: 1 / 0)
            assert attempt(place_in(yard), job) is Ending.FAILED
        shards = {shard.file.key for shard in yard.jobs.shards(job.id)}
        assert len(shards) > 1 and set(yard.files(job)) == shards, "the folder that was read is gone"
        assert attempt(place_in(yard), job) is Ending.PUBLISHED
        published(yard, yard.jobs.get(job.id), None)
        assert shards < set(yard.files(job))

    def test_a_merge_without_tasks_is_as_it_was(self, yard: Yard) -> None:
        without = recipe()
        del without["evaluation"]
        job = yard.submit(without, ring=False)
        attempt(place_in(yard), job)
        done = yard.jobs.get(job.id)
        assert Merge.of(done).evaluation == [] and "evaluation" not in (done.artifact or {})
        manifest = json.loads(read_whole(yard.store, (done.artifact or {})["manifest_key"]))
        assert manifest["evaluation"] == []


def published(yard: Yard, job: Job, folder: Path | None) -> list[dict[str, Any]]:
    """The scores, which the row, the API, the manifest and the card agree on; its files in ``folder``."""
    assert job.status is Status.SUCCEEDED and job.artifact is not None, job.error
    scores = job.artifact["evaluation"]
    assert [item.model_dump() for item in Merge.of(job).evaluation] == scores
    files = {file["name"]: read_whole(yard.store, file["key"]) for file in job.artifact["files"]}
    assert json.loads(files["mergeyard.json"])["evaluation"] == scores
    card = files["README.md"].decode()
    for item in scores:
        shown = [item["name"], item["metric"], f"{item['score']:.4f}", f"{item['standard_error']:.4f}"]
        assert "| " + " | ".join([*shown, str(item["examples"])]) + " |" in card
    assert sorted(yard.files(job)) == sorted(file["key"] for file in job.artifact["files"])
    if folder is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
    return list(scores)


def test_a_task_file_is_uploaded_like_a_model(yard: Yard) -> None:
    draft = UploadStore(yard.settings.uploads).begin()
    draft.add("mine.jsonl", [lines(chat("hi", "hello")).encode()])
    made = draft.check()
    draft.commit(made)
    assert made.kind == "task"
    named = recipe({"file": made.reference})
    assert refused(lambda: planned(yard, named)) == [("source_not_found", "evaluation.tasks[0].file")]
    OwnedUploads(yard.jobs.database).add(made, by=Caller(owner="local", scopes=frozenset()))
    plan = planned(yard, named)
    assert plan.tasks[0].task.examples[0].answer == "hello" and plan.tasks[0].task.name.startswith("sha256-")
    assert planned(yard, dict(plan.recipe)).digest == plan.digest, "a worker plans it again"


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"a.jsonl": "{}", "b.jsonl": "{}"}, "request_invalid"),
        ({"a.jsonl": "{}", "config.json": "{}"}, "request_invalid"),
        ({"a.jsonl": ""}, "task_invalid"),
        ({"a.jsonl": "{}\n["}, "task_invalid"),
    ],
)
def test_what_is_no_task_file_is_not_taken(tmp_path: Path, files: dict[str, str], code: str) -> None:
    draft = UploadStore(tmp_path).begin()
    for name, content in files.items():
        draft.add(name, [content.encode()])
    with pytest.raises(MergeyardError) as found:
        draft.check()
    assert found.value.code == code


def test_a_local_merge_is_scored_too(yard: Yard, models: Path, tmp_path: Path) -> None:
    (models / "recipe.json").write_text(json.dumps(
        recipe({"file": "tasks/by-heart.jsonl"}, base_model="chat", models=[{"adapter": "small"}])
    ))  # fmt: skip
    place = here(models, yard.settings.model_copy(update={"model_roots": ""}))
    plan = plan_recipe((models / "recipe.json").read_text(), place)
    assert plan.recipe["evaluation"]["tasks"][0]["file"] == "tasks/by-heart.jsonl"
    manifest = merge_plan(plan, tmp_path / "out", yard.settings, device="cpu", threads=1, on_progress=lambda *_: None)
    [found] = manifest.evaluation
    assert found.name == "by-heart" and found.examples == len(LEARNT)
    assert json.loads((tmp_path / "out" / "mergeyard.json").read_text())["evaluation"] == [asdict(found)]
