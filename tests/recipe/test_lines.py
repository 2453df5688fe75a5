"""A place that a problem names, as the line on which it stands."""

from __future__ import annotations

import pytest

from app.errors import MergeyardError
from app.recipe import parse_recipe
from app.recipe.lines import line_of

TEXT = """\
base_model: models:base
merge_method: ties
models:
  - adapter: models:a
    parameters:
      density: 2.0
  - {adapter: models:b, parameters: {weight: x}}
parameters:
  weight.lora: 1
"""


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("merge_method", 2),
        ("models[0]", 4),
        ("models[0].parameters.density", 6),
        ("models[1].parameters.weight", 7),
        ("models[1].parameters.density", 7),
        ("models[9].adapter", 3),
        ("parameters.weight.lora", 9),
        ("tokenizer", None),
        ("", None),
        ("line 7, column 3", 7),
    ],
)
def test_a_place_is_on_its_line_or_on_that_of_what_holds_it(where: str, line: int | None) -> None:
    assert line_of(TEXT, where) == line


def test_of_several_documents_each_has_its_own_lines() -> None:
    text = f"{TEXT}---\nmerge_method: linear\nmodels: []\n"
    assert line_of(text, "documents[1].models") == 12
    assert line_of(text, "documents[0].models[1]") == 7
    assert line_of(text, "documents[7].models") is None
    assert line_of("documents:\n  - merge_method: ties\n", "documents[0].merge_method") == 2


def test_every_problem_of_a_bad_recipe_has_a_line() -> None:
    with pytest.raises(MergeyardError) as caught:
        parse_recipe(TEXT)
    assert {line_of(TEXT, problem.where) for problem in caught.value.problems} == {6, 7, 9}


@pytest.mark.parametrize("text", ["a: [", "[" * 5000, "\x00", "", "just text", "- a\n- b", "? [a, b]\n: 1"])
def test_text_that_is_no_recipe_has_no_lines(text: str) -> None:
    assert line_of(text, "models[0].parameters") is None
