"""Text or a mapping → Recipe, with every problem found at once, each with its place and the nearest known name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from app.errors import MergeyardError, Problem
from app.recipe.chat_templates import check_chat_template
from app.recipe.documents import in_order
from app.recipe.evaluation import Evaluation, TaskEntry
from app.recipe.grammar import MAX_SOURCES, Document, LayersEntry, ModuleEntry, Output, Part, Recipe, Slice, SourceEntry
from app.recipe.methods import METHODS, MethodSpec
from app.recipe.text import MAX_DOCUMENTS, bound, load
from app.recipe.tokenizer import Tokenizer, TokenSetting, TokenSource
from app.recipe.values import check_value

MAX_PROBLEMS = 100  # more would not be read

INSIDE: Mapping[str, type[BaseModel]] = {
    "output": Output,
    "models": SourceEntry,
    "modules": ModuleEntry,
    "slices": Slice,
    "sources": LayersEntry,
    "evaluation": Evaluation,
    "tasks": TaskEntry,
}


def parse_recipe(source: str | bytes | Mapping[str, Any]) -> Recipe:
    """Parse YAML or JSON text, or a mapping made from it: one document, or several under ``documents``.

    Raises:
        MergeyardError: with all problems: `recipe_syntax`, `unknown_key`, `unknown_method`, `no_sources`,
            `parameter_invalid`, `recipe_invalid`, `not_supported`.
    """
    raw = load(source) if isinstance(source, str | bytes) else source
    bound(raw)
    if not isinstance(raw, Mapping):
        raise MergeyardError("recipe_syntax", "A recipe is a mapping with `merge_method` and `models` at its top")
    problems: list[Problem] = []
    recipe = _several(raw, problems) if "documents" in raw else _one(raw, None, problems)
    if problems or recipe is None:
        raise MergeyardError.of(problems[:MAX_PROBLEMS])
    return recipe


def _several(raw: Mapping[str, Any], problems: list[Problem]) -> Recipe | None:
    """The result's recipe with those whose results it takes; None, and problems, where something is wrong."""
    listed = raw["documents"]
    for key in raw:
        if key != "documents":
            message = f"`{key}` stands beside `documents`; move it into the document that it is meant for."
            problems.append(Problem(code="unknown_key", message=message, where=str(key)))
    if not isinstance(listed, list) or not 0 < len(listed) <= MAX_DOCUMENTS:
        message = f"`documents` lists 1 to {MAX_DOCUMENTS} recipes."
        problems.append(Problem(code="recipe_invalid", message=message, where="documents"))
        return None
    documents = []
    for number, item in enumerate(listed):
        own: list[Problem] = []
        if isinstance(item, Mapping):
            documents.append(_one(item, number, own))
        else:
            message = "A document is a recipe, a mapping with `merge_method` at its top; remove it where it is empty."
            own.append(Problem(code="recipe_invalid", message=message))
        inside = f"documents[{number}]"
        problems.extend(
            replace(problem, where=f"{inside}.{problem.where}" if problem.where else inside) for problem in own
        )
    found = [document for document in documents if document is not None]
    return None if problems else in_order(found, problems)


def _one(raw: Mapping[str, Any], number: int | None, problems: list[Problem]) -> Recipe | None:
    """One document, checked by itself; its problems' places are those in it."""
    try:
        document = Document.model_validate({str(key): value for key, value in raw.items()})
    except ValidationError as error:
        problems.extend(_structural(error))
        return None
    recipe, more = _check(Recipe.of(document, number))
    problems.extend(more)
    return recipe


def _structural(error: ValidationError) -> list[Problem]:
    """pydantic's findings as problems with our codes and places."""
    problems = []
    for found in error.errors():
        where = place(found["loc"])
        if found["type"] == "extra_forbidden" and found["loc"][-1] == "residual_weight":
            message = "`residual_weight` changes nothing in mergekit, and nothing here; leave it out."
            problems.append(Problem(code="not_supported", message=message, where=where))
        elif found["type"] == "extra_forbidden":
            problems.append(unknown_key(str(found["loc"][-1]), _model_at(found["loc"]).model_fields, where))
        elif found["type"] == "missing":
            message = f"`{found['loc'][-1]}` is missing; it is required."
            problems.append(Problem(code="recipe_invalid", message=message, where=where))
        else:
            message = found["msg"].removeprefix("Value error, ")
            problems.append(Problem(code="recipe_invalid", message=f"{message}.", where=where))
    return problems


