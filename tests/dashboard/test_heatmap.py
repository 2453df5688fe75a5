"""Statistics of tensors, put together by layer and module."""

from __future__ import annotations

from typing import Any

import pytest

from app.dashboard.heatmap import Cell, heatmap


def entry(parameters: int = 10, **changes: Any) -> dict[str, Any]:
    return {
        "sources": [0, 1],
        "trimmed": [0.4, 0.6],
        "sign_conflict": 0.2,
        "source_norms": [1.0, 2.0],
        "merged_norm": 3.0,
        "parameters": parameters,
        "retained_energy": None,
        **changes,
    }


def test_a_layers_weight_and_bias_are_one_cell() -> None:
    found = heatmap(
        {
            "model.layers.1.self_attn.q_proj.weight": entry(90, sign_conflict=0.1, merged_norm=3.0),
            "model.layers.1.self_attn.q_proj.bias": entry(10, sign_conflict=0.6, trimmed=[1.0, 0.8], merged_norm=4.0),
        }
    )
    assert found is not None
    assert dict(found.cells) == {
        ("model.layers", 1, "self_attn.q_proj"): Cell(
            tensors=2,
            parameters=100,
            sign_conflict=pytest.approx(0.15),
            trimmed=pytest.approx(0.54),
            norm=pytest.approx(5.0),
        )
    }
    assert dict(found.stacks) == {"model.layers": (range(2), ("self_attn.q_proj",))}


def test_modules_stand_in_the_order_of_the_checkpoint() -> None:
    names = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    found = heatmap({f"model.layers.{layer}.{name}.weight": entry() for layer in range(3) for name in names})
    assert found is not None
    assert found.stacks["model.layers"] == (range(3), names)
    assert len(found.cells) == 9


def test_experts_of_a_layer_are_one_module() -> None:
    found = heatmap(
        {f"model.layers.0.mlp.experts.{expert}.up_proj.weight": entry(merged_norm=1.0) for expert in range(4)}
    )
    assert found is not None
    (cell,) = found.cells.items()
    assert cell[0] == ("model.layers", 0, "mlp.experts.*.up_proj")
    assert (cell[1].tensors, cell[1].norm) == (4, pytest.approx(2.0))


def test_what_is_in_no_layer_stands_beside_them() -> None:
    found = heatmap({"model.embed_tokens.weight": entry(), "model.layers.0.mlp.up_proj.weight": entry()})
    assert found is not None
    assert list(found.outside) == ["model.embed_tokens"]
    assert found.whole.tensors == 2
    assert found.whole.norm == pytest.approx(18**0.5)


def test_several_stacks_of_layers() -> None:
    found = heatmap(
        {
            "vision_tower.encoder.layers.0.mlp.fc1.weight": entry(),
            "language_model.model.layers.3.mlp.up_proj.weight": entry(),
        }
    )
    assert found is not None
    assert {stack: len(layers) for stack, (layers, _) in found.stacks.items()} == {
        "vision_tower.encoder.layers": 1,
        "language_model.model.layers": 4,
    }


def test_what_no_tensor_has_is_unknown_and_not_zero() -> None:
    found = heatmap({"model.layers.0.mlp.up_proj.weight": entry(sign_conflict=None, trimmed=[], sources=[])})
    assert found is not None
    assert (found.whole.sign_conflict, found.whole.trimmed) == (None, None)
    assert list(found.most) == ["norm"]


def test_where_each_figure_is_greatest() -> None:
    found = heatmap(
        {f"model.layers.{layer}.mlp.up_proj.weight": entry(sign_conflict=layer / 10) for layer in (2, 7, 5)}
    )
    assert found is not None
    assert found.most["sign_conflict"] == ("model.layers", 7, "mlp.up_proj")


def test_a_merge_that_changed_nothing_has_none() -> None:
    assert heatmap({}) is None
