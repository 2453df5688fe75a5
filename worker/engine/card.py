"""The model card, ``README.md`` of a checkpoint: what was merged and how, without a time or a place in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from app.artifacts.manifest import EarlierRecord, SourceRecord, TensorStatistics
from app.planning.plan import AdapterPlan, Plan
from app.tasks.task import TaskScore

CARD_NAME = "README.md"


def model_card(
    plan: Plan,
    sources: Sequence[SourceRecord],
    earlier: Sequence[EarlierRecord],
    statistics: Mapping[str, TensorStatistics],
    scores: Sequence[TaskScore] = (),
) -> str:
    """Markdown with YAML front matter. The same plan, sources and scores give the same text, to the byte.

    ``sources``: the base first, then the recipe's sources in order; ``earlier`` are the documents before the last.
    """
    made = {document.name for document in earlier}
    of_all = [record for document in (*(item.sources for item in earlier), sources) for record in document]
    bases = [document[0].reference for document in (*(item.sources for item in earlier), sources)]
    front = {
        "base_model": list(dict.fromkeys(name for name in bases if name not in made)),
        "library_name": "transformers" if plan.adapter is None else "peft",
        "tags": ["mergeyard", "merge"],
    }
    parts = [
        f"---\n{_yaml(front)}---\n",
        "# A merged model\n" if plan.adapter is None else "# A merged adapter\n",
        f"Made by [Mergeyard](mergeyard.json) with the method `{plan.method}`. Fingerprint: `{plan.digest}`.\n",
        "## Recipe\n",
        f"```yaml\n{_yaml(plan.recipe)}```\n",
        _scores(scores),
        "## Sources\n",
        _sources_table(list({(record.reference, record.role): record for record in of_all}.values())),
        "## What the merge did\n",
        _summary(statistics),
        "" if plan.adapter is None else _retained(plan.adapter, statistics),
        _statistics_table(plan, statistics),
    ]
    return "\n".join(part for part in parts if part)


def _scores(scores: Sequence[TaskScore]) -> str:
    if not scores:
        return ""
    rows = [
        (item.name, item.metric, f"{item.score:.4f}", f"{item.standard_error:.4f}", str(item.examples))
        for item in scores
    ]
    return "## Scores\n\n" + _table(("task", "metric", "score", "standard error", "examples"), rows)


def _sources_table(sources: Sequence[SourceRecord]) -> str:
    rows = [
        (record.role, record.reference, name, f"`{digest}`")
        for record in sources
        for name, digest in record.files.items()
    ]
    return _table(("role", "reference", "file", "sha256"), rows)


def _summary(statistics: Mapping[str, TensorStatistics]) -> str:
    if not statistics:
        return "No tensor was changed.\n"
    parameters = sum(entry.parameters for entry in statistics.values())
    norm = math.sqrt(sum(entry.merged_norm**2 for entry in statistics.values()))
    return (
        f"{len(statistics)} tensors with {parameters} parameters were merged. {_conflict(statistics)}"
        f"The result differs from the base by {norm:.4g} (Euclidean norm).\n"
    )


def _retained(adapter: AdapterPlan, statistics: Mapping[str, TensorStatistics]) -> str:
    squares = [(entry.retained_energy or 0.0, entry.merged_norm**2) for entry in statistics.values()]
    total = sum(square for _, square in squares)
    share = sum(energy * square for energy, square in squares) / total if total else 1.0
    least, name = min((entry.retained_energy or 0.0, name) for name, entry in statistics.items())
    return (
        f"At rank {adapter.rank} the adapter holds {share:.2%} of that change's energy (its squared norm), and of each "
        f"tensor's at least {least:.2%} ({name}); mergeyard.json has the shares of all.\n"
    )


def _conflict(statistics: Mapping[str, TensorStatistics]) -> str:
    compared = [
        (entry.sign_conflict, entry.parameters) for entry in statistics.values() if entry.sign_conflict is not None
    ]
    if not compared:
        return ""
    conflict = sum(share * size for share, size in compared) / max(1, sum(size for _, size in compared))
    return (
        f"After the trim, the sources disagreed in sign on {conflict:.1%} of the parameters that any of them changed "
        "(mean over tensors, by size). "
    )


def _statistics_table(plan: Plan, statistics: Mapping[str, TensorStatistics]) -> str:
    rows = []
    for index, source in enumerate(plan.sources):
        touched = [(entry, entry.sources.index(index)) for entry in statistics.values() if index in entry.sources]
        if not touched:
            continue
        values = sum(entry.parameters for entry, _ in touched)
        trimmed = sum(entry.trimmed[place] * entry.parameters for entry, place in touched) / max(values, 1)
        norm = math.sqrt(sum(entry.source_norms[place] ** 2 for entry, place in touched))
        rows.append((source.reference, str(len(touched)), f"{trimmed:.1%}", f"{norm:.4g}"))
    return _table(("source", "tensors", "trimmed", "norm of its task vector"), rows) if rows else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _yaml(value: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True, width=100))
