"""The machinery of the benchmarks on tiny cases: rounds, resuming, limits and rendering. No test looks at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from app.artifacts.manifest import MANIFEST_NAME
from benchmarks import ceilings, kernels, merge_in_memory, own, profile, spans, speed, synthetic
from benchmarks.cases import Case, Model
from benchmarks.job import Job
from benchmarks.participants import PARTICIPANTS
from benchmarks.peers import article, peft_merge
from benchmarks.report import growth_tables, targets_table, write_report
from benchmarks.runs import Run, Runs
from benchmarks.targets import MAIN
from benchmarks.watch import Watched, watch
from tests import tiny
from tests.engine.merges import merge, plan_of, tensors_of
from worker.engine import digests
from worker.engine.digests import DigestCache
from worker.engine.kernels import load

SOURCES = [{"adapter": f"models:{name}"} for name in tiny.ADAPTERS]
OWN = ("cp", "products", "ours")


def write_tiny(folder: Path) -> None:
    tiny.write_llama(folder)


@pytest.fixture(scope="module")
def case() -> Case:
    model = Model("tiny", "tiny", write_tiny)
    return Case(name=MAIN, title="tiny", model=model, adapters=2, finetunes=1, participants=OWN)


@pytest.fixture(scope="module")
def made(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a benchmark of two rounds."""
    folder = tmp_path_factory.mktemp("benchmark")
    case.prepare(folder)
    runs = Runs(folder / "runs.jsonl")
    for number in (1, 2):
        speed.make_round([case], number, runs, folder, folder / "environments")
    return folder


def watched(**changes: object) -> Watched:
    done = Watched(outcome="done", seconds=1.0, processor=1.0, whole=2.0, rss=10**9, private=10**9, disk=0)
    return replace(done, **changes)  # type: ignore[arg-type]


def run(participant: str, number: int = 1, case: str = MAIN, **changes: object) -> Run:
    return Run(
        case=case,
        participant=participant,
        round=number,
        began="2026-01-01T00:00:00+00:00",
        load=0.0,
        commit="abc",
        watched=watched(**changes),
        temporary=0,
    )


def test_every_round_runs_every_participant_once_one_after_the_other(made: Path) -> None:
    runs = Runs(made / "runs.jsonl").all()
    assert [(run.round, run.participant) for run in runs] == [(number, name) for number in (1, 2) for name in OWN]
    assert {run.watched.outcome for run in runs} == {"done"}
    assert all(run.watched.rss >= run.watched.private > 0 for run in runs if run.participant != "cp")
    assert not (made / "run").exists()


