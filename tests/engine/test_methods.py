"""What each method asks of the engine and of the kernels."""

from __future__ import annotations

import pytest

from app.errors import MergeyardError
from app.planning.plan import Scalar, TensorPlan
from app.recipe.methods import METHODS as SPECS
from tests.engine.one_tensor import ARTICLE, MERGEKIT, PAPER, PEFT, plan_of
from worker.engine.kernels.signature import Rule
from worker.engine.methods import METHODS, Needs, VoteMethod, method_of

TIES = METHODS["ties"]
LINEAR = METHODS["linear"]
TASK_ARITHMETIC = METHODS["task_arithmetic"]
assert isinstance(TIES, VoteMethod)
assert isinstance(LINEAR, VoteMethod)
assert isinstance(TASK_ARITHMETIC, VoteMethod)


def test_the_engine_has_every_method_that_recipes_may_name() -> None:
    assert {name: method.name for name, method in METHODS.items()} == {name: name for name in SPECS}


def test_an_unknown_method_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(MergeyardError, match="linear, task_arithmetic, ties") as refused:
        method_of("tys")
    assert refused.value.code == "unknown_method"


@pytest.mark.parametrize(
    ("parameters", "needs"),
    [
        (MERGEKIT, Needs(trim="tensor")),
        (MERGEKIT | {"rescale": True}, Needs(trim="tensor", rescale=True)),
        (PEFT, Needs(trim="tensor")),
        (PAPER, Needs(trim="model", majority=True, prescale=True)),
        (ARTICLE, Needs(trim="tensor", prescale=True)),
        (ARTICLE | {"zero_sum": "majority"}, Needs(trim="tensor", prescale=True)),
    ],
)
def test_what_ties_needs(parameters: dict[str, Scalar], needs: Needs) -> None:
    assert TIES.needs(plan_of(10, parameters, [1.0, 2.0], 0.5)) == needs


def test_ties_at_density_one_needs_no_trim_of_a_tensor() -> None:
    assert TIES.needs(plan_of(10, MERGEKIT, [1.0, 2.0], 1.0)).trim == "none"
    assert TIES.needs(plan_of(10, MERGEKIT, [1.0, 2.0], [1.0, 0.5])).trim == "tensor"


def test_ties_over_the_model_counts_untrimmed_tensors_too() -> None:
    assert TIES.needs(plan_of(10, PAPER, [1.0, 2.0], 1.0)).trim == "model"


def test_weighted_sums_need_nothing() -> None:
    plan = plan_of(10, {"lambda": 1.0, "normalize": True}, [1.0, 2.0])
    assert LINEAR.needs(plan) == TASK_ARITHMETIC.needs(plan) == Needs()
    assert LINEAR.keep_count(plan, plan.contributions[0], 10) == 10


@pytest.mark.parametrize(
    ("density", "min_keep", "k"),
    [
        (0.0, 1, 0),
        (0.0, 0, 0),
        (0.01, 1, 1),
        (0.01, 0, 0),
        (0.25, 1, 2),
        (0.999, 0, 9),
        (1.0, 0, 10),
    ],
)
def test_keep_count(density: float, min_keep: int, k: int) -> None:
    plan = plan_of(10, MERGEKIT | {"min_keep": min_keep}, [1.0], density)
    assert TIES.keep_count(plan, plan.contributions[0], 10) == k


def test_keep_count_of_an_empty_tensor_is_zero() -> None:
    plan = plan_of(0, MERGEKIT, [1.0], 0.5)
    assert TIES.keep_count(plan, plan.contributions[0], 0) == 0


def test_a_weight_that_scaled_the_task_vector_counts_as_one() -> None:
    assert TIES.weights(plan_of(10, PAPER, [0.5, -2.0])) == [1.0, 1.0]
    assert TIES.weights(plan_of(10, PEFT, [0.5, -2.0])) == [0.5, -2.0]


@pytest.mark.parametrize(
    ("parameters", "rule"),
    [
        (MERGEKIT, Rule(elect="mass", divisor="agreeing_weights", sources=2)),
        (MERGEKIT | {"normalize": False, "lambda": 0.5}, Rule(scale=0.5, elect="mass", sources=2)),
        (PEFT, Rule(elect="mass", weigh_votes=False, divisor="agreeing", sources=2)),
        (PAPER, Rule(elect="mass", divisor="agreeing", sources=2)),
        (ARTICLE, Rule(elect="unanimous", divisor="sources", sources=5)),
        (ARTICLE | {"divisor": "agreeing"}, Rule(elect="unanimous", divisor="agreeing", sources=2)),
        (
            MERGEKIT | {"elect": "quorum", "quorum": 0.5, "normalize": False},
            Rule(elect="quorum", divisor="agreeing", required=1, sources=2),
        ),
    ],
)
def test_rules_of_ties(parameters: dict[str, Scalar], rule: Rule) -> None:
    assert TIES.rule(plan_of(10, parameters, [1.0, 2.0], 0.5), sources=5) == rule


@pytest.mark.parametrize(
    ("quorum", "sources", "required"), [(0.6, 5, 3), (0.07, 100, 7), (0.5, 3, 2), (0.1, 3, 1), (0, 3, 0)]
)
def test_quorum_rounds_up_whole_shares_exactly(quorum: float, sources: int, required: int) -> None:
    plan = plan_of(4, MERGEKIT | {"elect": "quorum", "quorum": quorum}, [1.0] * sources)
    assert TIES.rule(plan, sources=sources + 4).required == required


def test_the_majority_sign_reaches_the_rule() -> None:
    assert TIES.rule(plan_of(10, PAPER, [1.0]), -1, sources=1).zero_sign == -1


def _weighted(weights: list[float], *, normalize: bool, scale: float = 1.0) -> TensorPlan:
    return plan_of(4, {"lambda": scale, "normalize": normalize}, weights)


def test_rules_of_linear() -> None:
    assert LINEAR.rule(_weighted([0.3, 0.6], normalize=True), sources=2) == Rule(base=1.0, divisor="weights")
    assert LINEAR.rule(_weighted([0.5, 2.0], normalize=False), sources=2) == Rule(base=2.5)
    # A sum of zero divides by 1: what is left is the difference of the models, without the base.
    assert LINEAR.rule(_weighted([1.0, -1.0], normalize=True), sources=2) == Rule(base=0.0, divisor="weights")


def test_rules_of_task_arithmetic() -> None:
    summed = TASK_ARITHMETIC.rule(_weighted([1.0, 2.0], normalize=False, scale=0.4), sources=2)
    mean = TASK_ARITHMETIC.rule(_weighted([1.0, 2.0], normalize=True), sources=2)
    assert summed == Rule(scale=0.4)
    assert mean == Rule(divisor="weights")
