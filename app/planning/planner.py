"""Recipe + sources → Plan, or every problem at once. Only headers and configs are read.

Document by document, each in one straight line: references → files (``resolving``) → slots (``layout``), in one
vocabulary (``embedding``) → tensors with their parameters (here) → files (``output``), which later documents read
(``earlier``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from app.errors import MergeyardError, Problem
from app.planning.adapter_output import CONFIG_NAME, adapter_output, problems_of_adapter
from app.planning.earlier import as_earlier
from app.planning.embedding import align
from app.planning.fingerprint import canonical_recipe, plan_digest
from app.planning.grown import grow, vocabulary_size
from app.planning.layout import Slot, lay_out
from app.planning.low_rank import dense_matrices
from app.planning.output import cut_shards, documents_of, estimate, has_chat_template, scoring_bytes
from app.planning.parameters import elects_signs, source_parameters, tensor_parameters
from app.planning.plan import Contribution, Plan, PlannedSource, Scalar, TensorPlan
from app.planning.resolving import ResolvedSource, resolve
from app.planning.tasks import plan_tasks, section
from app.planning.vocabulary import differing, plan_vocabulary
from app.planning.warnings import warnings_of
from app.recipe import Recipe, SourceEntry, parse_recipe
from app.recipe.grammar import shard_bytes
from app.recipe.methods import METHODS, MethodSpec
from app.sources.references import model_of, split_adapter
from app.sources.resolver import Resolver
from app.sources.source import ModelSource

MAX_MADE = 64  # documents, and models with adapters that something else is merged onto


def make_plan(recipe: Recipe, resolver: Resolver) -> Plan:
    """Resolve a recipe against real files.

    Raises:
        MergeyardError: with every problem found, each with its place in the recipe.
    """
    resolver = replace(resolver, names=frozenset(str(document.name) for document in recipe.earlier))
    made: dict[str, ModelSource] = {}  # by what the recipe calls them
    plans: list[Plan] = []
    problems: list[Problem] = []
    lost: set[str] = set()  # documents that cannot be planned, and those that need them
    for document in (*recipe.earlier, recipe):
        if lost.intersection(model_of(text) for text in document.references()):
            lost.add(document.name or "")
            continue
        try:
            plans.extend(_bases_with_adapters(document, resolver, made))
            plan = _plan_document(document, replace(resolver, documents=made))
        except MergeyardError as error:
            problems.extend(replace(problem, where=document.place(problem.where)) for problem in error.problems)
            lost.add(document.name or "")
            continue
        plan = replace(plan, warnings=_placed(plan.warnings, document))
        if document is not recipe:
            if document.evaluation is not None:
                message = "Only the last document's result is scored; move `evaluation` there."
                problems.append(Problem(code="not_supported", message=message, where=document.place("evaluation")))
            plan, made[str(document.name)] = as_earlier(plan, document, str(document.name))
        plans.append(plan)
    if problems:
        raise MergeyardError.of(problems)
    return _together(plans, named=recipe.earlier)


def plan_again(resolved: Mapping[str, Any], digest: str, resolver: Resolver, *, what: str) -> Plan:
    """The plan of a resolved recipe, made from the files as they are now.

    Raises:
        MergeyardError: `source_changed` unless it is the plan of ``digest``, with which ``what`` was planned.
    """
    plan = make_plan(parse_recipe(resolved), resolver)
    if plan.digest != digest:
        message = (
            f"A source's files, or Mergeyard's version, are not those the {what} was planned with; submit it again."
        )
        raise MergeyardError("source_changed", message)
    return plan


def _bases_with_adapters(document: Recipe, resolver: Resolver, made: dict[str, ModelSource]) -> Iterator[Plan]:
    """What ``X+adapter`` stands for where a full model is wanted: a document of its own, the adapter merged into X.

    ``made`` gains the models, whose problems are those of the place where they are named.
    """
    for where, text in document.bases():
        base, adapter = split_adapter(text)
        if adapter is None or text in made:
            continue
        entry = SourceEntry(adapter=adapter)
        own = Recipe(base_model=base, merge_method="task_arithmetic", models=(entry,), number=document.number)
        try:
            yield from _bases_with_adapters(own, resolver, made)
            known = replace(resolver, documents=made)
            reference = known.canonical(text)
            if (same := next((model for model in made.values() if model.reference == reference), None)) is not None:
                made[text] = same
                continue
            if len(made) >= MAX_MADE:
                raise MergeyardError("recipe_invalid", f"A recipe makes at most {MAX_MADE} models on its way.")
            plan = _plan_document(own, known)
        except MergeyardError as error:
            raise MergeyardError.of([replace(problem, where=where) for problem in error.problems]) from None
        plan = replace(plan, warnings=tuple(replace(item, where=document.place(where)) for item in plan.warnings))
        plan, made[text] = as_earlier(plan, own, reference)
        yield plan


def _together(plans: Sequence[Plan], named: Sequence[Recipe]) -> Plan:
    """The last plan, as that of the whole recipe: it is merged after the others, and its result is the only one."""
    *earlier, last = plans
    names = {document.name for document in named}
    documents = [plan.recipe for plan in earlier if plan.reference in names]
    return replace(
        last,
        recipe={"documents": [*documents, last.recipe]} if documents else last.recipe,
        estimates=replace(
            last.estimates,
            scratch_bytes=sum(plan.estimates.output_bytes for plan in earlier),
            peak_memory_bytes=max(plan.estimates.peak_memory_bytes for plan in plans),
        ),
        warnings=tuple(warning for plan in plans for warning in plan.warnings),
        earlier=tuple(earlier),
    )


def _plan_document(recipe: Recipe, resolver: Resolver) -> Plan:
    """One merge. The places of its problems are those in its document."""
    resolved = resolve(recipe, resolver)
    base, sources = resolved.base, resolved.sources
    problems: list[Problem] = []
    vocabulary = plan_vocabulary(recipe, resolved, resolver)
    stored = lay_out(recipe, resolved)
    slots = grow(stored, resolved) if vocabulary is None else align(stored, vocabulary, resolved)
    tensors = [_tensor(recipe, slot, problems) for slot in slots]
    if recipe.merge_method == "ties":
        problems.extend(_varying_densities(tensors, sources))
    problems.extend(dense_matrices(recipe.merge_method, tensors, sources))
    size = vocabulary_size(stored, slots)
    if recipe.output.kind == "adapter":
        grows = vocabulary is not None or size is not None
        problems.extend(problems_of_adapter(recipe, resolved, tensors, vocabulary_changes=grows))
        if base.reference in {model.reference for model in resolver.documents.values()}:
            message = f"An adapter for {base.reference} could not be loaded: that base goes when the merge is finished."
            problems.append(Problem(code="not_supported", message=message, where="output.kind"))
    if problems:
        raise MergeyardError.of(_first_of_each(problems))
    resolved_recipe = canonical_recipe(recipe, resolved)
    if vocabulary is not None:
        resolved_recipe["tokenizer"] = vocabulary.section
    documents, companions = documents_of(recipe, resolved, vocabulary, size)
    tasks = plan_tasks(recipe, resolver, has_chat_template=has_chat_template(documents, companions, base.reference))
    if tasks:
        resolved_recipe["evaluation"] = section(tasks)
    tokenizers = vocabulary.read if vocabulary else ()
    base_planned = PlannedSource(reference=base.reference, role="base", files=base.files)
    planned = resolved.planned()
    shards = cut_shards(tensors, shard_bytes(recipe.output.max_shard_size))
    adapter = None
    estimates, warnings = estimate(tensors), tuple[Problem, ...]()
    if tasks:
        estimates = replace(estimates, peak_memory_bytes=max(estimates.peak_memory_bytes, scoring_bytes(estimates)))
    if recipe.output.kind == "adapter":
        planned_adapter = adapter_output(recipe, resolved, tensors, estimates)
        adapter, shards = planned_adapter.adapter, (planned_adapter.shard,)
        documents, companions = {CONFIG_NAME: planned_adapter.config}, ()
        estimates, warnings = planned_adapter.estimates, planned_adapter.warnings
        resolved_recipe["output"] = recipe.output.settled(adapter.rank)
    return Plan(
        method=recipe.merge_method,
        recipe=resolved_recipe,
        base=base_planned,
        sources=planned,
        tokenizers=tokenizers,
        shards=shards,
        documents=documents,
        companions=companions,
        metadata={"format": "pt"},
        estimates=estimates,
        warnings=(
            *warnings_of(recipe, tensors, base, [(source.where, source.adapter) for source in sources]),
            *(vocabulary.warnings if vocabulary else differing(resolved)),
            *warnings,
        ),
        digest=plan_digest(
            resolved_recipe,
            [base_planned, *planned, *tokenizers],
            companions,
            documents,
            _made_before(recipe, resolver.documents),
        ),
        adapter=adapter,
        tasks=tasks,
    )


def _made_before(recipe: Recipe, models: Mapping[str, ModelSource]) -> set[str]:
    """The digests of the plans that make what the recipe reads."""
    read = map(models.get, recipe.references())
    return {model.digest for model in read if model is not None and model.digest is not None}


def _placed(warnings: Sequence[Problem], document: Recipe) -> tuple[Problem, ...]:
    return tuple(replace(warning, where=document.place(warning.where)) for warning in warnings)


def _tensor(recipe: Recipe, slot: Slot, problems: list[Problem]) -> TensorPlan:
    spec = METHODS[recipe.merge_method]
    contributions = []
    for source in slot.sources if slot.floating else ():
        if not source.changes and elects_signs(recipe.merge_method, recipe.parameters):
            continue  # takes no part in this tensor (merging-maths)
        own = source_parameters(recipe.merge_method, (*source.levels, *slot.levels), source.position)
        contributions.append(
            Contribution(source=source.source, full=source.full, lora=source.lora, added=source.added, parameters=own)
        )
    touched = any(item.changes for item in contributions)
    parameters = dict(tensor_parameters(recipe.merge_method, slot.levels, slot.position))
    if spec.base == "optional":
        parameters["task_vectors"] = slot.based
    moved = slot.floating and spec.moves_base(parameters, [item.parameters for item in contributions])
    kept = tuple(contributions) if touched or moved else ()
    if slot.where:
        problems.extend(_problems_of(recipe.merge_method, slot, parameters, kept))
    return TensorPlan(
        name=slot.name,
        shape=slot.base.shape,
        dtype=(recipe.file_dtype if slot.floating else None) or slot.dtype or slot.base.dtype,
        base=slot.base,
        contributions=kept,
        parameters=parameters if kept else {},
    )


def _problems_of(
    method: str, slot: Slot, parameters: Mapping[str, Scalar], contributions: Sequence[Contribution]
) -> Iterator[Problem]:
    """What the method's spec does not allow at one tensor."""
    spec = METHODS[method]
    if not spec.least <= len(slot.sources) <= (spec.most or len(slot.sources)):
        message = f"{method} merges {_amount(spec)}; here are {len(slot.sources)}."
        yield Problem(code="recipe_invalid", message=message, where=slot.where)
    for name, parameter in spec.parameters.items():
        if parameter.required and name not in parameters:
            message = f"{method} needs `{name}`, and the recipe gives none for {slot.name}."
            yield Problem(code="parameter_invalid", message=message, where=f"parameters.{name}")
    for item in contributions:
        if wrong := spec.problem_of(item.parameters):
            yield Problem(code="parameter_invalid", message=f"{wrong} (at {slot.name})", where=slot.where)
    flag = spec.divides_by_weights
    if flag and contributions and parameters[flag] and abs(sum(map(_weight, contributions))) < 1e-8:
        advice = f"so they cannot be normalised; set `{flag}: false` or change them."
        message = f"The weights sum to zero at {slot.name}, {advice}"
        yield Problem(code="parameter_invalid", message=message, where=f"parameters.{flag}")


