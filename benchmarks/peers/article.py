"""The article's script, in our own writing from its description, names put right: ``… article JOB``.

Each adapter is merged into a fresh copy of the base; what that changes in every parameter is trimmed, tensor by tensor,
to the ``density`` share of largest magnitude; all task vectors are held in float32 side by side, kept where all N are
non-zero and of one sign, averaged over N, and added to the base. Run in PEFT's environment.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.clock import Clock
from benchmarks.job import Job, read_job

TaskVector = Mapping[str, torch.Tensor]


def main() -> None:
    job = read_job(sys.argv[1])
    clock = Clock()
    with torch.no_grad():
        merge(job)
    clock.report()


def merge(job: Job) -> None:
    base = load(job)
    vectors = [trimmed_task_vector(base, job, adapter) for adapter in job.adapters]
    for name, parameter in base.named_parameters():
        parameter.add_(elect_and_merge([vector[name] for vector in vectors]).to(parameter.dtype))
    base.save_pretrained(job.out)


def load(job: Job) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(job.base, dtype="auto")


def trimmed_task_vector(base: PreTrainedModel, job: Job, adapter: str) -> TaskVector:
    """Fine-tuned minus base, of every parameter."""
    tuned = PeftModel.from_pretrained(load(job), adapter).merge_and_unload()
    own = dict(tuned.named_parameters())
    return {
        name: trim(own[name].float() - parameter.float(), job.density) for name, parameter in base.named_parameters()
    }


def trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    """All but the int(density · n) largest magnitudes set to zero."""
    k = int(density * delta.numel())
    if k == 0:
        return torch.zeros_like(delta)
    threshold = torch.topk(delta.abs().flatten(), k).values[-1]
    return torch.where(delta.abs() >= threshold, delta, 0.0)


def elect_and_merge(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean where all are non-zero and agree in sign, else 0."""
    stacked = torch.stack(list(deltas))
    signs = stacked.sign()
    unanimous = (signs == signs[0]).all(dim=0) & (signs[0] != 0)
    return stacked.mean(dim=0) * unanimous


if __name__ == "__main__":
    main()
