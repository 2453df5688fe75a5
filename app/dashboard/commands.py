"""The lines that a person copies to take a merge away: curl, hub clients, vLLM. docs/serving.md explains them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from app.api.schemas import merge_url
from app.records.job import Job

KEY = "$MERGEYARD_API_KEY"


@dataclass(frozen=True, slots=True)
class Command:
    """What it is for, and the lines. ``language``: sh or python."""

    title: str
    text: str
    language: str = "sh"


def commands(job: Job, *, service: str, keys: bool) -> tuple[Command, ...]:
    """Of a succeeded merge. ``service``: its URL; ``keys``: whether it asks for one."""
    repository = f"merges/{job.id}"
    adapter = dict(job.resolved.get("output") or {}).get("kind") == "adapter"
    return (
        Command("Serve it with vLLM", _hub(service, keys) + _vllm(repository, adapter=adapter)),
        Command("Load it with transformers", _python(service, keys, repository, adapter=adapter), "python"),
        Command("Download it with the hub's client", _hub(service, keys) + f"hf download {repository}"),
        Command("Download it with curl", _curl(service, keys, job.id)),
        Command("Merge further: name it in a recipe", f"model: merge:{job.id}"),
    )


def _hub(service: str, keys: bool) -> str:
    token = f"export HF_TOKEN={KEY}\n" if keys else ""
    return f"export HF_ENDPOINT={shlex.quote(service)}\n{token}"


def _vllm(repository: str, *, adapter: bool) -> str:
    if adapter:
        return f'vllm serve "$BASE_MODEL" --enable-lora --lora-modules merged={repository}'
    return f"vllm serve {repository}"


def _python(service: str, keys: bool, repository: str, *, adapter: bool) -> str:
    token = 'os.environ["HF_TOKEN"] = os.environ["MERGEYARD_API_KEY"]\n' if keys else ""
    head = f'import os\n\nos.environ["HF_ENDPOINT"] = "{service}"  # before transformers is imported\n{token}\n'
    if adapter:
        return (
            f"{head}from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            'base = AutoModelForCausalLM.from_pretrained(os.environ["BASE_MODEL"], dtype="auto")\n'
            f'model = PeftModel.from_pretrained(base, "{repository}")'
        )
    return (
        f"{head}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{repository}", dtype="auto")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repository}")'
    )


def _curl(service: str, keys: bool, job_id: str) -> str:
    header = f' -H "authorization: Bearer {KEY}"' if keys else ""
    archive = shlex.quote(f"{service}{merge_url(job_id)}/archive.tar")
    return f"curl -f{header} {archive} -C - -o {job_id}.tar"
