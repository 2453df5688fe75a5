"""PEFT's own way from adapters to a checkpoint: ``… peft_merge ties|ties_svd JOB``, run in PEFT's environment.

``ties`` merges the factors A and B apart and never forms ΔW, which is another and far cheaper thing; ``ties_svd``
merges ΔW and factorises the result by a reduced SVD.
"""

from __future__ import annotations

import sys
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.clock import Clock
from benchmarks.job import Job, read_job


def main() -> None:
    way, job = sys.argv[1], read_job(sys.argv[2])
    clock = Clock()
    merge(way, job)
    clock.report()


def merge(way: str, job: Job) -> None:
    model = AutoModelForCausalLM.from_pretrained(job.base, dtype="auto")
    names = [Path(adapter).name for adapter in job.adapters]
    adapted = PeftModel.from_pretrained(model, job.adapters[0], adapter_name=names[0])
    for name, adapter in zip(names[1:], job.adapters[1:], strict=True):
        adapted.load_adapter(adapter, adapter_name=name)
    further = {"svd_full_matrices": False} if way.endswith("svd") else {}
    adapted.add_weighted_adapter(
        names, [1.0] * len(names), "merged", combination_type=way, density=job.density, **further
    )
    adapted.merge_and_unload(adapter_names=["merged"]).save_pretrained(job.out)


if __name__ == "__main__":
    main()
