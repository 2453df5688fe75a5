"""``mergeyard evaluate``: a model on this machine, by plain paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.cli.commands import mergeyard
from tests.evaluation.chat import LEARNT, write_chat


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_chat(root / "chat")
    tiny.write_lora(root / "chat", root / "adapter", rank=2)
    rows = [{"messages": [{"role": "user", "content": prompt}], "answer": answer} for prompt, answer in LEARNT]
    (root / "heart.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "empty.jsonl").write_text("")
    return root


def scores(*arguments: Any) -> list[dict[str, Any]]:
    ran = mergeyard("evaluate", *arguments, "--json")
    assert ran.code == 0, ran.err
    return list(json.loads(ran.out)["scores"])


def test_a_model_is_scored_on_each_task(folder: Path) -> None:
    tasks = ["--tasks", folder / "heart.jsonl", "--tasks", f"{folder / 'heart.jsonl'}=nll"]
    ran = mergeyard("evaluate", folder / "chat", tasks[0], tasks[1])
    assert ran.code == 0 and "heart" in ran.out and "exact_match" in ran.out and "1.0000" in ran.out, ran.err
    exact, likely = scores(folder / "chat", *tasks, "--limit", 3)
    assert (exact["name"], likely["name"]) == ("heart", "heart-nll")
    assert (likely["metric"], likely["examples"]) == ("nll", 3) and 0 < likely["score"] < 1


def test_an_adapter_on_it_is_merged_first(folder: Path) -> None:
    nll = ["--tasks", f"{folder / 'heart.jsonl'}=nll"]
    [alone], [adapted] = scores(folder / "chat", *nll), scores(f"{folder / 'chat'}+{folder / 'adapter'}", *nll)
    assert alone["score"] != adapted["score"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["chat", "--tasks", "heart.jsonl=bleu"], "bleu"),
        (["chat", "--tasks", "empty.jsonl"], "has no examples"),
        (["chat", "--tasks", "heart.jsonl=multiple_choice"], "does not fit the metric"),
        (["nowhere", "--tasks", "heart.jsonl"], "nowhere"),
        (["adapter", "--tasks", "heart.jsonl"], "is an adapter"),
        (["chat", "--tasks", "heart.jsonl", "--device", "tpu"], "tpu"),
        (["chat"], "--tasks"),
    ],
)
def test_what_is_wrong_is_a_sentence_and_exit_code_2(folder: Path, arguments: list[str], says: str) -> None:
    given = [str(folder / word) if (folder / word.partition("=")[0]).exists() else word for word in arguments]
    ran = mergeyard("evaluate", *given)
    assert ran.code == 2 and says in ran.err and "Traceback" not in ran.err, (ran.code, ran.err)
