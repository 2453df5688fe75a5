"""Text or a mapping → Recipe, with every problem found at once, each with its place and the nearest known name."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from app import strict_json
from app.errors import MergeyardError, Problem
from app.recipe.chat_templates import check_chat_template
from app.recipe.grammar import Output, Recipe, SourceEntry
from app.recipe.methods import METHODS, MethodSpec
from app.recipe.tokenizer import Tokenizer, TokenSetting, TokenSource
from app.recipe.values import check_value

MAX_TEXT = 256_000  # characters; far above any real recipe, as are the next three
MAX_NODES = 100_000  # YAML aliases can unfold to billions
MAX_DEPTH = 32
MAX_STRING = 2_000
MAX_TEMPLATE = 64_000  # a chat template
MAX_BITS = 256
MAX_PROBLEMS = 100  # more would not be read

# Grammar that is mergekit's and valid, but that this version does not carry out: refused by name, never ignored.
LATER_KEYS = {
    "slices": "list whole models under `models`",
    "modules": "list whole models under `models`",
    "evaluation": "leave it out and score the result yourself",
}


def parse_recipe(source: str | bytes | Mapping[str, Any]) -> Recipe:
    """Parse YAML or JSON text, or a mapping made from it.

    Raises:
        MergeyardError: with all problems: `recipe_syntax`, `unknown_key`, `unknown_method`, `no_sources`,
            `parameter_invalid`, `recipe_invalid`, `not_supported`.
    """
    raw = _load(source) if isinstance(source, str | bytes) else source
    _bound(raw)
    if not isinstance(raw, Mapping):
        raise MergeyardError("recipe_syntax", "A recipe is a mapping with `merge_method` and `models` at its top")
    problems = [
        Problem(code="not_supported", message=f"`{key}` is not supported yet; {instead}.", where=key)
        for key, instead in LATER_KEYS.items()
        if raw.get(key) is not None
    ]
    known = {str(key): value for key, value in raw.items() if key not in LATER_KEYS}
    try:
        recipe = Recipe.model_validate(known)
    except ValidationError as error:
        raise MergeyardError.of((problems + _structural(error))[:MAX_PROBLEMS]) from None
    recipe, more = _check(recipe)
    if problems or more:
        raise MergeyardError.of((problems + more)[:MAX_PROBLEMS])
    return recipe


class _Loader(yaml.CSafeLoader):
    """Safe YAML that refuses duplicate keys and reads 1e-3 as the number it is (YAML 1.2)."""

    _merged = 0

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge keys (``<<``) copy what they name while the text is read, so they are bounded here."""
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge" and isinstance(value, yaml.SequenceNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "`<<` takes one mapping, not a list of them", value.start_mark
                )
        super().flatten_mapping(node)
        self._merged += len(node.value)
        if self._merged > MAX_NODES:
            raise yaml.constructor.ConstructorError(None, None, "its merge keys unfold to too much", node.start_mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _load(text: str | bytes) -> Any:
    """YAML, of which JSON is nearly a subset; what looks like JSON is tried as that first."""
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
    except UnicodeDecodeError:
        raise MergeyardError("recipe_syntax", "The recipe is not UTF-8 text") from None
    if len(text) > MAX_TEXT:
        raise MergeyardError("recipe_syntax", f"The recipe is longer than {MAX_TEXT:,} characters")
    try:
        if text.lstrip().startswith("{"):
            try:
                return strict_json.loads(text)
            except json.JSONDecodeError:
                pass  # a YAML flow mapping also starts so
        documents = list(yaml.load_all(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise MergeyardError("recipe_syntax", f"Not valid YAML: {error.problem}", where=where) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise MergeyardError("recipe_syntax", f"Not valid YAML: {str(error)[:200]}") from None
    if len(documents) > 1:
        raise MergeyardError(
            "not_supported", "Several documents in one recipe are not supported yet; send one at a time"
        )
    return documents[0] if documents else None


def _bound(raw: Any) -> None:
    """Refuse what unfolds to more than any recipe needs (aliases of aliases, aliases of themselves)."""
    budget = MAX_NODES
    template = raw.get("chat_template") if isinstance(raw, Mapping) else None
    stack = [(raw, 0)]
    while stack:
        value, depth = stack.pop()
        budget -= 1
        if budget < 0 or depth > MAX_DEPTH:
            raise MergeyardError(
                "recipe_syntax", "The recipe is too large or too deeply nested; check its anchors and aliases"
            )
        longest = MAX_TEMPLATE if value is template else MAX_STRING
        if isinstance(value, str) and len(value) > longest:
            raise MergeyardError("recipe_syntax", f"A text in the recipe is longer than {longest:,} characters")
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise MergeyardError("recipe_syntax", "A number in the recipe has too many digits")
        if isinstance(value, Mapping):
            stack.extend((item, depth + 1) for pair in value.items() for item in pair)
        elif isinstance(value, list):
            stack.extend((item, depth + 1) for item in value)


def _structural(error: ValidationError) -> list[Problem]:
    """pydantic's findings as problems with our codes and places."""
    problems = []
    for found in error.errors():
        where = place(found["loc"])
        if found["type"] == "extra_forbidden":
            inside: type[BaseModel] = Recipe
            if found["loc"][0] == "tokenizer":
                inside = (Tokenizer, TokenSetting, TokenSource)[min(len(found["loc"]) // 2 - 1, 2)]
            elif len(found["loc"]) > 1:
                inside = Output if found["loc"][0] == "output" else SourceEntry
            problems.append(unknown_key(str(found["loc"][-1]), inside.model_fields, where))
        elif found["type"] == "missing":
            message = f"`{found['loc'][-1]}` is missing; it is required."
            problems.append(Problem(code="recipe_invalid", message=message, where=where))
        else:
            message = found["msg"].removeprefix("Value error, ")
            problems.append(Problem(code="recipe_invalid", message=f"{message}.", where=where))
    return problems


def _check(recipe: Recipe) -> tuple[Recipe, list[Problem]]:
    """Check what needs the method: sources, parameters; returns the recipe with parameter values in canonical form."""
    spec = METHODS.get(recipe.merge_method)
    if spec is None:
        return recipe, [_unknown_method(recipe.merge_method)]
    problems: list[Problem] = []
    if not recipe.models:
        message = "`models` is empty: name at least one model or adapter to merge."
        problems.append(Problem(code="no_sources", message=message, where="models"))
    if spec.base == "required" and not recipe.base_model:
        message = f"{recipe.merge_method} merges what sources change, so it needs the `base_model` they come from."
        problems.append(Problem(code="recipe_invalid", message=message, where="base_model"))
    if recipe.output.kind == "adapter":
        message = "`output.kind: adapter` is not supported yet; write a checkpoint."
        problems.append(Problem(code="not_supported", message=message, where="output.kind"))
    if recipe.tokenizer and recipe.tokenizer_source:
        message = "Give `tokenizer` or its short form `tokenizer_source`, not both."
        problems.append(Problem(code="recipe_invalid", message=message, where="tokenizer_source"))
    if recipe.chat_template is not None and (problem := check_chat_template(recipe.chat_template)):
        problems.append(problem)
    parameters = _parameters(recipe.parameters, spec, "parameters", problems, per_source_only=False)
    models = []
    for index, entry in enumerate(recipe.models):
        where = f"models[{index}]"
        if (entry.model is None) == (entry.adapter is None):
            message = "An entry names either a `model` or an `adapter`."
            problems.append(Problem(code="recipe_invalid", message=message, where=where))
        own = _parameters(entry.parameters, spec, f"{where}.parameters", problems, per_source_only=True)
        models.append(entry.model_copy(update={"parameters": own}))
    return recipe.model_copy(update={"parameters": parameters, "models": tuple(models)}), problems


def _parameters(
    raw: Mapping[str, Any], spec: MethodSpec, where: str, problems: list[Problem], *, per_source_only: bool
) -> dict[str, Any]:
    checked = {}
    for key, value in raw.items():
        place_of_key = f"{where}.{key}"
        parameter = spec.parameters.get(key)
        if parameter is None:
            problems.append(unknown_key(key, spec.parameters, place_of_key))
        elif per_source_only and not parameter.per_source:
            message = f"`{key}` belongs to the whole merge; move it to the recipe's own `parameters`."
            problems.append(Problem(code="parameter_invalid", message=message, where=place_of_key))
        else:
            try:
                checked[key] = check_value(value, parameter, place_of_key, key)
            except MergeyardError as error:
                problems.extend(error.problems)
    return checked


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
