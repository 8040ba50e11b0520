"""Where a rollback leads, and which targets go along. Pure: what is stacked on what goes in, goals come out.

A patch ends committed on every target it names, or on none; so it is taken back on all of them or, when the
operator says ``only``, on one that is named. It is never dug out from under a later one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import msgspec

from asyncsup.errors import PatchNotFoundError, PatchRefusedError, UsageError


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """One generation on the way back from a target's current one.

    Attributes:
        patch: the id of the patch that made it; None when it was no patch.
        title: of that patch, for people.
        kept: it is still there to go back to.
        bottom: there is none before it that anybody knows of.
    """

    generation: int
    build: int
    patch: str | None = None
    title: str = ""
    kept: bool = True
    bottom: bool = False


Stacks = Mapping[str, Sequence[Layer]]
"""Of every target its current generation, then the one that was made from, and so on."""


class Extent(msgspec.Struct, frozen=True, kw_only=True):
    """How far back one target is to go: to before its current patch, to a build, or to a generation."""

    build: int | None = None
    generation: int | None = None


def goals_of_target(
    stacks: Stacks, target: str, extent: Extent, *, only: bool, together: bool
) -> dict[str, int]:
    """Which generation every target concerned goes back to.

    Args:
        only: no other target, though patches that are taken back cover others as well.
        together: every other target that they cover.
    Raises:
        PatchNotFoundError: there is nothing to go back to, or it is not kept any more.
        PatchRefusedError: ``gate.later_patch``, a later patch stands on top on another target.
        UsageError: ``rollback.several``, other targets are covered, and it was not said what about them; or
            the target is there already.
    """
    depth = _depth(stacks[target], target, extent)
    goals = {target: _goal(stacks[target], target, depth)}
    if only:
        return goals
    crossed = {layer.patch for layer in stacks[target][:depth]} - {None}
    others = {
        name: found
        for name, stack in stacks.items()
        if name != target and (found := _depth_below(stack, crossed))
    }
    if others and not together:
        titles = {layer.title: None for layer in stacks[target][:depth] if layer.patch in crossed}
        verb = "covers" if len(titles) == 1 else "cover"
        raise UsageError(
            f"{_listed(titles)} {verb} {_listed(others)} as well as {target}; say --together to take that "
            f"back on all of them, or --only for {target} alone",
            code="rollback.several",
            target=target,
            others=sorted(others),
        )
    for name, found in others.items():
        _refuse_later(name, stacks[name][:found], crossed)
        goals[name] = _goal(stacks[name], name, found)
    return goals


def goals_of_patch(stacks: Stacks, patch: str, title: str, among: Collection[str]) -> dict[str, int]:
    """As `goals_of_target`, for a whole patch: every target of `among` on which it is in force.

    Raises:
        PatchNotFoundError, PatchRefusedError: as there.
    """
    concerned = {name: found for name in among if (found := _depth_below(stacks[name], {patch}))}
    if not concerned:
        raise PatchNotFoundError(f"{title} is not in force on any target (any more)", patch=patch)
    goals = {}
    for name, found in concerned.items():
        _refuse_later(name, stacks[name][:found], {patch})
        goals[name] = _goal(stacks[name], name, found)
    return goals


def _depth(stack: Sequence[Layer], target: str, extent: Extent) -> int:
    """How many layers are taken off."""
    if extent.build is None and extent.generation is None:
        if stack[0].bottom:
            raise PatchNotFoundError(f"{target} has no earlier generation to go back to", target=target)
        return 1
    what = f"build {extent.build}" if extent.generation is None else f"generation {extent.generation}"
    for depth, layer in enumerate(stack):
        if layer.generation == extent.generation or (
            extent.generation is None and layer.build == extent.build
        ):
            if depth == 0:
                raise UsageError(f"{target} is at {what} already", target=target)
            return depth
    reachable = ", ".join(
        f"{layer.build} (generation {layer.generation})" for layer in stack[1:] if layer.kept
    )
    raise PatchNotFoundError(
        f"{target} cannot go back to {what}; it can go back to build {reachable or 'none'}", target=target
    )


def _depth_below(stack: Sequence[Layer], patches: Collection[str | None]) -> int:
    """How many layers have to go for none of the `patches` to be left; 0 when there is none."""
    return max(
        (depth for depth, layer in enumerate(stack, start=1) if layer.patch in patches and not layer.bottom),
        default=0,
    )


def _goal(stack: Sequence[Layer], target: str, depth: int) -> int:
    goal = stack[depth] if depth < len(stack) else None
    if goal is None or not goal.kept:
        which = "the generation before it" if goal is None else f"generation {goal.generation}"
        raise PatchNotFoundError(
            f"{target} has no earlier generation to go back to: {which} is not kept any more", target=target
        )
    return goal.generation


def _refuse_later(target: str, layers: Sequence[Layer], patches: Collection[str | None]) -> None:
    later = next((layer for layer in layers if layer.patch not in patches), None)
    if later is not None:
        raise PatchRefusedError(
            f"on {target} {later.title} stands on top of it: take that one back first",
            code="gate.later_patch",
            target=target,
            patch=later.patch,
        )


def _listed(names: Collection[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
