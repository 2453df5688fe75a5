"""The figures of tests/conformance, made by mergekit itself: run by ``mergekit.sh`` in an environment of its own.

Writes every case's models, merges them as ``mergekit-yaml`` (or ``mergekit-multi``) would, in float32 on one thread,
and keeps the tensors of the result. In the random methods, only what mergekit's Bernoulli draw returns is replaced, by
draws that depend on the tensor and the source; the tests inject the same.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mergekit.merge_methods.generalized_task_arithmetic as task_arithmetic
import torch
import transformers
import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.scripts.multimerge import main as multimerge
from safetensors.torch import load_file

from tests.conformance.figures import Case, Figures, by_token, cases, uniform, write_figures
from tests.conformance.models import ARCHITECTURES, write_root

OPTIONS: dict[str, Any] = {
    "lora_merge_cache": "adapters",
    "clone_tensors": True,
    "write_model_card": False,
    "copy_tokenizer": False,  # where tokenizers are merged, the merged one is written all the same
}


def main() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    for architecture in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(temporary), _same_draws():
            write_root(Path(temporary), architecture)
            made = {}
            for case in cases():
                if case.architecture == architecture:
                    print(case, flush=True)
                    made[case.name] = merged_by_mergekit(case, Path("out") / case.name)
        write_figures(architecture, made)


def merged_by_mergekit(case: Case, out: Path) -> Figures:
    """Runs one recipe in the current folder, which is the model root."""
    LoaderCache().loaders.clear()  # kept by path for the whole process; paths mean other models by now
    recipe = case.path.read_text()
    if len(list(yaml.safe_load_all(recipe))) > 1:
        out.mkdir(parents=True)
        folders = ["--intermediate-dir", str(out / "parts"), "--out-path", str(out / "last")]
        flags = ["--clone-tensors", "--no-write-model-card", "--no-copy-tokenizer"]
        multimerge([str(case.path), *folders, *flags], standalone_mode=False)
        out = out / "last"
    else:
        options = MergeOptions(**OPTIONS, quiet=True)
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(recipe)), str(out), options)
    tensors: dict[str, Any] = {}
    for file in sorted(out.glob("*.safetensors")):
        tensors |= {name: values.float().numpy() for name, values in load_file(file).items()}
    if "tokenizer" in recipe:
        return by_token(tensors, transformers.AutoTokenizer.from_pretrained(out).get_vocab())
    return Figures(tensors=tensors)


@contextlib.contextmanager
def _same_draws() -> Iterator[None]:
    """Replaces ``torch.bernoulli`` by draws that depend on the tensor being merged and on the source alone."""
    tensor = ""
    sources: list[str] = []
    execute, sparsify, bernoulli = ExecuteMergeMethodTask.execute, task_arithmetic.sparsify, torch.bernoulli

    def executing(self: ExecuteMergeMethodTask, *args: Any, **kwargs: Any) -> Any:
        nonlocal tensor
        tensor = self.output_weight.name
        sources[:] = [os.fspath(str(model)) for model in self.model_order if model != self.base_model]
        return execute(self, *args, **kwargs)

    def sparsifying(*args: Any, **kwargs: Any) -> Any:
        try:
            return sparsify(*args, **kwargs)
        finally:
            sources.pop(0)  # one call for each source, in order

    def drawing(probabilities: torch.Tensor) -> torch.Tensor:
        draws = torch.from_numpy(uniform(tensor, sources[0], probabilities.numel()))
        return (draws.reshape(probabilities.shape) < probabilities.double()).to(probabilities.dtype)

    ExecuteMergeMethodTask.execute = executing
    task_arithmetic.sparsify, torch.bernoulli = sparsifying, drawing
    try:
        yield
    finally:
        ExecuteMergeMethodTask.execute = execute
        task_arithmetic.sparsify, torch.bernoulli = sparsify, bernoulli


if __name__ == "__main__":
    main()
