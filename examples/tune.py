"""How the demo's TIES recipe was chosen: every point of a small grid, merged and scored on the validation examples.

`python -m examples.tune` merges with the local command, a few seconds a point; the test examples are never looked at.
"""

import argparse
import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from examples.base_model import base_model
from examples.demo import HERE, lay_out
from examples.scoring import exact_match, exact_matches, load
from examples.tasks import TASKS, examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, nargs="+", default=[0.3, 0.5, 0.7, 1.0])
    parser.add_argument("--lambda", dest="scale", type=float, nargs="+", default=[1.0, 1.3, 1.6])
    parser.add_argument("--normalize", choices=["true", "false"], nargs="+", default=["true", "false"])
    options = parser.parse_args()
    console = Console(highlight=False)
    roots = lay_out(base_model(console))
    recipe = yaml.safe_load((HERE / "recipes" / "ties.yaml").read_text())
    for normalize, density, scale in product(options.normalize, options.density, options.scale):
        scores = score(at(recipe, density, scale, normalize == "true"), roots)
        listed = "  ".join(f"{task} {value:.1%}" for task, value in zip(TASKS, scores, strict=True))
        mean = sum(scores) / len(scores)
        console.print(f"normalize {normalize:<5}  density {density:.2f}  lambda {scale:.2f}  {listed}  mean {mean:.2%}")


def at(recipe: dict[str, Any], density: float, scale: float, normalize: bool) -> dict[str, Any]:
    """The recipe at one point of the grid."""
    point = copy.deepcopy(recipe)
    point["parameters"] |= {"lambda": scale, "normalize": normalize}
    for model in point["models"]:
        model["parameters"]["density"] = density
    return point


def score(recipe: dict[str, Any], roots: Path) -> Sequence[float]:
    """Exact match of the merged model on each task's validation examples."""
    with tempfile.TemporaryDirectory(prefix="mergeyard-tune-") as folder:
        written, merged = Path(folder) / "recipe.yaml", Path(folder) / "merged"
        written.write_text(yaml.safe_dump(recipe))
        run = subprocess.run(
            [Path(sys.executable).with_name("mergeyard"), "merge", written, merged],
            env=os.environ | {"MERGEYARD_MODEL_ROOTS": str(roots)},
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode != 0:
            raise RuntimeError(f"the merge failed:\n{run.stderr}")
        model, tokenizer = load(merged)
        return [exact_match(exact_matches(model, tokenizer, examples(task, "validation"))) for task in TASKS]


if __name__ == "__main__":
    main()
