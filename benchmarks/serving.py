"""One merged model against adapters that are switched: ``python -m benchmarks.serving [--write]``.

The article's second table, measured. Requests of two skills (SQL and JSON, the demo's tasks) come in random order to

- ``base``: the base model, which can do neither; what serving costs without any skill
- ``merged``: the demo's recipe (TIES of both adapters), an ordinary checkpoint
- ``own model each``: each adapter merged into a checkpoint of its own, both in memory
- ``switching``: PEFT, both adapters loaded, ``set_adapter`` for each request; a batch is split by adapter
- ``mixed batch``: PEFT's ``generate(adapter_names=[…])``, one batch for both
- ``from disk``: PEFT, the adapter loaded for each request and deleted after it, as where there are too many to keep

each in a process of its own; they take turns, so that what slows the machine slows all alike. Answers are greedy.
``latency``: single requests. ``throughput``: batches of BATCH in the order of their arrival, and how many of their
answers are right. Memory is the peak of the process. On a GPU with ``--device cuda``. ``--write`` makes
benchmarks/SERVING.md of this run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from benchmarks.scale import _machine
from benchmarks.speed import _commit
from benchmarks.turns import ROOT, Turn, asked, own_seconds, peak_memory, tell
from benchmarks.watch import machine_seconds

PARTICIPANTS = ("base", "merged", "own model each", "switching", "mixed batch", "from disk")
SINGLE = 40  # requests one by one
BATCH, BATCHES = 8, 25
LONGEST = 96  # tokens of an answer
SEED = 7
BUSY = 0.1  # of all cores, taken by others


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in PARTICIPANTS:
        serve(sys.argv[1], json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--write", type=Path, nargs="?", const=ROOT / "benchmarks", metavar="FOLDER")
    options = parser.parse_args()
    text = report(measure(options.device))
    if options.write:
        (options.write / "SERVING.md").write_text(text)
    print(text)


def measure(device: str) -> dict[str, Any]:
    """Every participant on the same requests."""
    from examples.base_model import base_model  # noqa: PLC0415 (transformers, which the processes import themselves)

    began, load = time.monotonic(), os.getloadavg()[0]
    machine, own = machine_seconds(), own_seconds()
    base = base_model(Console(stderr=True))
    asked_for = _requests()
    with tempfile.TemporaryDirectory(prefix="mergeyard-serving-") as scratch:
        given = {"device": device, "requests": asked_for, **_models(base, Path(scratch))}
        turns = {name: Turn("benchmarks.serving", name, given) for name in PARTICIPANTS}
        for turn in turns.values():
            turn.take(requests=[0, 1])  # warm
        singles: dict[str, list[float]] = {name: [] for name in turns}
        batches: dict[str, list[float]] = {name: [] for name in turns}
        right: dict[str, list[bool]] = {name: [] for name in turns}
        for number in range(SINGLE):
            for name, turn in _in_turn(turns, number):
                singles[name].append(turn.take(requests=[number])["seconds"])
        for number in range(BATCHES):
            chosen = list(range(SINGLE + BATCH * number, SINGLE + BATCH * (number + 1)))
            for name, turn in _in_turn(turns, number):
                told = turn.take(requests=chosen)
                batches[name].append(told["seconds"])
                right[name] += told["right"]
        peaks = {name: turn.take(requests=[])["peak"] for name, turn in turns.items()}
        for turn in turns.values():
            turn.end()
    whole = (time.monotonic() - began) * (os.cpu_count() or 1)
    return {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": _machine(),
        "device": device,
        "load": load,
        "others": max(0.0, machine_seconds() - machine - (own_seconds() - own)) / whole,
        "singles": singles,
        "batches": batches,
        "right": right,
        "tasks": [request["task"] for request in asked_for[SINGLE:]],
        "peaks": peaks,
    }


def report(found: Mapping[str, Any]) -> str:
    busy = "" if found["others"] <= BUSY else " **The machine was busy: the ratios are not to be relied on.**"
    lines = [
        "# Measured: one merged model against adapters that are switched",
        "",
        "Made by `python -m benchmarks.serving --write`; do not edit.",
        "",
        f"{found['began'][:10]} at {found['commit']} on {found['machine']}, {found['device']}; load average at start "
        f"{found['load']:.1f}; others took {found['others']:.0%} of all cores meanwhile.{busy} SmolLM2-135M, float32; "
        f"requests of two skills in random order, {SINGLE} one by one, then {BATCHES} batches of {BATCH}; greedy "
        f"answers of at most {LONGEST} tokens. Every participant in a process of its own, taking turns.",
        "",
        "| | latency, median | p99 | ÷ merged | requests a second in batches | ÷ merged "
        "| SQL right | JSON right | peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    reference = statistics.median(found["singles"]["merged"])
    throughput = {name: BATCH / statistics.median(found["batches"][name]) for name in PARTICIPANTS}
    for name in PARTICIPANTS:
        single = sorted(found["singles"][name])
        median = statistics.median(single)
        rights = {
            task: [right for right, of in zip(found["right"][name], found["tasks"], strict=True) if of == task]
            for task in ("sql", "json")
        }
        shares = {task: f"{sum(values)} of {len(values)}" for task, values in rights.items()}
        lines.append(
            f"| {name} | {1000 * median:.0f} ms | {1000 * single[int(0.99 * (len(single) - 1))]:.0f} ms "
            f"| {median / reference:.2f} | {throughput[name]:.2f} | {throughput[name] / throughput['merged']:.2f} "
            f"| {shares['sql']} | {shares['json']} | {found['peaks'][name] / 1e9:.2f} GB |"
        )
    return "\n".join([*lines, ""])


# ── the processes ───────────────────────────────────────────────────────────────────────────────


class Participant(Protocol):
    """Answers requests: ``tasks`` says of each row which skill it wants."""

    def generate(self, rows: Mapping[str, Any], tasks: Sequence[str]) -> Any: ...


def serve(name: str, given: Mapping[str, Any]) -> None:
    """Answer what is asked for, line by line."""
    import torch  # noqa: PLC0415
    from transformers import AutoTokenizer  # noqa: PLC0415

    from app.tasks.judging import is_right  # noqa: PLC0415
    from app.tasks.task import Example  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(given["base"], local_files_only=True, padding_side="left")
    participant = _participant(name, given)
    for line in asked():
        chosen = [given["requests"][number] for number in line["requests"]]
        if not chosen:
            tell(peak=peak_memory())
            continue
        chats = [[{"role": "user", "content": request["prompt"]}] for request in chosen]
        rows = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        ).to(given["device"])
        began = time.monotonic()
        with torch.inference_mode():
            written = participant.generate(rows, [request["task"] for request in chosen])
        seconds = time.monotonic() - began
        right = []
        for request, text in zip(chosen, written, strict=True):
            answer = tokenizer.decode(text, skip_special_tokens=True)
            example = Example(line=1, prompt="", messages=(), answer=request["answer"])
            right.append(is_right(answer, example, request["task"]))
        tell(seconds=seconds, right=right)


def _participant(name: str, given: Mapping[str, Any]) -> Participant:
    if name in ("base", "merged"):
        return _One(given[name], given["device"])
    if name == "own model each":
        return _OwnEach(given["own"], given["device"])
    return _Adapters(name, given)


def _loaded(folder: str, device: str) -> Any:
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval().to(device)


def _written(model: Any, rows: Mapping[str, Any], **options: Any) -> list[Any]:
    """The new tokens of every row."""
    width = rows["input_ids"].shape[1]
    found = model.generate(
        **rows,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=LONGEST,
        pad_token_id=model.config.eos_token_id,
        **options,
    )
    return list(found[:, width:].tolist())


class _One:
    """One model for every skill."""

    def __init__(self, folder: str, device: str) -> None:
        self._model = _loaded(folder, device)

    def generate(self, rows: Mapping[str, Any], tasks: Sequence[str]) -> Any:  # noqa: ARG002
        return _written(self._model, rows)


def _by_task(rows: Mapping[str, Any], tasks: Sequence[str], write: Any) -> list[Any]:
    """A batch in parts, one for each skill in it; the answers in the order of the rows."""
    answers: list[Any] = [None] * len(tasks)
    for task in dict.fromkeys(tasks):
        places = [place for place, of in enumerate(tasks) if of == task]
        part = {key: value[places] for key, value in rows.items()}
        for place, answer in zip(places, write(task, part), strict=True):
            answers[place] = answer
    return answers


class _OwnEach:
    """A model for each skill."""

    def __init__(self, folders: Mapping[str, str], device: str) -> None:
        self._models = {task: _loaded(folder, device) for task, folder in folders.items()}

    def generate(self, rows: Mapping[str, Any], tasks: Sequence[str]) -> Any:
        return _by_task(rows, tasks, lambda task, part: _written(self._models[task], part))


class _Adapters:
    """The base with adapters on it, by PEFT."""

    def __init__(self, name: str, given: Mapping[str, Any]) -> None:
        from peft import PeftModel  # noqa: PLC0415

        self._name, self._adapters = name, given["adapters"]
        (first, folder), *others = self._adapters.items()
        self._model: Any = PeftModel.from_pretrained(
            _loaded(given["base"], given["device"]), folder, adapter_name=first
        ).eval()
        if name == "from disk":
            self._loaded = first
            return
        for other, place in others:
            self._model.load_adapter(place, adapter_name=other)

    def generate(self, rows: Mapping[str, Any], tasks: Sequence[str]) -> Any:
        if self._name == "mixed batch":
            return _written(self._model, rows, adapter_names=list(tasks))
        return _by_task(rows, tasks, self._switched)

    def _switched(self, task: str, part: Mapping[str, Any]) -> list[Any]:
        if self._name == "from disk":
            # The name is one that is not taken: the one before goes once this one is there.
            name = f"{task}-again" if self._loaded == task else task
            self._model.load_adapter(self._adapters[task], adapter_name=name)
            self._model.set_adapter(name)
            self._model.delete_adapter(self._loaded)
            self._loaded = name
        else:
            self._model.set_adapter(task)
        return _written(self._model, part)


# ── what they are given ─────────────────────────────────────────────────────────────────────────


def _requests() -> list[dict[str, Any]]:
    """Both skills in random order, the same in every run; none twice."""
    from examples.tasks import TASKS, examples  # noqa: PLC0415

    count = SINGLE + BATCH * BATCHES
    found = [
        {
            "task": task,
            "prompt": example.prompt,
            "answer": json.loads(example.answer) if task == "json" else example.answer,
        }
        for task in TASKS
        for example in examples(task, "test", count // 2)
    ]
    random.Random(SEED).shuffle(found)
    return found


def _models(base: Path, scratch: Path) -> dict[str, Any]:
    """Where everything lies; what is merged is merged here."""
    import yaml  # noqa: PLC0415

    from app.planning.planner import make_plan  # noqa: PLC0415
    from app.recipe import parse_recipe  # noqa: PLC0415
    from app.sources.resolver import Resolver  # noqa: PLC0415
    from worker.engine.run import merge_to_folder  # noqa: PLC0415

    adapters = {task: str(ROOT / "examples" / "adapters" / task) for task in ("sql", "json")}
    recipe = yaml.safe_load((ROOT / "examples" / "recipes" / "ties.yaml").read_text())
    del recipe["evaluation"]
    recipe["base_model"] = str(base)
    for entry, adapter in zip(recipe["models"], adapters.values(), strict=True):
        entry["adapter"] = adapter
    alone = {
        task: {
            "base_model": str(base),
            "merge_method": "task_arithmetic",
            "models": [{"adapter": adapter}],
            "out_dtype": "bfloat16",
        }
        for task, adapter in adapters.items()
    }
    resolver = Resolver(local=Path("/"))
    for name, one in (("merged", recipe), *alone.items()):
        merge_to_folder(make_plan(parse_recipe(one), resolver), scratch / name, device="cpu")
    return {
        "base": str(base),
        "merged": str(scratch / "merged"),
        "own": {task: str(scratch / task) for task in adapters},
        "adapters": adapters,
    }


def _in_turn(turns: Mapping[str, Turn], number: int) -> list[tuple[str, Turn]]:
    """Each round begins with another."""
    every = list(turns.items())
    start = number % len(every)
    return every[start:] + every[:start]


if __name__ == "__main__":
    main()
