"""`asyncsup.lazy_dataclass` makes the classes the standard library would make."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, field, fields, replace
from typing import Any, ClassVar

import pytest

from asyncsup.lazy_dataclass import dataclass

FROZEN = {"frozen": True, "slots": True, "kw_only": True}
OPTIONS: list[dict[str, bool]] = [
    FROZEN,
    {"frozen": True},
    {"slots": True},
    {"slots": True, "eq": False},
    {"slots": True, "kw_only": True},
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    x: int
    y: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Named(Point):
    name: str = "n"


def make(decorator: Callable[..., Any], options: dict[str, bool]) -> Any:
    class Sample:
        KIND: ClassVar[str] = "kind"
        first: int
        secret: str = field(repr=False)
        items: list[int] = field(default_factory=list)
        text: str = "none"
        counted: list[int] = field(default_factory=lambda: [1], init=False)

        @property
        def double(self) -> int:
            return self.first * 2

    return decorator(**options)(Sample)


@pytest.fixture(params=OPTIONS, ids="-".join)
def both(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return make(dataclass, request.param), make(dataclasses.dataclass, request.param)


def test_an_instance_is_what_it_would_be(both: tuple[Any, Any]) -> None:
    ours, theirs = (cls(first=1, secret="s") for cls in both)
    assert repr(ours) == repr(theirs)
    assert dataclasses.asdict(ours) == dataclasses.asdict(theirs)
    assert dataclasses.asdict(replace(ours, first=2)) == dataclasses.asdict(replace(theirs, first=2))
    assert [each.name for each in fields(ours)] == [each.name for each in fields(theirs)]
    assert (ours.double, ours.KIND, hasattr(ours, "__dict__")) == (2, "kind", hasattr(theirs, "__dict__"))
    assert type(ours)(first=1, secret="s").items is not ours.items


def test_equality_and_hash(both: tuple[Any, Any]) -> None:
    outcomes = []
    for cls in both:
        one, same, other = (cls(first=number, secret="s") for number in (1, 1, 2))
        outcomes.append((one == same, one == other, one == 1, cls.__hash__ is None))
        if cls.__hash__ not in {None, object.__hash__}:
            with pytest.raises(TypeError, match="unhashable type: 'list'"):
                hash(one)
    assert outcomes[0] == outcomes[1]
    assert len({Point(x=1), Point(x=1), Point(x=2)}) == 2


def test_arguments_are_refused_alike(both: tuple[Any, Any]) -> None:
    for arguments, named in (
        ((), {}),
        ((), {"first": 1, "secret": "s", "more": 1}),
        ((1, "s", [], "", 1), {}),
    ):
        messages = []
        for cls in both:
            with pytest.raises(TypeError) as caught:
                cls(*arguments, **named)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_positional_arguments_are_in_the_order_of_the_fields() -> None:
    ours = make(dataclass, {"slots": True})(1, "s", [3], "t")
    assert (ours.first, ours.secret, ours.items, ours.text, ours.counted) == (1, "s", [3], "t", [1])


def test_frozen_is_frozen() -> None:
    point: Any = Point(x=1)
    with pytest.raises(FrozenInstanceError, match="field 'x'"):
        point.x = 2
    with pytest.raises(FrozenInstanceError, match="field 'x'"):
        del point.x
    assert point == Point(x=1)


def test_a_class_keeps_the_methods_it_has() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Own:
        x: int

        def __repr__(self) -> str:
            return "own"

        def __post_init__(self) -> None:
            if self.x < 0:
                raise ValueError("x")

    assert repr(Own(x=1)) == "own"
    with pytest.raises(ValueError, match="x"):
        Own(x=-1)


def test_inheritance() -> None:
    named = Named(x=1, name="m")
    assert (named.x, named.y, named.name) == (1, 0, "m")
    assert named != Point(x=1)
    assert repr(named) == "Named(x=1, y=0, name='m')"


def test_copies() -> None:
    named = Named(x=1, name="m")
    assert copy.copy(named) == copy.deepcopy(named) == pickle.loads(pickle.dumps(named)) == named


def test_init_is_compiled_with_the_first_instance() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Late:
        x: int

    before = Late.__init__
    Late(x=1)
    first = Late.__init__
    Late(x=2)
    assert before is not first is Late.__init__
