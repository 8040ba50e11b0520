"""`dataclass`, of which nothing is compiled before it is used.

The one of the standard library writes six methods for each class, as text, and compiles them when the module
is imported: more than a millisecond for a frozen one. There are over a hundred, which was nearly half of what
it took to start a supervisor, and most of them belong to something it does not do at once, or ever. Here the
methods that are the same for all classes are ordinary functions, and only `__init__` is generated, when the
first instance is made.

The classes are the same to whoever uses them, `fields`, `replace` and type checkers among them. What is not
needed here is left out: `order`, `InitVar`, and `eq=True` with a `__hash__` of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import MISSING, Field, FrozenInstanceError
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

__all__ = ["dataclass"]

T = TypeVar("T")


def _dataclass(*, frozen: bool = False, slots: bool = False, kw_only: bool = False, eq: bool = True) -> Any:
    def make(cls: type[T]) -> type[T]:
        if cls.__doc__ is None:
            cls.__doc__ = cls.__name__  # or else it would be the signature: another half of a millisecond
        own = frozenset(vars(cls))
        made = dataclasses.dataclass(init=False, repr=False, eq=False, slots=slots, kw_only=kw_only)(cls)
        # One with slots is another class, without what is set on the first.
        names = [each.name for each in dataclasses.fields(made)]  # type: ignore[arg-type]
        methods: dict[str, Any] = {"__init__": _first_init(made, frozen), "__repr__": _repr}
        if eq:
            methods |= {"__eq__": _equality(names), "__hash__": _hash(names) if frozen else None}
        if frozen:
            methods |= {"__setattr__": _refuse_to_set, "__delattr__": _refuse_to_delete}
            if slots:
                # What `copy` and `pickle` would use otherwise sets attributes.
                methods |= {"__getstate__": _state, "__setstate__": _set_state}
        for name, method in methods.items():
            if name not in own:
                setattr(made, name, method)
        return made

    return make


def _first_init(cls: type, frozen: bool) -> Callable[..., None]:
    def first(self: object, *args: Any, **kwargs: Any) -> None:
        init = _compile_init(cls, frozen)
        cls.__init__ = init  # type: ignore[misc]
        init(self, *args, **kwargs)

    return first


def _compile_init(cls: Any, frozen: bool) -> Callable[..., None]:
    everything = dataclasses.fields(cls)
    positional = [_parameter(each) for each in everything if each.init and not each.kw_only]
    keywords = [_parameter(each) for each in everything if each.init and each.kw_only]
    known: dict[str, Any] = {"_set": object.__setattr__, "_MISSING": MISSING}
    lines = []
    for each in everything:
        value = each.name
        if each.default is not MISSING:
            known[f"_default_{each.name}"] = each.default
            value = value if each.init else f"_default_{each.name}"
        elif each.default_factory is not MISSING:
            known[f"_factory_{each.name}"] = each.default_factory
            value = f"_factory_{each.name}()"
            if each.init:
                value += f" if {each.name} is _MISSING else {each.name}"
        elif not each.init:
            continue
        lines.append(f"_set(self, {each.name!r}, {value})" if frozen else f"self.{each.name} = {value}")
    if hasattr(cls, "__post_init__"):
        lines.append("self.__post_init__()")
    parameters = ["self", *positional, *(["*", *keywords] if keywords else [])]
    text = "".join(f"    {line}\n" for line in lines or ["pass"])
    exec(f"def __init__({', '.join(parameters)}):\n{text}", known)
    init: Callable[..., None] = known["__init__"]
    init.__qualname__ = f"{cls.__qualname__}.__init__"
    init.__annotations__ = {each.name: each.type for each in everything if each.init} | {"return": None}
    return init


def _parameter(each: Field[Any]) -> str:
    if each.default is not MISSING:
        return f"{each.name}=_default_{each.name}"
    return each.name if each.default_factory is MISSING else f"{each.name}=_MISSING"


def _repr(self: Any) -> str:
    shown = (each.name for each in dataclasses.fields(self) if each.repr)
    return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"


def _equality(names: list[str]) -> Callable[[Any, Any], bool]:
    values = _values(names)

    def equal(self: Any, other: Any) -> bool:
        return bool(values(self) == values(other)) if other.__class__ is self.__class__ else NotImplemented

    return equal


def _hash(names: list[str]) -> Callable[[Any], int]:
    values = _values(names)
    return lambda self: hash(values(self))


def _values(names: list[str]) -> Callable[[Any], Any]:
    return attrgetter(*names) if names else lambda _: ()


def _refuse_to_set(self: object, name: str, value: object) -> None:
    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_to_delete(self: object, name: str) -> None:
    raise FrozenInstanceError(f"cannot delete field {name!r}")


def _state(self: Any) -> list[Any]:
    return [getattr(self, each.name) for each in dataclasses.fields(self)]


def _set_state(self: Any, state: list[Any]) -> None:
    for each, value in zip(dataclasses.fields(self), state, strict=True):
        object.__setattr__(self, each.name, value)


if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    dataclass = _dataclass
