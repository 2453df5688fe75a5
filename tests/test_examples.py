"""The demo's data and adapters: held-out means held out, and what is shipped is small and documented."""

import json
import re
from pathlib import Path

import pytest

from examples.json_extraction import FRAMES as JSON_FRAMES
from examples.json_extraction import KINDS
from examples.sql_requests import FRAMES as SQL_FRAMES
from examples.sql_requests import TABLES, Wordings, plural
from examples.tasks import ARTICLE, TASKS, Example, Task, article_leaks, examples
from examples.vocabulary import Split

ADAPTERS = Path(__file__).resolve().parent.parent / "examples" / "adapters"
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@pytest.fixture(scope="module")
def generated() -> dict[tuple[Task, Split], list[Example]]:
    return {(task, split): examples(task, split) for task in TASKS for split in SPLITS}


@pytest.mark.parametrize("task", TASKS)
def test_no_prompt_is_in_two_splits(generated: dict[tuple[Task, Split], list[Example]], task: Task) -> None:
    train, validation, test = ({example.prompt for example in generated[task, split]} for split in SPLITS)
    assert not (train & validation or train & test or validation & test)


@pytest.mark.parametrize("task", TASKS)
def test_no_value_is_in_two_splits(generated: dict[tuple[Task, Split], list[Example]], task: Task) -> None:
    train, validation, test = (
        {value for example in generated[task, split] for value in values_of(example)} for split in SPLITS
    )
    assert train and validation and test
    assert not (train & validation or train & test or validation & test)


@pytest.mark.parametrize("wordings", [SQL_FRAMES, JSON_FRAMES, *(kind.texts for kind in KINDS.values())])
def test_no_template_is_in_two_splits(wordings: Wordings) -> None:
    templates = [*set(wordings.train), *set(wordings.validation), *set(wordings.test)]
    assert len(templates) == len(set(templates))


def test_no_table_is_in_two_splits() -> None:
    names = [table.name for split in SPLITS for table in TABLES[split]]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["validation", "test"])
def test_at_least_two_hundred_held_out_examples(
    generated: dict[tuple[Task, Split], list[Example]], task: Task, split: Split
) -> None:
    assert len({example.prompt for example in generated[task, split]}) >= 200


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_article_is_in_no_training_or_validation_example(
    generated: dict[tuple[Task, Split], list[Example]], task: Task, split: Split
) -> None:
    assert [(example, leaks) for example in generated[task, split] if (leaks := article_leaks(example))] == []


@pytest.mark.parametrize("example", ARTICLE, ids=lambda example: example.task)
def test_the_leak_check_knows_the_article(example: Example) -> None:
    assert len(article_leaks(example)) >= 3


@pytest.mark.parametrize("task", TASKS)
def test_the_same_prompt_always_has_the_same_answer(task: Task) -> None:
    answers: dict[str, str] = {}
    for split in SPLITS:
        for example in examples(task, split):
            assert answers.setdefault(example.prompt, example.answer) == example.answer


@pytest.mark.parametrize("task", TASKS)
def test_the_same_examples_come_out_every_time(generated: dict[tuple[Task, Split], list[Example]], task: Task) -> None:
    assert examples(task, "test") == generated[task, "test"]
    assert examples(task, "train", 100) == generated[task, "train"][:100]


def test_json_answers_are_canonical(generated: dict[tuple[Task, Split], list[Example]]) -> None:
    for split in SPLITS:
        for example in generated["json", split]:
            assert json.dumps(json.loads(example.answer), ensure_ascii=False) == example.answer


def test_json_values_are_told_in_the_text(generated: dict[tuple[Task, Split], list[Example]]) -> None:
    for example in generated["json", "test"]:
        assert all(str(value) in example.prompt for value in json.loads(example.answer).values()), example


@pytest.mark.parametrize(
    ("singular", "expected"),
    [("salary", "salaries"), ("release year", "release years"), ("status", "statuses"), ("credits", "credits")],
)
def test_columns_have_english_plurals(singular: str, expected: str) -> None:
    assert plural(singular) == expected


def test_the_adapters_are_small() -> None:
    assert sum(file.stat().st_size for file in ADAPTERS.rglob("*") if file.is_file()) <= 12_000_000


@pytest.mark.parametrize("task", TASKS)
def test_an_adapter_names_its_public_base_and_no_folder(task: Task) -> None:
    config = json.loads((ADAPTERS / task / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("word", ["apache-2.0", "seed", "steps", "exact match", "dequantised", "examples/tasks.py"])
def test_an_adapter_has_its_card(task: Task, word: str) -> None:
    assert word in (ADAPTERS / task / "README.md").read_text()


def test_the_adapters_start_from_different_seeds() -> None:
    seeds = [re.findall(r"layer, seed (\d+)", (ADAPTERS / task / "README.md").read_text()) for task in TASKS]
    assert seeds[0] and seeds[0] != seeds[1]


def values_of(example: Example) -> set[str]:
    """The literals of an answer. Fragments for LIKE are left out: one to three letters are no value of their own."""
    if example.task == "json":
        return {str(value) for value in json.loads(example.answer).values()}
    answer = re.sub(r"LIKE '[^']*'", "", example.answer)
    return {text or number for text, number in re.findall(r"'([^']*)'|\b(\d+)\b", answer)}
