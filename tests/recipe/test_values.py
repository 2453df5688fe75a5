"""Parameter values by tensor: mergekit's gradients and filters."""

from __future__ import annotations

import pytest

from app.recipe.values import Position, layer_name, value_at


@pytest.mark.parametrize(("layer", "expected"), [(0, 0.0), (1, 0.25), (2, 0.5), (4, 1.0), (None, 0.0)])
def test_a_gradient_is_interpolated_over_the_layers(layer: int | None, expected: float) -> None:
    assert value_at([0.0, 1.0], Position("x", layer, 5)) == pytest.approx(expected)


def test_a_gradient_passes_through_its_inner_points() -> None:
    values = [value_at([1.0, 0.7, 0.1], Position("x", layer, 5)) for layer in range(5)]
    assert values == pytest.approx([1.0, 0.85, 0.7, 0.4, 0.1])


def test_a_lone_layer_takes_the_last_value() -> None:
    assert value_at([0.2, 0.8], Position("x", 0, 1)) == 0.8


def test_a_gradient_of_flags_takes_the_one_at_or_before() -> None:
    assert [value_at([True, False, True], Position("x", layer, 4)) for layer in range(4)] == [True, True, False, True]


def test_the_first_matching_filter_wins() -> None:
    value = [{"filter": "mlp", "value": 0.5}, {"filter": "up_proj", "value": 0.1}, {"value": 1.0}]
    assert value_at(value, Position("model.layers.0.mlp.up_proj.weight", 0, 2)) == 0.5
    assert value_at(value, Position("model.norm.weight", None, 2)) == 1.0


def test_a_filter_may_hold_a_gradient() -> None:
    value = [{"filter": "*", "value": [0.0, 1.0]}]
    assert value_at(value, Position("model.layers.1.x", 1, 2)) == 1.0


def test_filters_that_all_miss_say_nothing() -> None:
    assert value_at([{"filter": "mlp", "value": 0.5}], Position("model.norm.weight", None, 2)) is None


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.11.mlp.up_proj.weight", 11),
        ("transformer.h.3.attn.c_attn.weight", 3),
        ("h.0.ln_1.weight", 0),
        ("encoder.layer.5.output.dense.bias", 5),
        ("encoder.block.4.layer.1.DenseReluDense.wo.weight", 4),
        ("model.layers.2.block_sparse_moe.experts.7.w1.weight", 2),
        ("vit.encoder.layer.1.attention.output.dense.weight", 1),
        ("model.embed_tokens.weight", None),
        ("lm_head.weight", None),
    ],
)
def test_layers_are_read_from_names(name: str, layer: int | None) -> None:
    place = layer_name(name)
    assert (place.layer if place else None) == layer
