"""Several documents in one recipe: which of them is the result, and in which order the others can be merged.

As in mergekit-multi a document names an earlier one by its ``name``, in whatever order they stand; where a model is
called the same, the document is meant.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from app.errors import Problem
from app.recipe.grammar import Recipe
from app.sources.references import model_of

NAME = re.compile(r"[^\x00-\x1f\x7f:+@]{1,100}")  # what could be read as a scheme, an adapter or a revision is none


def in_order(documents: Sequence[Recipe], problems: list[Problem]) -> Recipe | None:
    """The document without a name (the last, where all have one), with those it needs as ``earlier``.

    None, and problems of code `recipe_invalid` or `not_supported` at their places, where that is not plain.
    """
    unnamed = [document for document in documents if document.name is None]
    result = unnamed[0] if unnamed else documents[-1]
    others = [document for document in documents if document is not result]
    for document in unnamed[1:]:
        message = (
            f"A document without a `name` is the result, which {result.place('')} is already; "
            "name this one, so that another can take it."
        )
        problems.append(Problem(code="recipe_invalid", message=message, where=document.place("name")))
    by_name: dict[str, Recipe] = {}
    for document in documents:
        if document.name is not None and by_name.setdefault(document.name, document) is not document:
            message = f"{by_name[document.name].place('')} is called {document.name!r} too; names are given once."
            problems.append(Problem(code="recipe_invalid", message=message, where=document.place("name")))
    problems.extend(problem for document in others if (problem := _problem_of(document)))
    if problems:
        return None
    order: list[Recipe] = []
    _visit(result, (), by_name, order, problems)
    for document in others:
        if document not in order and not problems:
            message = (
                f"No document that the result needs names {document.name!r}, and the result is {result.place('')} "
                "(the one without a name, or else the last); name it there, or leave it out."
            )
            problems.append(Problem(code="recipe_invalid", message=message, where=document.place("")))
    return None if problems else result.model_copy(update={"earlier": tuple(order[:-1])})


def _problem_of(document: Recipe) -> Problem | None:
    """Of a document whose result another one takes."""
    if document.name is not None and not NAME.fullmatch(document.name):
        message = "The name of a document is 1 to 100 characters without `:`, `+` and `@`, so that others can name it."
        return Problem(code="recipe_invalid", message=message, where=document.place("name"))
    if document.output.kind == "adapter":
        message = "Only the result can be written as an adapter: a later document takes the whole model."
        return Problem(code="not_supported", message=message, where=document.place("output.kind"))
    return None


def _visit(
    document: Recipe,
    path: tuple[Recipe, ...],
    by_name: Mapping[str, Recipe],
    order: list[Recipe],
    problems: list[Problem],
) -> None:
    """Appends what a document needs, each after what it needs itself, and then the document. ``path`` led to it."""
    if document in path:
        circle = [str(item.name) for item in (*path[path.index(document) :], document)]
        message = f"These documents need each other's results, {' ← '.join(circle)}; none of them can be the first."
        problems.append(Problem(code="recipe_invalid", message=message, where=document.place("")))
    if document in order or problems:
        return
    # by name, so that neither the order of the documents nor that of their sources shows in the result
    for name in sorted({model_of(text) for text in document.references()} & by_name.keys()):
        _visit(by_name[name], (*path, document), by_name, order, problems)
    order.append(document)
