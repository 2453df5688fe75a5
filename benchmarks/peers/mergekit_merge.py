"""What ``mergekit-yaml`` does with the recipe of a job: run in mergekit's environment. ``… mergekit_merge JOB``."""

from __future__ import annotations

import sys

from mergekit.scripts.run_yaml import main as mergekit_yaml

from benchmarks.clock import Clock
from benchmarks.job import read_job

# as mergekit writes its tensors, copies are needed where two of them share memory (tied weights)
FLAGS = ("--no-copy-tokenizer", "--clone-tensors", "--quiet")


def main() -> None:
    job = read_job(sys.argv[1])
    clock = Clock()
    mergekit_yaml([job.recipe, job.out, *FLAGS, "--lora-merge-cache", job.scratch], standalone_mode=False)
    clock.report()


if __name__ == "__main__":
    main()
