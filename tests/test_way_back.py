"""Where a rollback leads: how far, on which targets, and when it is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from store_kit import Bench, apply, benches, roll_back

from asyncsup.errors import AsyncsupError, PatchNotFoundError, PatchRefusedError, UsageError
from asyncsup.patch.facts import Layout
from asyncsup.patch.way_back import Extent, Layer, Stacks, goals_of_patch, goals_of_target

LAST = Extent()


def stack(*patches: str, gone: tuple[int, ...] = ()) -> tuple[Layer, ...]:
    """A target to which the patches were applied in this order: patch ``p3`` is build 3 and, as long as
    nothing is left out, generation 3; `gone` are the builds that are not kept any more."""
    builds = [0, *(int(patch[1:]) for patch in patches)]
    return tuple(
        Layer(
            generation=number,
            build=build,
            patch=f"p{build}" if number else None,
            title=f"rules {build}",
            kept=build not in gone,
            bottom=number == 0,
        )
        for number, build in reversed(list(enumerate(builds)))
    )


def of_target(stacks: Stacks, extent: Extent = LAST, *, only: bool = False, together: bool = False) -> object:
    try:
        return goals_of_target(stacks, "web", extent, only=only, together=together)
    except AsyncsupError as error:
        return error


def test_one_target_goes_back_by_one_patch() -> None:
    assert of_target({"web": stack("p1", "p2"), "db": stack("p9")}) == {"web": 1}


@pytest.mark.parametrize(
    ("extent", "goal"),
    [(Extent(build=1), 1), (Extent(build=0), 0), (Extent(generation=2), 2), (Extent(generation=0), 0)],
)
def test_several_patches_are_taken_back_at_once(extent: Extent, goal: int) -> None:
    assert of_target({"web": stack("p1", "p2", "p3")}, extent) == {"web": goal}


def test_the_nearest_generation_of_a_build_is_meant() -> None:
    twice = (
        Layer(generation=4, build=3, patch="p3"),
        Layer(generation=3, build=2, patch="p2"),
        Layer(generation=1, build=2, patch="p2"),
        Layer(generation=0, build=0, bottom=True),
    )
    assert of_target({"web": twice}, Extent(build=2)) == {"web": 3}


@pytest.mark.parametrize(
    ("patches", "gone", "extent", "words"),
    [
        ((), (), LAST, "has no earlier generation"),
        (("p1",), (0,), LAST, "generation 0 is not kept any more"),
        (
            ("p1", "p2"),
            (),
            Extent(build=7),
            r"go back to build 1 \(generation 1\), 0 \(generation 0\)",
        ),
        (("p1", "p2"), (0, 1), Extent(build=7), "it can go back to build none"),
        (("p1", "p2"), (0,), Extent(generation=0), "generation 0 is not kept any more"),
    ],
)
def test_what_is_not_there_cannot_be_gone_back_to(
    patches: tuple[str, ...], gone: tuple[int, ...], extent: Extent, words: str
) -> None:
    with pytest.raises(PatchNotFoundError, match=words):
        goals_of_target({"web": stack(*patches, gone=gone)}, "web", extent, only=True, together=False)


@pytest.mark.parametrize("extent", [Extent(build=2), Extent(generation=2)])
def test_where_a_target_is_already_it_does_not_go_back_to(extent: Extent) -> None:
    error = of_target({"web": stack("p1", "p2")}, extent)
    assert isinstance(error, UsageError)
    assert "already" in error.message


def test_a_patch_of_several_targets_is_not_taken_back_on_one_of_them_by_accident() -> None:
    stacks = {"web": stack("p1"), "db": stack("p1"), "other": stack("p2")}
    error = of_target(stacks)
    assert isinstance(error, UsageError)
    assert error.error_code == "rollback.several"
    assert error.message == (
        "rules 1 covers db as well as web; say --together to take that back on all of them, or --only for "
        "web alone"
    )
    assert error.details == {"target": "web", "others": ["db"]}
    assert of_target(stacks, only=True) == {"web": 0}
    assert of_target(stacks, together=True) == {"web": 0, "db": 0}
    # Where it has been taken back already, it is not in force.
    assert of_target({**stacks, "db": stack()}) == {"web": 0}


def test_a_later_patch_on_another_target_is_in_the_way() -> None:
    stacks = {"web": stack("p1"), "db": stack("p1", "p2")}
    for error in (of_target(stacks, together=True), _of_patch(stacks, "p1")):
        assert isinstance(error, PatchRefusedError)
        assert error.error_code == "gate.later_patch"
        assert error.message == "on db rules 2 stands on top of it: take that one back first"
    assert of_target(stacks, only=True) == {"web": 0}


def test_several_patches_go_together_when_the_same_ones_are_on_top_everywhere() -> None:
    stacks = {"web": stack("p1", "p2", "p3", "p4"), "db": stack("p1", "p3", "p4"), "log": stack("p1")}
    error = of_target(stacks, Extent(build=2))
    assert isinstance(error, UsageError)
    assert "rules 4 and rules 3 cover db" in error.message
    assert of_target(stacks, Extent(build=2), together=True) == {"web": 2, "db": 1}
    assert of_target(stacks, Extent(build=0), together=True) == {"web": 0, "db": 0, "log": 0}


def test_what_the_other_target_does_not_keep_any_more_is_in_the_way_as_well() -> None:
    error = of_target({"web": stack("p1"), "db": stack("p1", gone=(0,))}, together=True)
    assert isinstance(error, PatchNotFoundError)
    assert "db has no earlier generation" in error.message


def _of_patch(stacks: Stacks, patch: str, among: tuple[str, ...] | None = None) -> object:
    try:
        return goals_of_patch(stacks, patch, "the patch", among or tuple(stacks))
    except AsyncsupError as error:
        return error


def test_a_whole_patch_is_taken_back_where_it_is_in_force() -> None:
    stacks = {"web": stack("p1", "p2"), "db": stack("p2"), "log": stack("p1")}
    assert _of_patch(stacks, "p2") == {"web": 1, "db": 0}
    assert _of_patch(stacks, "p2", ("db", "log")) == {"db": 0}
    error = _of_patch(stacks, "p3")
    assert isinstance(error, PatchNotFoundError)
    assert "is not in force on any target" in error.message


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    with benches() as make:
        yield make


def test_the_store_knows_what_is_stacked_on_what(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY, build=100)
    for build in (101, 102, 103):
        apply(b.store, b.patch(build, modified={"app.json": b"%d" % build}))
    roll_back(b.store)
    apply(b.store, b.patch(104, modified={"app.json": b"104"}))
    b.store.prune("web", 2)

    def shown() -> list[tuple[int, int, bool, bool]]:
        return [
            (layer.generation, layer.build, layer.kept, layer.bottom)
            for layer in b.store.preview.stack("web")
        ]

    assert shown() == [
        (4, 104, True, False),
        (2, 102, True, False),
        (1, 101, True, False),
        (0, 100, False, True),
    ]
    assert [layer.title for layer in b.store.preview.stack("web")][:2] == [
        "patch 1.104 (build 104)",
        "patch 1.102 (build 102)",
    ]
    b.store.release("web")
    assert shown() == [(5, 104, True, True)]
