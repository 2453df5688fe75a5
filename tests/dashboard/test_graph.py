"""A lineage's graph."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from app.dashboard.graph import HEIGHT, WIDTH, Drawing, draw
from app.records.lineage import Lineage, Relative, Tie


def lineage(*ties: tuple[str, str], alone: str = "") -> Lineage:
    names = dict.fromkeys(name for tie in ties for name in tie) or {alone: None}
    return Lineage(
        subject=next(iter(names)),
        relatives={name: Relative(name=name, kind="merge") for name in names},
        ties=tuple(Tie(*tie, "model") for tie in ties),
        cut=False,
    )


def columns(drawing: Drawing) -> list[set[str]]:
    places = sorted({node.x for node in drawing.nodes})
    return [{node.relative.name for node in drawing.nodes if node.x == x} for x in places]


def rows(drawing: Drawing) -> dict[str, float]:
    return {node.relative.name: node.y for node in drawing.nodes}


def test_sources_stand_on_the_left_and_readers_on_the_right() -> None:
    drawing = draw(lineage(("base", "merge"), ("adapter", "merge"), ("merge", "later"), ("merge", "alias")))
    assert columns(drawing) == [{"base", "adapter"}, {"merge"}, {"later", "alias"}]
    middle = rows(drawing)["merge"] + HEIGHT / 2
    assert middle == drawing.height / 2, "a column of one stands in the middle"


def test_a_source_stands_beside_what_is_made_of_it() -> None:
    drawing = draw(lineage(("base", "first"), ("first", "second"), ("late", "second")))
    assert columns(drawing) == [{"base"}, {"first", "late"}, {"second"}]


def test_lines_do_not_cross_where_they_need_not() -> None:
    drawing = draw(lineage(("x", "end"), ("y", "end"), ("z", "end"), ("a", "z"), ("b", "y"), ("c", "x"), ("a", "y")))
    places = {node.relative.name: node for node in drawing.nodes}
    edges = [(places[edge.tie.source], places[edge.tie.target]) for edge in drawing.edges]
    crossings = [
        1
        for (s1, t1), (s2, t2) in combinations(edges, 2)
        if s1.x == s2.x and t1.x == t2.x and (s1.y - s2.y) * (t1.y - t2.y) < 0
    ]
    assert len(crossings) == 0


def test_a_merge_by_itself() -> None:
    drawing = draw(lineage(alone="merge"))
    assert len(drawing.nodes) == 1
    assert drawing.width > WIDTH


def pairs() -> st.SearchStrategy[Iterable[tuple[int, int]]]:
    ordered = st.tuples(st.integers(0, 11), st.integers(0, 11)).filter(lambda pair: pair[0] < pair[1])
    return st.sets(ordered, min_size=1, max_size=30)


@given(pairs())
def test_no_boxes_overlap_and_every_line_leads_to_the_right(found: Iterable[tuple[int, int]]) -> None:
    drawing = draw(lineage(*((str(source), str(target)) for source, target in found)))
    for one, other in combinations(drawing.nodes, 2):
        assert abs(one.x - other.x) >= WIDTH or abs(one.y - other.y) >= HEIGHT
    places = {node.relative.name: node for node in drawing.nodes}
    for edge in drawing.edges:
        source, target = places[edge.tie.source], places[edge.tie.target]
        assert source.x + WIDTH < target.x
        assert edge.path.startswith(f"M{source.x + WIDTH:g},{source.y + HEIGHT / 2:g} ")
        assert edge.path.endswith(f" {target.x:g},{target.y + HEIGHT / 2:g}")
    assert all(node.x > 0 and node.x + WIDTH < drawing.width for node in drawing.nodes)
    assert all(node.y > 0 and node.y + HEIGHT < drawing.height for node in drawing.nodes)
