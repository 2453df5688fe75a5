"""Recipes as YAML, and where two of them differ."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.recipe.difference import Line, as_yaml, difference
from app.recipe.text import load

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30) | st.sampled_from(
    ["1e5", "1.0", "null", "yes", "~", "0x1f", "a\nb\n", "a \n b", "\n", "- x", "{", "12:30", "2026-01-31", "---", ""]
)
PLAIN = (
    TEXT | st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=12,
)
RECIPE = {
    "base_model": "models:llama",
    "merge_method": "ties",
    "parameters": {"lambda": 1.0, "density": [0.1, 0.5]},
    "models": [{"adapter": "models:sql", "parameters": {"weight": 1.0}}, {"adapter": "models:json"}],
}


@given(recipe=st.dictionaries(TEXT, VALUES, min_size=1, max_size=4))
def test_what_is_written_reads_back_as_it_was(recipe: dict[str, Any]) -> None:
    assert load(as_yaml(recipe)) == recipe


def test_several_documents_are_written_as_mergekit_writes_them() -> None:
    recipe = {"documents": [RECIPE, {**RECIPE, "name": "1e5"}]}
    text = as_yaml(recipe)
    assert text.count("---\n") == 1
    assert "documents" not in text
    assert load(text) == recipe


def test_a_value_has_a_line_and_a_list_of_numbers_one() -> None:
    assert as_yaml(RECIPE) == (
        "base_model: models:llama\n"
        "merge_method: ties\n"
        "parameters:\n"
        "  lambda: 1.0\n"
        "  density: [0.1, 0.5]\n"
        "models:\n"
        "- adapter: models:sql\n"
        "  parameters:\n"
        "    weight: 1.0\n"
        "- adapter: models:json\n"
    )


def test_a_template_is_a_block() -> None:
    text = as_yaml({"chat_template": "{% for m in messages %}\n{{ m }}\n{% endfor %}\n"})
    assert text == "chat_template: |\n  {% for m in messages %}\n  {{ m }}\n  {% endfor %}\n"


def test_equal_recipes_have_no_difference() -> None:
    assert difference(as_yaml(RECIPE), as_yaml(dict(RECIPE))) == ()


def test_a_changed_value_is_a_line_taken_out_and_one_put_in() -> None:
    before = as_yaml(RECIPE)
    after = before.replace("lambda: 1.0", "lambda: 0.7")
    (group,) = difference(before, after)
    assert group == (
        Line("same", 1, 1, "base_model: models:llama"),
        Line("same", 2, 2, "merge_method: ties"),
        Line("same", 3, 3, "parameters:"),
        Line("removed", 4, None, "  lambda: 1.0"),
        Line("added", None, 4, "  lambda: 0.7"),
        Line("same", 5, 5, "  density: [0.1, 0.5]"),
        Line("same", 6, 6, "models:"),
        Line("same", 7, 7, "- adapter: models:sql"),
    )


@pytest.mark.parametrize("context", [0, 3])
@given(before=st.lists(st.sampled_from("abc"), max_size=12), after=st.lists(st.sampled_from("abc"), max_size=12))
def test_the_difference_leads_from_one_text_to_the_other(context: int, before: list[str], after: list[str]) -> None:
    lines = {line for group in difference("\n".join(before), "\n".join(after), context=context) for line in group}
    kept = [text for number, text in enumerate(before, 1) if number not in {line.before for line in lines}]
    assert kept == [text for number, text in enumerate(after, 1) if number not in {line.after for line in lines}]
    assert all(before[line.before - 1] == line.text for line in lines if line.before)
    assert all(after[line.after - 1] == line.text for line in lines if line.after)
    assert all((line.before is None) == (line.change == "added") for line in lines)
    assert all((line.after is None) == (line.change == "removed") for line in lines)