def test_a_benchmark_that_was_stopped_goes_on_where_it_was(
    made: Path, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (made / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs.jsonl").write_text("".join(lines[:-2]) + lines[-2][:40])  # one cut short, one missing
    again = []
    monkeypatch.setattr(
        speed, "make_run", lambda case, participant, number, *_, **__: again.append(participant.name) or run("cp")
    )
    speed.make_round([case], 2, Runs(tmp_path / "runs.jsonl"), tmp_path, tmp_path)
    assert again == list(OWN[-2:])


def test_runs_that_are_forgotten_are_due_again(made: Path, tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text((made / "runs.jsonl").read_text())
    Runs(tmp_path / "runs.jsonl").forget(["ours"])
    kept = Runs(tmp_path / "runs.jsonl")
    assert not kept.of(MAIN, "ours")
    assert len(kept.of(MAIN, "cp")) == 2


def test_the_results_hold_the_table_the_plot_and_what_must_be_reached(made: Path, case: Case, tmp_path: Path) -> None:
    runs = Runs(made / "runs.jsonl")
    text = write_report(runs, [case], folder=made, cores=2, into=tmp_path)
    assert (tmp_path / "RESULTS.md").read_text() == text
    assert (tmp_path / "speed.svg").read_text().lstrip().startswith("<?xml")
    assert "| **Mergeyard** |" in text
    assert "No GPU was at hand" in text
    first = (tmp_path / "speed.svg").read_bytes()
    write_report(runs, [case], folder=made, cores=2, into=tmp_path)
    assert (tmp_path / "speed.svg").read_bytes() == first


def test_a_figure_is_reached_missed_or_open(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs.jsonl")
    for name, seconds in {"cp": 1.0, "products": 3.0, "products-reused": 2.0, "ours": 5.0}.items():
        runs.add(run(name, seconds=seconds))
    runs.add(run("mergekit", outcome="over time", seconds=600.0))  # 120 times ours at least
    runs.add(run("peft-ties", outcome="failed", seconds=100.0))
    fresh, reused, mergekit, peft, private = targets_table(runs, []).splitlines()[2:7]
    assert fresh.endswith("| ≤ 2.00 | 1.25 | reached | – |")
    assert reused.endswith("| ≤ 2.00 | 1.67 | reached | – |")
    assert mergekit.endswith("| ≥ 60 | over 120 | reached | – |")
    assert peft.endswith("| ≥ 3.00 | – | open | – |")
    assert private.endswith("| ≤ 700 MB | 1000 MB | **not reached** | – |")


def test_a_merge_with_known_digests_is_a_remark_and_what_is_missed_leads_to_the_profile(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs.jsonl")
    for name, seconds in {"cp": 1.0, "products": 1.0, "ours": 5.0, "ours-known": 3.0}.items():
        runs.add(run(name, seconds=seconds))
    missed = "**not reached**: [what bounds it](PROFILE.md)"
    assert targets_table(runs, []).splitlines()[2].endswith(f"| ≤ 2.00 | 2.50 | {missed} | 1.50 |")


def test_times_of_a_busy_machine_are_not_judged_and_said_to_flatter_us(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs.jsonl")
    for name in ("cp", "products", "ours"):
        runs.add(run(name, whole=1.0, others=0.01 * (os.cpu_count() or 1)))
    text = write_report(runs, [], folder=tmp_path, cores=2, into=None)
    assert "| ≤ 2.00 | 0.50 | reached | – |" in text
    assert "flatters us" not in text
    runs.add(run("ours", 2, whole=1.0, others=0.9 * (os.cpu_count() or 1)))
    text = write_report(runs, [], folder=tmp_path, cores=2, into=None)
    assert "| ≤ 2.00 | 0.50 | not judged | – |" in text
    assert "| ≤ 700 MB | 1000 MB | **not reached** | – |" in text  # memory is what it is
    assert "flatters us" in text


def test_processor_time_that_others_take_meanwhile_is_seen(tmp_path: Path) -> None:
    spin = "import time; end = time.process_time() + {}\nwhile time.process_time() < end: pass"
    other = subprocess.Popen([sys.executable, "-c", spin.format(60)])
    try:
        found = watch([sys.executable, "-c", spin.format(0.5)], folder=tmp_path, run=tmp_path, cap=60)
    finally:
        other.kill()
        other.wait()
    assert 0.4 < found.processor < 2.0
    assert found.others > 0.1


def test_a_stopped_peer_that_ran_too_short_to_tell_leaves_its_figure_open(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs.jsonl")
    runs.add(run("ours", seconds=20.0))
    runs.add(run("mergekit", outcome="over time", seconds=600.0))
    assert targets_table(runs, []).splitlines()[4].endswith("| ≥ 60 | over 30 | open | – |")


def test_a_peer_runs_in_every_round_twice_when_long_and_once_when_stopped() -> None:
    def rounds(made: Run, participant: str) -> int:
        kept: list[Run] = []
        for number in range(1, 6):
            if speed.is_due(kept, PARTICIPANTS[participant], number):
                kept.append(replace(made, round=number))
        return len(kept)

    assert rounds(run("peft-ties", whole=59.0), "peft-ties") == 5
    assert rounds(run("mergekit", whole=61.0), "mergekit") == 2
    assert rounds(run("article", outcome="over memory"), "article") == 1
    assert rounds(run("ours", whole=61.0), "ours") == 5


@pytest.mark.timeout(60)  # what is not stopped would hold the pipes open for ten minutes
def test_a_run_over_its_time_is_stopped_with_all_its_processes(tmp_path: Path) -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    found = watch([sys.executable, "-c", script], folder=tmp_path, run=tmp_path, cap=1.0)
    assert found.outcome == "over time"


def test_memory_and_disk_are_those_of_the_whole_tree(tmp_path: Path) -> None:
    inner = "import pathlib, time; pathlib.Path('file').write_bytes(bytes(30_000_000)); held = b'1' * 200_000_000"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', \"{inner}; time.sleep(1)\"])"
    found = watch([sys.executable, "-c", script], folder=tmp_path, run=tmp_path, cap=60.0)
    assert found.outcome == "done"
    assert 200e6 < found.private < 400e6
    assert found.disk >= 30e6


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    found = watch([sys.executable, "-c", "raise SystemExit('no such adapter')"], folder=tmp_path, run=tmp_path, cap=60)
    assert (found.outcome, found.said.strip()) == ("failed", "no such adapter")


def test_what_ours_writes_unhashed_has_the_bytes_of_what_it_hashes(made: Path, case: Case, tmp_path: Path) -> None:
    folders = {}
    for name, way in {"hashed": own.merge, "unhashed": own.merge_unhashed}.items():
        (tmp_path / name).mkdir()
        job = case.job(made, tmp_path / name)
        way(job)
        folders[name] = {path.name: path.read_bytes() for path in Path(job.out).iterdir()}
        assert MANIFEST_NAME in folders[name]
        del folders[name][MANIFEST_NAME]  # it holds the digests, and the recipe's paths
    assert folders["hashed"] == folders["unhashed"]


def test_a_merge_whose_digests_are_known_hashes_no_source(
    made: Path, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, cache = case.job(made, tmp_path), DigestCache(tmp_path / "digests")
    own.hash_sources(own.planned(job), cache)

    def refuse(*_: object) -> None:
        raise AssertionError("a source is hashed again")

    monkeypatch.setattr(digests, "hash_file", refuse)
    own.merge(job, cache)
    assert (Path(job.out) / MANIFEST_NAME).exists()


def test_time_and_memory_are_told_for_each_further_adapter(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs.jsonl")
    model = Model("tiny", "tiny", write_tiny)
    cases = [
        Case(name=f"tiny-{count}", title="", model=model, adapters=count, participants=("ours",))
        for count in (16, 1, 4)
    ]
    for count, processor, private in ((1, 1.0, 300_000_000), (4, 1.6, 303_000_000), (16, 3.4, 339_000_000)):
        runs.add(run("ours", case=f"tiny-{count}", processor=processor, private=private))
    rows = growth_tables(runs, cases).splitlines()[-3:]
    assert rows[0].endswith("| 300 MB | – | – |")
    assert rows[1].endswith("| 303 MB | 0.200 s | 1.0 MB |")
    assert rows[2].endswith("| 339 MB | 0.150 s | 3.0 MB |")


@pytest.mark.timeout(120)
def test_the_profile_tells_each_kind_of_work_and_the_bound(
    made: Path, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"FILE_BYTES": 1 << 22, "COPIED": 1 << 12, "MATRIX": 64}.items():
        monkeypatch.setattr(ceilings, name, value)
    found = profile.profile_of(case, made)
    counted = {kind["kind"] for kind in found.merged["kinds"]}
    assert counted >= {spans.PLANNING, spans.READING, spans.MERGING, spans.HASHING_SOURCES, spans.HASHING_RESULT}
    assert sum(kind["processor"] for kind in found.merged["kinds"]) <= found.processor
    assert {"main", "block"} <= set(found.by_role()), "others may live between two samples here"
    text = profile.document([(case, found)], ceilings.measure(made), cores=2)
    assert f"Wall {found.wall:.2f} s" in text
    assert "Bound: max(" in text
    assert not (made / "profile").exists()


def test_what_wraps_the_engine_counts_nested_work_once() -> None:
    counted = spans.Spans()
    counted.call("outer", None, lambda: counted.call("inner", lambda: (7, 0), lambda: sum(range(300_000))))
    outer, inner = counted.kinds["main", "outer"], counted.kinds["main", "inner"]
    assert inner.amount == 7
    assert inner.processor > outer.processor


def test_an_adapter_and_a_finetune_change_the_model_they_were_made_for(made: Path) -> None:
    base = load_file(made / "tiny" / "base" / "model.safetensors")
    tuned = load_file(made / "tiny" / "finetune-1" / "model.safetensors")
    assert tuned.keys() == base.keys()
    matrices = [name for name, values in base.items() if values.ndim == 2]  # at the norms' 1, bfloat16 loses it
    assert all(tuned[name].dtype == base[name].dtype and not tuned[name].equal(base[name]) for name in matrices)
    adapter = load_file(made / "tiny" / "adapter-1" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 7 * 2  # A and B of seven modules in two layers
    other = load_file(made / "tiny" / "adapter-2" / "adapter_model.safetensors")
    assert not any(values.equal(other[name]) for name, values in adapter.items())


def test_a_source_that_was_cut_short_is_made_again(tmp_path: Path) -> None:
    for _ in range(2):
        synthetic.write_case(tmp_path, write_tiny, adapters=1, finetunes=0)
        written = (tmp_path / "adapter-1" / "adapter_model.safetensors").read_bytes()
        (tmp_path / "adapter-1" / "adapter_config.json").unlink()
        (tmp_path / "adapter-1" / "adapter_model.safetensors").write_bytes(b"")
    assert len(written) > 0
    assert not (tmp_path / ".draft").exists()


def test_a_peer_without_an_environment_is_named_before_anything_runs(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        speed.require_environments([replace(case, participants=("cp", "article"))], tmp_path)
    assert f"benchmarks/peers/environment.sh peft {tmp_path / 'peft'}" in capsys.readouterr().err


def test_the_articles_script_gives_the_numbers_of_our_dialect_of_its_name(tmp_path: Path) -> None:
    job = tiny_job(tmp_path)
    with torch.no_grad():
        article.merge(job)
    plan = plan_of(tmp_path, tiny.recipe(parameters={"dialect": "article", "density": job.density}, models=SOURCES))
    merge(plan, tmp_path / "ours")
    theirs, ours = tensors_of(Path(job.out)), tensors_of(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    differing = sum(int((theirs[name] - ours[name]).abs().gt(1e-6).sum()) for name in ours)
    changed = sum(int(values.ne(load_base(job)[name]).sum()) for name, values in ours.items())
    assert differing < 0.01 * changed  # its δ is rounded twice, so a threshold may fall to a neighbour


@pytest.mark.parametrize("way", ["ties", "ties_svd"])
def test_peft_merges_the_adapters_into_a_checkpoint_of_the_bases_tensors(way: str, tmp_path: Path) -> None:
    job = tiny_job(tmp_path)
    peft_merge.merge(way, job)
    merged, base = tensors_of(Path(job.out)), load_base(job)
    assert merged.keys() == base.keys()
    changed = {name.split(".")[-2] for name in base if not merged[name].equal(base[name])}
    assert changed == set(synthetic.TARGETS)


def tiny_job(folder: Path) -> Job:
    """Two adapters of a tiny model in float32."""
    base = tiny.write_llama(folder / tiny.BASE, dtype=torch.float32)
    adapters = [tiny.write_lora(base, folder / name, seed=seed) for seed, name in enumerate(tiny.ADAPTERS)]
    return Job(
        base=str(base),
        adapters=tuple(map(str, adapters)),
        finetunes=(),
        density=0.5,
        recipe="",
        out=str(folder / "out"),
        scratch="",
    )


def load_base(job: Job) -> dict[str, torch.Tensor]:
    return tensors_of(Path(job.base))


@pytest.mark.timeout(60)
def test_every_kernel_meets_its_roofline_on_every_operand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.BANDWIDTH_VALUES, "cpu", 1 << 16)
    monkeypatch.setitem(kernels.MATRIX, "cpu", 64)
    found = kernels.asdict(kernels.measure("cpu", [1, 2], values=1 << 15, block=1 << 13))
    assert len(found["rows"]) == 8 * 3 * 2
    shown = kernels.markdown(json.loads(json.dumps(found)))
    assert shown.count("\n| merge |") == 6


def test_the_kernels_benchmark_needs_no_package_that_a_bare_gpu_machine_lacks() -> None:
    script = "import sys, benchmarks.kernels; print(*{name.split('.')[0] for name in sys.modules})"
    found = subprocess.run([sys.executable, "-c", script], cwd=speed.ROOT, capture_output=True, text=True, check=True)
    lacking = {"matplotlib", "peft", "psutil", "pydantic", "safetensors", "sqlalchemy", "transformers"}
    assert not lacking & set(found.stdout.split())


def test_the_gpus_merge_over_8_billion_parameters_keeps_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_in_memory, "MODULES_8B", ((256, 128), (64, 256)))
    monkeypatch.setattr(merge_in_memory, "_bracket", lambda *_: (0, 0x7F80_0000))
    delta = kernels.Product(torch.randn(256, 4), torch.randn(4, 128), 1.0)
    base, result = torch.zeros(256 * 128), torch.empty(256 * 128)
    merge_in_memory.ties(load("cpu"), base, [delta], result, torch.empty(1, 256 * 128, dtype=torch.int32))
    assert int((result != 0).sum()) == int(merge_in_memory.DENSITY * 256 * 128)
