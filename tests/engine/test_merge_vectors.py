"""The vectors of merging-maths.md through whole merges: model files in, model files out, in both kernel rooms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.merges import merge, plan_of, tensors_of
from tests.files import write_adapter, write_model
from worker.engine.kernels import Room

A = ([2, 3, 0.1, 2.5, -0.2], [1, 2, 0.3, -2.5, 0.2], [-4, 1.5, -1.2, 0.4, 0.1])
B = ([1, -0.2, 0.5, -0.9, 0.05, 0.3], [-0.6, 0.4, 0.7, -0.1, 0, -0.3])
TWO_AND_A_SIXTH = 6.5 / 3

ROOMS: tuple[Room, ...] = ("reference", "cpu")


def merged(
    root: Path,
    room: Room,
    vectors: Sequence[Sequence[float]],
    method: str,
    *,
    weights: Sequence[float] | None = None,
    density: float = 1.0,
    split: int | None = None,
    base_value: float = 0.0,
    **parameters: Any,
) -> list[float]:
    """The vectors are full fine-tunes of a base that is ``base_value`` everywhere; ``split`` cuts into two tensors."""

    def cut(values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"w": values} if split is None else {"a": values[:split].clone(), "b": values[split:].clone()}

    write_model(root / "base", cut(torch.full((len(vectors[0]),), base_value)))
    models = []
    for index, vector in enumerate(vectors):
        write_model(root / f"x{index}", cut(torch.tensor(vector, dtype=torch.float32) + base_value))
        own = {"weight": weights[index] if weights else 1.0}
        if method == "ties":
            own["density"] = density
        models.append({"model": f"x{index}", "parameters": own})
    recipe = {"base_model": "base", "merge_method": method, "models": models, "parameters": parameters}
    merge(plan_of(root, recipe), root / "out", room=room)
    result = torch.cat([values for _, values in sorted(tensors_of(root / "out").items())])
    return (result - base_value).tolist()


def near(values: Sequence[float]) -> Any:
    return pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"dialect": "paper"}, [-4, TWO_AND_A_SIXTH, -1.2, -2.5, 0]),
        ({"dialect": "peft"}, [-4, TWO_AND_A_SIXTH, -1.2, 2.5, 0]),
        ({"dialect": "mergekit"}, [-4, TWO_AND_A_SIXTH, -1.2, 2.5, 0]),
        ({"elect": "count"}, [1.5, TWO_AND_A_SIXTH, -1.2, 2.5, 0]),
        ({"dialect": "article"}, [0, TWO_AND_A_SIXTH, 0, 0, 0]),
        ({"weights": (1, 0.5, 2), "dialect": "mergekit"}, [-4, 2, -1.2, 2.5, 0]),
        ({"weights": (1, 0.5, 2), "normalize": False}, [-8, 7, -2.4, 2.5, 0]),
        ({"weights": (1, 0.5, 2), "dialect": "peft"}, [-8, 7 / 3, -2.4, 2.5, 0]),
        ({"split": 2, "dialect": "peft"}, [-4, 2.5, -1.2, 2.5, 0]),
        ({"elect": "quorum", "quorum": 0.6}, [1.5, TWO_AND_A_SIXTH, 0, 0, 0]),
    ],
)
def test_vector_a(room: Room, parameters: dict[str, Any], expected: list[float], tmp_path: Path) -> None:
    assert merged(tmp_path, room, A, "ties", density=0.6, **parameters) == near(expected)


@pytest.mark.parametrize("room", ROOMS)
def test_vector_a_as_a_plain_sum(room: Room, tmp_path: Path) -> None:
    assert merged(tmp_path, room, A, "task_arithmetic") == near([-1, 6.5, -0.8, 0.4, 0.1])


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, [1, 0.4, 0.6, -0.9, 0, 0]),
        ({"normalize": False}, [1, 0.4, 1.2, -0.9, 0, 0]),
        ({"weights": (0.2, 0.8)}, [-0.6, 0.4, 0.66, -0.9, 0, 0]),
    ],
)
def test_vector_b(room: Room, parameters: dict[str, Any], expected: list[float], tmp_path: Path) -> None:
    assert merged(tmp_path, room, B, "ties", density=0.5, **parameters) == near(expected)


@pytest.mark.parametrize("room", ROOMS)
def test_vector_b_by_task_arithmetic(room: Room, tmp_path: Path) -> None:
    halved: dict[str, Any] = {"lambda": 0.5}
    found = merged(tmp_path, room, B, "task_arithmetic", weights=(0.6, 0.4), **halved)
    assert found == near([0.18, 0.02, 0.29, -0.29, 0.015, 0.03])


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize(
    ("vectors", "weights", "expected"),
    [
        (([0.5], [-0.5]), None, 0.5),  # a tie elects +
        (([3.0], [-1.0]), (0.2, 0.8), -1.0),  # weights vote
        (([1.0],), (-0.5,), 1.0),  # a lone negative weight divides itself out
        (([1.0], [-1.0]), (1, -0.9), 19.0),  # mergekit's number, kept
    ],
)
def test_single_values_by_mergekits_ties(
    room: Room, vectors: tuple[list[float], ...], weights: tuple[float, ...] | None, expected: float, tmp_path: Path
) -> None:
    assert merged(tmp_path, room, vectors, "ties", weights=weights) == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize(("normalize", "expected"), [(True, [0.7, 0.1]), (False, [1.4 + 1.0, 0.2 + 1.0])])
def test_linear_averages_models_and_not_their_changes(
    room: Room, normalize: bool, expected: list[float], tmp_path: Path
) -> None:
    """Weights that sum to 2 over a base of 1: not normalised, the base counts twice."""
    vectors = ([1.0, -0.2], [0.4, 0.4])
    found = merged(tmp_path, room, vectors, "linear", weights=(1, 1), base_value=1.0, normalize=normalize)
    assert found == near(expected)


@pytest.mark.parametrize("room", ROOMS)
def test_rescale_gives_the_survivors_the_norm_before_the_trim(room: Room, tmp_path: Path) -> None:
    found = merged(tmp_path, room, ([4.0, -1.0, 3.0, 2.0],), "ties", density=0.5, rescale=True)
    assert found == near([4 * 10 / 7, 0, 3 * 10 / 7, 0])


@pytest.mark.parametrize("room", ROOMS)
def test_factors_are_never_merged_apart(room: Room, tmp_path: Path) -> None:
    """Two rank-1 adapters on one entry each give half an identity, without the cross terms that PEFT's linear adds."""
    write_model(tmp_path / "base", {"m.q_proj.weight": torch.zeros(2, 2)})
    for index in (0, 1):
        A = torch.zeros(1, 2)
        A[0, index] = 1
        factors = {
            "base_model.model.m.q_proj.lora_A.weight": A,
            "base_model.model.m.q_proj.lora_B.weight": A.T.clone(),
        }
        write_adapter(tmp_path / f"adapter{index}", factors, r=1, lora_alpha=1)
    models = [{"adapter": f"adapter{index}", "parameters": {"weight": 0.5}} for index in (0, 1)]
    recipe = {"base_model": "base", "merge_method": "task_arithmetic", "models": models}
    merge(plan_of(tmp_path, recipe), tmp_path / "out", room=room)
    assert torch.equal(tensors_of(tmp_path / "out")["m.q_proj.weight"], 0.5 * torch.eye(2))