def _model_at(location: Sequence[str | int]) -> type[BaseModel]:
    """The part of the grammar that the last key of a place stands in."""
    if location[0] == "tokenizer":
        return (Tokenizer, TokenSetting, TokenSource)[min(len(location) // 2 - 1, 2)]
    inside = [INSIDE[part] for part in location[:-1] if isinstance(part, str) and part in INSIDE]
    return inside[-1] if inside else Document


def _check(recipe: Recipe) -> tuple[Recipe, list[Problem]]:
    """Check what needs the method: sources, parameters; returns the recipe with parameter values in canonical form."""
    spec = METHODS.get(recipe.merge_method)
    if spec is None:
        return recipe, [_unknown_method(recipe.merge_method)]
    problems = [*_shape(recipe, spec), *_of_another_kind(recipe)]
    if recipe.tokenizer and recipe.tokenizer_source:
        message = "Give `tokenizer` or its short form `tokenizer_source`, not both."
        problems.append(Problem(code="recipe_invalid", message=message, where="tokenizer_source"))
    if recipe.chat_template is not None and (problem := check_chat_template(recipe.chat_template)):
        problems.append(problem)
    checked = _Checked(spec, problems)
    parameters = checked.parameters(recipe.parameters, "parameters", "recipe")
    update = {
        "parameters": parameters,
        "models": checked.models(recipe, ""),
        "slices": checked.slices(recipe, ""),
        "modules": {name: checked.module(module, f"modules.{name}.") for name, module in recipe.modules.items()},
    }
    return _with(recipe, update), problems


def _with(value: M, update: Mapping[str, Any]) -> M:
    """A copy with new values of what was written: what was left out stays left out, and is not shown to its author."""
    return value.model_copy(update={key: item for key, item in update.items() if key in value.model_fields_set})


def _shape(recipe: Recipe, spec: MethodSpec) -> Iterable[Problem]:
    """What is there must be there once: one of ``models``, ``slices`` and ``modules``, a base where one is needed."""
    given = [key for key in ("models", "slices", "modules") if getattr(recipe, key)]
    if not given:
        message = "`models` is empty: name at least one model or adapter to merge."
        yield Problem(code="no_sources", message=message, where="models")
    for key in given[1:]:
        message = f"A recipe has `{given[0]}` or `{key}`, not both; keep one of them."
        yield Problem(code="recipe_invalid", message=message, where=key)
    for where, part in recipe.parts.items():
        if recipe.modules and not part.models and not part.slices:
            message = "A module has `models` or `slices`; name what to merge in it."
            yield Problem(code="no_sources", message=message, where=where)
        elif recipe.modules and part.models and part.slices:
            message = "A module has `models` or `slices`, not both; keep one of them."
            yield Problem(code="recipe_invalid", message=message, where=where)
        for number, item in enumerate(part.slices):
            lengths = {entry.layer_range[1] - entry.layer_range[0] for entry in item.sources}
            if len(lengths) > 1:
                message = "The sources of a slice give the same number of layers each; make their ranges equally long."
                inside = f"{where}." if where else ""
                yield Problem(code="recipe_invalid", message=message, where=f"{inside}slices[{number}].sources")
    if sum(1 for _ in recipe.entries()) > MAX_SOURCES * 4:
        message = f"A recipe names at most {MAX_SOURCES * 4} sources in all its slices and modules."
        yield Problem(code="recipe_invalid", message=message)
    sliced = all(part.slices and all(item.base_model for item in part.slices) for part in recipe.parts.values())
    if spec.base == "required" and not recipe.base_model and not sliced:
        message = f"{recipe.merge_method} merges what sources change, so it needs the `base_model` they come from."
        yield Problem(code="recipe_invalid", message=message, where="base_model")


WHOLE = ("choice", "whole")  # the kinds that have one value for the whole merge
E = TypeVar("E", bound=SourceEntry)
M = TypeVar("M", bound=BaseModel)
Level = Literal["recipe", "part", "source"]


class _Checked:
    """The recipe's parts with their parameters in canonical form; what is wrong goes to ``problems``."""

    def __init__(self, spec: MethodSpec, problems: list[Problem]) -> None:
        self._spec, self._problems = spec, problems

    def module(self, module: ModuleEntry, inside: str) -> ModuleEntry:
        update = {
            "parameters": self.parameters(module.parameters, f"{inside}parameters", "part"),
            "models": self.models(module, inside),
            "slices": self.slices(module, inside),
        }
        return _with(module, update)

    def models(self, part: Part, inside: str) -> tuple[SourceEntry, ...]:
        return tuple(self._entry(entry, f"{inside}models[{index}]") for index, entry in enumerate(part.models))

    def slices(self, part: Part, inside: str) -> tuple[Slice, ...]:
        checked = []
        for number, item in enumerate(part.slices):
            where = f"{inside}slices[{number}]"
            sources = tuple(self._entry(entry, f"{where}.sources[{index}]") for index, entry in enumerate(item.sources))
            parameters = self.parameters(item.parameters, f"{where}.parameters", "part")
            checked.append(_with(item, {"sources": sources, "parameters": parameters}))
        return tuple(checked)

    def _entry(self, entry: E, where: str) -> E:
        if (entry.model is None) == (entry.adapter is None):
            message = "An entry names either a `model` or an `adapter`."
            self._problems.append(Problem(code="recipe_invalid", message=message, where=where))
        own = self.parameters(entry.parameters, f"{where}.parameters", "source")
        return _with(entry, {"parameters": own})

    def parameters(self, raw: Mapping[str, Any], where: str, level: Level) -> dict[str, Any]:
        """What is no source's own stands at the recipe's top, or at slices and modules where it may vary by tensor."""
        checked = {}
        for key, value in raw.items():
            place_of_key = f"{where}.{key}"
            parameter = self._spec.parameters.get(key)
            if parameter is None:
                self._problems.append(unknown_key(key, self._spec.parameters, place_of_key))
            elif not parameter.per_source and (level == "source" or (level == "part" and parameter.kind in WHOLE)):
                message = f"`{key}` belongs to the whole merge; move it to the recipe's own `parameters`."
                self._problems.append(Problem(code="parameter_invalid", message=message, where=place_of_key))
            else:
                try:
                    checked[key] = check_value(value, parameter, place_of_key, key)
                except MergeyardError as error:
                    self._problems.extend(error.problems)
        return checked


def _of_another_kind(recipe: Recipe) -> list[Problem]:
    """An adapter is one file for the base as it is, and a checkpoint has no rank."""
    output = recipe.output
    alone = {"checkpoint": {"rank", "min_retained_energy", "other"}, "adapter": {"max_shard_size"}}[output.kind]
    problems = [
        Problem(
            code="recipe_invalid",
            message=f"`{name}` means nothing with `kind: {output.kind}`; leave it out.",
            where=f"output.{name}",
        )
        for name in sorted(alone & output.model_fields_set)
    ]
    if output.kind == "adapter" and (recipe.slices or recipe.modules):
        message = "Slices and modules make another model, which no adapter does; list whole models under `models`."
        problems.append(Problem(code="not_supported", message=message, where="output.kind"))
    return problems


def _unknown_method(name: str) -> Problem:
    near = _nearest(name, METHODS)
    hint = f"did you mean `{near}`?" if near else f"use one of {', '.join(METHODS)}."
    message = f"There is no merge method `{name}`; {hint}"
    return Problem(code="unknown_method", message=message, where="merge_method")


def unknown_key(key: str, known: Iterable[str], where: str) -> Problem:
    """The problem of a misspelt key, naming the nearest known one."""
    names = list(known)
    near = _nearest(key, names)
    hint = f"did you mean `{near}`?" if near else f"known here: {', '.join(names)}."
    return Problem(code="unknown_key", message=f"`{key}` is not known; {hint}", where=where)


def place(location: Iterable[str | int]) -> str:
    """``("models", 0, "parameters")`` → ``models[0].parameters``."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _nearest(name: str, known: Iterable[str]) -> str | None:
    found = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.6)
    return found[0] if found else None
