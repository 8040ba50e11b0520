"""May a patch be applied: every gate, closed and open, and what counts as applied already."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from asyncsup.patch.gates import Assessment, TargetFacts, assess
from asyncsup.patch.manifest import FileChange, Kind, Manifest, Op, Requires

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
PATCH = "f" * 64
GATES = ["target", "region", "build", "requires", "expired", "kind", "held"]

MANIFEST = Manifest(
    name="pricing-rules",
    version="2.3.0",
    build=300,
    kind=Kind.WARM,
    targets=("pricer", "web"),
    regions=("us-east-1", "eu-west-1"),
    files=(FileChange(path="job.json", op=Op.DELETED),),
)
FACTS = TargetFacts(
    name="pricer",
    region="us-east-1",
    build=290,
    patch=None,
    content_matches=False,
    allow=frozenset(Kind),
    held=None,
)


def judge(*, signed: bool = False, **keys: Any) -> Assessment:
    """Judge the valid patch for the valid target, with other values for `keys` of either."""
    manifest_keys = {
        key.removeprefix("patch_"): value for key, value in keys.items() if key.startswith("patch_")
    }
    fact_keys = {key: value for key, value in keys.items() if not key.startswith("patch_")}
    if "made_by" in fact_keys:
        fact_keys["patch"] = fact_keys.pop("made_by")
    return assess(
        replace(MANIFEST, **manifest_keys), PATCH, replace(FACTS, **fact_keys), now=NOW, signed=signed
    )


def refusal(assessment: Assessment) -> tuple[str, str | None]:
    assert assessment.refused is not None
    assert not assessment.already
    return assessment.refused.name, assessment.refused.code


def test_fitting_patch_opens_every_gate() -> None:
    assessment = judge()
    assert assessment.target == "pricer"
    assert assessment.refused is None
    assert not assessment.already
    assert [gate.name for gate in assessment.gates] == GATES
    assert all(gate.ok and gate.code is None and gate.detail for gate in assessment.gates)


def test_target_that_is_not_named_is_refused() -> None:
    assessment = judge(name="other")
    assert refusal(assessment) == ("target", "gate.target")
    assert assessment.refused is not None
    assert assessment.refused.detail == "patch is for pricer, web, not for other"


def test_however_many_names_a_patch_has_a_gate_says_it_in_a_line() -> None:
    names = tuple(f"name-{number}" for number in range(1000))
    for assessment in (judge(patch_targets=names), judge(patch_regions=names)):
        detail = assessment.refused.detail if assessment.refused else ""
        assert "name-0, name-1" in detail
        assert "and 997 more" in detail
        assert len(detail) < 200


def test_patch_that_names_no_target_is_for_any() -> None:
    assert judge(patch_targets=()).refused is None


def test_other_region_is_refused() -> None:
    assessment = judge(patch_regions=("India",))
    assert refusal(assessment) == ("region", "gate.region")
    assert assessment.refused is not None
    assert assessment.refused.detail == "patch is for India, pricer runs in us-east-1"


def test_patch_without_a_region_fits_nowhere() -> None:
    assert refusal(judge(patch_regions=())) == ("region", "gate.region")


def test_lower_build_is_refused() -> None:
    assessment = judge(build=400)
    assert refusal(assessment) == ("build", "gate.build")
    assert assessment.refused is not None
    assert "400" in assessment.refused.detail
    assert "300" in assessment.refused.detail


def test_same_patch_again_is_a_success_that_does_nothing() -> None:
    assessment = judge(build=300, made_by=PATCH)
    assert assessment.refused is None
    assert assessment.already
    assert [gate.name for gate in assessment.gates] == GATES


def test_other_package_with_the_same_content_is_applied_already() -> None:
    assessment = judge(build=300, made_by="0" * 64, content_matches=True)
    assert assessment.already


def test_same_build_with_other_content_is_refused() -> None:
    assert refusal(judge(build=300, made_by="0" * 64)) == ("build", "gate.build_conflict")
    assert refusal(judge(build=300)) == ("build", "gate.build_conflict")


def test_matching_content_of_another_build_is_still_applied() -> None:
    """The build has to move even where no file does."""
    assessment = judge(build=290, content_matches=True)
    assert assessment.refused is None
    assert not assessment.already


def test_applied_patch_stays_a_success_when_it_could_not_be_applied_any_more() -> None:
    assessment = judge(
        build=300,
        made_by=PATCH,
        patch_requires=Requires(build_max=299),
        patch_expires=NOW - timedelta(days=1),
        allow=frozenset(),
        held="rolled back",
    )
    assert assessment.already


@pytest.mark.parametrize("keys", [{"name": "other"}, {"region": "India"}])
def test_applied_patch_is_refused_where_it_was_not_meant_for(keys: dict[str, Any]) -> None:
    assessment = judge(build=300, made_by=PATCH, **keys)
    assert assessment.refused is not None
    assert not assessment.already


def test_downgrade_needs_a_signature() -> None:
    assessment = judge(build=400, patch_downgrade=True)
    assert refusal(assessment) == ("build", "gate.build")
    assert assessment.refused is not None
    assert "signed" in assessment.refused.detail
    assert judge(build=400, patch_downgrade=True, signed=True).refused is None


def test_signature_alone_lowers_no_build() -> None:
    assert refusal(judge(build=400, signed=True)) == ("build", "gate.build")


@pytest.mark.parametrize(
    ("of_patch", "of_target", "ok"),
    [
        (300, None, True),
        (301, None, False),
        (None, 300, True),
        (None, 301, False),
        (250, 301, False),
        (301, 250, False),
    ],
)
def test_downgrade_stops_at_the_higher_floor(
    of_patch: int | None, of_target: int | None, *, ok: bool
) -> None:
    assessment = judge(
        build=400, patch_downgrade=True, patch_build_floor=of_patch, build_floor=of_target, signed=True
    )
    if ok:
        assert assessment.refused is None
    else:
        assert refusal(assessment) == ("build", "gate.floor")


def test_downgrade_flag_does_not_hinder_an_upgrade() -> None:
    assert judge(patch_downgrade=True, patch_build_floor=299).refused is None


@pytest.mark.parametrize(
    ("low", "high", "ok"),
    [
        (None, None, True),
        (290, None, True),
        (291, None, False),
        (None, 290, True),
        (None, 289, False),
        (290, 290, True),
        (280, 289, False),
        (291, 299, False),
    ],
)
def test_build_that_is_required_includes_its_bounds(low: int | None, high: int | None, *, ok: bool) -> None:
    assessment = judge(patch_requires=Requires(build_min=low, build_max=high))
    if ok:
        assert assessment.refused is None
    else:
        assert refusal(assessment) == ("requires", "gate.requires")


def test_patch_is_expired_from_the_moment_it_names() -> None:
    assert judge(patch_expires=NOW + timedelta(microseconds=1)).refused is None
    assert refusal(judge(patch_expires=NOW)) == ("expired", "gate.expired")


def test_kind_that_the_target_does_not_take_is_refused() -> None:
    assert refusal(judge(allow=frozenset({Kind.COLD}))) == ("kind", "gate.kind")
    assert refusal(judge(allow=frozenset())) == ("kind", "gate.kind")
    assert judge(patch_kind=Kind.COLD, allow=frozenset({Kind.COLD})).refused is None


def test_patch_on_hold_is_refused_with_the_reason() -> None:
    assessment = judge(held="rolled back on 2026-11-22: did not become ready")
    assert refusal(assessment) == ("held", "gate.held")
    assert assessment.refused is not None
    assert "did not become ready" in assessment.refused.detail


def test_every_closed_gate_is_reported_and_the_first_one_counts() -> None:
    assessment = judge(
        name="other",
        region="India",
        build=400,
        allow=frozenset(),
        held="x",
        patch_requires=Requires(build_max=1),
        patch_expires=NOW,
    )
    assert [gate.code for gate in assessment.gates] == [
        "gate.target",
        "gate.region",
        "gate.build",
        "gate.requires",
        "gate.expired",
        "gate.kind",
        "gate.held",
    ]
    assert refusal(assessment) == ("target", "gate.target")


BUILDS = st.integers(0, 5)


@given(
    patch=BUILDS,
    target=BUILDS,
    floors=st.tuples(st.none() | BUILDS, st.none() | BUILDS),
    downgrade=st.booleans(),
    signed=st.booleans(),
    same=st.booleans(),
)
def test_no_build_is_lowered_without_flag_signature_and_floor(
    patch: int,
    target: int,
    floors: tuple[int | None, int | None],
    *,
    downgrade: bool,
    signed: bool,
    same: bool,
) -> None:
    assessment = judge(
        patch_build=patch,
        patch_downgrade=downgrade,
        patch_build_floor=floors[0],
        build=target,
        build_floor=floors[1],
        content_matches=same,
        signed=signed,
    )
    if assessment.refused is None and patch < target:
        assert downgrade
        assert signed
        assert all(floor is None or patch >= floor for floor in floors)
    if patch > target:
        assert assessment.refused is None
    assert assessment.already == (patch == target and same)