def _weight(contribution: Contribution) -> float:
    return contribution.parameters["weight"]


def _amount(spec: MethodSpec) -> str:
    beside = " beside the base" if spec.base == "required" else ""
    if spec.least == spec.most:
        return f"exactly {spec.least} source{'s' * (spec.least > 1)}{beside}"
    return f"at least {spec.least} source{'s' * (spec.least > 1)}{beside}"


def _varying_densities(tensors: Sequence[TensorPlan], sources: Sequence[ResolvedSource]) -> list[Problem]:
    """A whole-model trim has one threshold for each source, so one density."""
    densities: dict[int, set[float]] = {}
    for tensor in tensors:
        if tensor.parameters.get("trim_scope") == "model":
            for item in tensor.contributions:
                densities.setdefault(item.source, set()).add(item.parameters["density"])
    return [
        Problem(
            code="parameter_invalid",
            message="`trim_scope: model` trims a source over the whole model, so its density cannot vary by tensor.",
            where=f"{sources[index].where}.parameters.density",
        )
        for index, found in densities.items()
        if len(found) > 1
    ]


def _first_of_each(problems: Sequence[Problem]) -> list[Problem]:
    """A problem of a parameter that shows at every tensor is one problem."""
    return list({(problem.code, problem.where): problem for problem in reversed(problems)}.values())[::-1]
