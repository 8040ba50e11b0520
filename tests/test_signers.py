"""Allowed signers: what is read, what is refused, and that `ssh-keygen -Y verify` reads the same."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
import ssh_kit
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from asyncsup.errors import AllowedSignersError
from asyncsup.patch.signers import Signer, matches, parse_allowed_signers
from asyncsup.patch.sshsig import encode_string

ALICE, BOB = "alice", "bob"
MESSAGE = b"the manifest"
_SIGNED: dict[str, bytes] = {}


def line(name: str = ALICE) -> str:
    return ssh_kit.key(name).line


def read(text: str | bytes, **more: Any) -> Signer:
    (found,) = parse_allowed_signers(text.encode() if isinstance(text, str) else text, **more)
    return found


def problem(text: str | bytes) -> str:
    with pytest.raises(AllowedSignersError) as caught:
        parse_allowed_signers(text.encode() if isinstance(text, str) else text, source="FILE")
    assert (caught.value.error_code, caught.value.exit_status) == ("trust.allowed_signers", 5)
    (found,) = caught.value.details["problems"]
    assert caught.value.message == f"FILE:{found['line']}: {found['problem']}"
    return str(found["problem"])


def signed(name: str) -> bytes:
    if name not in _SIGNED:
        _SIGNED[name] = ssh_kit.key(name).sign(MESSAGE)
    return _SIGNED[name]


def counts(signers: Sequence[Signer], name: str, identity: str, namespace: str, now: datetime) -> bool:
    """What a file says about somebody's signature, put as `ssh-keygen -Y verify` puts the question."""
    key = ssh_kit.key(name).public
    return any(
        signer.key == key
        and signer.speaks_for(identity)
        and signer.may_sign(namespace)
        and not signer.is_too_early(now)
        and not signer.is_too_late(now)
        for signer in signers
    )


# --- lines --------------------------------------------------------------------------------------------------


def test_a_line_has_principals_options_key_and_comment() -> None:
    text = (
        '# who may sign\n\n  \t\nalice@example.com,*@build.example.com namespaces="asyncsup-*,git",'
        f'valid-after="20260101Z",valid-before="20270101120000Z" {line()} her laptop, new\n'
    )
    signer = read(text)
    assert signer == Signer(
        principals="alice@example.com,*@build.example.com",
        key=ssh_kit.key(ALICE).public,
        namespaces="asyncsup-*,git",
        valid_after=int(datetime(2026, 1, 1, tzinfo=UTC).timestamp()),
        valid_before=int(datetime(2027, 1, 1, 12, tzinfo=UTC).timestamp()),
        comment="her laptop, new",
        line=4,
    )
    assert signer.speaks_for("ci@build.example.com")
    assert signer.may_sign("asyncsup-patch")
    assert not signer.may_sign("file")
    assert read(f"alice {line()}") == Signer(principals="alice", key=signer.key, line=1)


@pytest.mark.parametrize("kind", sorted(ssh_kit.KINDS))
def test_every_kind_of_key_is_read(kind: str) -> None:
    key = ssh_kit.key(kind=kind)
    assert read(f"alice {key.line} {key.comment}").key == key.public


@pytest.mark.parametrize(
    "text",
    [
        "alice {key}",
        "alice {key}\r\n",
        "\t alice \t  {key}   \n",
        'alice namespaces="asyncsup-patch"\t{key} comment # not a comment\n',
        'alice NameSpaces="asyncsup-patch",Valid-After="20200101" {key}\n',
        '"alice" {key}\n',
        'al"ice" {key}\n',
        'al"ice"{key}\n',
        '"alice,somebody else" {key}\n',
        'alice namespaces="say \\"hi\\",asyncsup-patch" {key}\n',
        'alice namespaces="\\x,asyncsup-patch" {key}\n',
        'alice namespaces="a b,asyncsup-patch" {key}\n',
        "!bob,a*e,carol {key}\n",
        "bob {other}\nalice {other}\n\n#alice nonsense\nalice {key}\n",
        'alice valid-before="20200101" {key}\nalice {key}\n',
        "\u00e4lice,alice {key} \u00fc\n",
        "\ufffd {other}\nalice {key}\n",
        "alice {key}\nalice {key}\n",
    ],
)
def test_a_form_that_is_accepted_means_the_same_to_ssh_keygen(text: str) -> None:
    text = text.replace("{key}", line()).replace("{other}", line(BOB))
    signers = parse_allowed_signers(text.encode())
    now = datetime.now(UTC)
    for identity in ("alice", "bob", "somebody else", "\u00e4lice"):
        expected = counts(signers, ALICE, identity, ssh_kit.NAMESPACE, now)
        assert ssh_kit.verifies(MESSAGE, signed(ALICE), text, identity=identity) == expected
        assert expected or identity != "alice"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("alice", "ends before the key"),
        ("alice ssh-ed25519", "ends before the key"),
        ('alice namespaces="x"', "ends before the key"),
        ('alice namespaces="x" ssh-ed25519', "ends before the key"),
        ("{key}", "who it belongs to comes first"),
        ("{key} alice", "who it belongs to comes first"),
        ("alice cert-authority {key}", "cert-authority is not supported"),
        ('alice namespaces="x",CERT-AUTHORITY {key}', "cert-authority is not supported"),
        ("alice no-touch-required {key}", "unknown option 'no-touch-required'"),
        ('alice valid-until="20300101" {key}', "unknown option 'valid-until'"),
        ("alice namespaces {key}", "needs a value in quotes"),
        ("alice namespaces=git {key}", "needs a value in quotes"),
        ("alice namespaces='git' {key}", "needs a value in quotes"),
        ('alice namespaces="git {key}', "needs a value in quotes"),
        ('alice namespaces="git\\" {key}', "needs a value in quotes"),
        ('alice namespaces="a",namespaces="b" {key}', "namespaces twice"),
        ('alice valid-after="20200101",valid-after="20200101" {key}', "valid-after twice"),
        ('alice namespaces="a"valid-after="20200101" {key}', "no comma and no space"),
        ('alice namespaces="a", {key}', "neither a key nor an option"),
        ('alice ,namespaces="a" {key}', "neither a key nor an option"),
        ('alice namespaces="a",,valid-after="20200101" {key}', "neither a key nor an option"),
        ('alice namespaces="a" namespaces="b" {key}', "the key is not valid base64"),
        ('alice valid-after="20260101",valid-before="20260101" {key}', "not after"),
        ('alice valid-after="20260102Z",valid-before="20260101Z" {key}', "not after"),
        ("alice ssh-ed25519 AAAA", "the key ends in the middle"),
        ("alice ssh-ed25519 {base64}A", "not valid base64"),
        ("alice ssh-ed25519 {base64},{base64}", "not valid base64"),
        ("alice ssh-rsa {base64}", "is said to be of type 'ssh-rsa' and is of type ssh-ed25519"),
        ("alice SSH-ED25519 {base64}", "is said to be of type 'SSH-ED25519'"),
        ("alice ssh-dss {dss}", "type 'ssh-dss', which is not supported"),
        ("!alice {key}", "speaks for nobody"),
        ("!alice,!* {key}", "speaks for nobody"),
        ("alice,!a* {key}", "speaks for nobody"),
        ("a*,!* {key}", "speaks for nobody"),
        ('"" {key}', "speaks for nobody"),
        (", {key}", "speaks for nobody"),
        ('"alice {key}', "quote that is not closed"),
        ("alice,{long} {key}", "more than 1022 bytes"),
        ('alice namespaces="{long}" {key}', "more than 1022 bytes"),
        ("alice\x00 {key}", "invisible"),
        ("alice {key} \x1b[2J", "invisible"),
        ("alice\x0b {key}", "invisible"),
        ("\ufeffalice {key}", "invisible"),
    ],
)  # fmt: skip
def test_a_line_that_is_not_understood_is_an_error(text: str, says: str) -> None:
    dss = base64.b64encode(encode_string(b"ssh-dss") + bytes(40)).decode()
    for name, value in {
        "{key}": line(), "{base64}": line().split()[1], "{dss}": dss, "{long}": "x" * 1023,
    }.items():  # fmt: skip
        text = text.replace(name, value)
    assert says in problem(text)
    # Also where other lines are good, and with the number of the line.
    with pytest.raises(AllowedSignersError, match=r"^allowed_signers:2: "):
        parse_allowed_signers(f"bob {line(BOB)}\n{text}\nbob {line(BOB)}\n".encode())


def test_text_that_is_not_utf8_is_an_error_outside_of_comments() -> None:
    assert "not UTF-8" in problem(b"al\xefce " + line().encode())
    assert read(b"# \xef\nalice " + line().encode()).line == 2


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(AllowedSignersError) as caught:
        parse_allowed_signers(f"alice\nbob {line(BOB)}\n\ncarol cert-authority {line()}\n".encode())
    assert [each["line"] for each in caught.value.details["problems"]] == [1, 4]
    assert len(caught.value.message.splitlines()) == 2


@given(st.binary(max_size=300))
@example(b"")
def test_garbage_is_only_ever_refused(content: bytes) -> None:
    try:
        parse_allowed_signers(content)
    except AllowedSignersError as error:
        assert error.details["problems"]


# --- names --------------------------------------------------------------------------------------------------

_TOKENS = st.sampled_from(["a", "b", "al", "alice", "@", ".", "*", "?", "**", "*.", "\u00e4"])
_PATTERN = st.lists(_TOKENS, min_size=1, max_size=5).map("".join)
_LIST = st.lists(st.tuples(st.booleans(), _PATTERN), min_size=1, max_size=4).map(
    lambda each: ",".join("!" * negated + pattern for negated, pattern in each)
)
_NAME = st.lists(st.sampled_from(["a", "b", "al", "alice", "@", ".", "\u00e4"]), min_size=1, max_size=5).map(
    "".join
)


@given(name=_NAME, pattern=_PATTERN)
def test_stars_and_question_marks_match_as_the_regular_expression_does(name: str, pattern: str) -> None:
    expression = re.escape(pattern.encode()).replace(rb"\*", b".*").replace(rb"\?", b".")
    assert matches(name, pattern) == bool(re.fullmatch(expression, name.encode(), re.DOTALL))


def test_a_pattern_full_of_stars_takes_no_time() -> None:
    began = time.perf_counter()
    assert not matches("a" * 2000, "*a" * 400 + "b")
    assert time.perf_counter() - began < 5


# --- times --------------------------------------------------------------------------------------------------

NEW_YORK = "EST5EDT,M3.2.0,M11.1.0"
MOMENTS = {
    # As written, the zone of the machine, and the moment that is meant.
    "20260701Z": ("UTC", "20260701000000Z"),
    "20260701z": (NEW_YORK, "20260701000000Z"),
    "20260701UTC": (NEW_YORK, "20260701000000Z"),
    "202607011530Z": (NEW_YORK, "20260701153000Z"),
    "20260701153045Z": (NEW_YORK, "20260701153045Z"),
    "20260701153045utc": (NEW_YORK, "20260701153045Z"),
    "20260101": (NEW_YORK, "20260101050000Z"),
    "202601011530": (NEW_YORK, "20260101203000Z"),
    "20260101153045": (NEW_YORK, "20260101203045Z"),
    "20260701": (NEW_YORK, "20260701050000Z"),
    "202611010130": (NEW_YORK, "20261101063000Z"),
    "202603080230": (NEW_YORK, "20260308073000Z"),
    "20240229235959": ("UTC", "20240229235959Z"),
}


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def change(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield change
    monkeypatch.undo()
    time.tzset()


def _moment(text: str) -> int:
    return int(datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp())


@pytest.mark.parametrize("text", MOMENTS)
def test_times_are_those_ssh_keygen_reads_to_the_second(zone: Callable[[str], None], text: str) -> None:
    name, meant = MOMENTS[text]
    zone(name)
    for option, inside in (("valid-after", (0, 1)), ("valid-before", (-1, 0))):
        allowed = f'alice {option}="{text}" {line()}\n'
        signer = read(allowed)
        assert _moment(meant) in {signer.valid_after, signer.valid_before}
        for seconds in (-1, 0, 1):
            now = datetime.fromtimestamp(_moment(meant) + seconds, UTC)
            ours = counts([signer], ALICE, ALICE, ssh_kit.NAMESPACE, now)
            theirs = ssh_kit.verifies(
                MESSAGE, signed(ALICE), allowed, identity=ALICE, at=f"{now:%Y%m%d%H%M%SZ}", zone=name
            )
            assert ours == theirs == (seconds in inside)


def test_a_fraction_of_the_last_second_still_counts() -> None:
    signer = read(f'alice valid-before="20260701Z" {line()}')
    last = datetime(2026, 7, 1, 0, 0, 0, 999_999, tzinfo=UTC)
    assert not signer.is_too_late(last)
    assert signer.is_too_late(datetime(2026, 7, 1, 0, 0, 1, tzinfo=UTC))


@pytest.mark.parametrize(
    "text",
    [
        "", "Z", "2026", "2026-07-01", "20260701T00Z", "2026070", "202607011", "2026070100", "20260701000",
        "2026070100000", "202607010000000", "20261301", "20260230", "20260700", "202607012400",
        "202607010060",
        "20260701000060", "19691231Z", "19700101Z", "00000101Z", "99999999Z", "20260701ZZ", "20260701 Z",
        " 20260701", "+20260701", "20260701+0100", "0x1234",
        "\uff12\uff10\uff12\uff16\uff10\uff17\uff10\uff11",
        "2026 1 1",
    ],
)  # fmt: skip
@pytest.mark.parametrize("option", ["valid-after", "valid-before"])
def test_what_is_no_time_is_an_error(text: str, option: str) -> None:
    assert f"{option}: " in problem(f'alice {option}="{text}" {line()}')


def test_a_time_that_the_machine_cannot_reckon_with_is_an_error() -> None:
    def overflows(_: object) -> float:
        raise OverflowError("mktime argument out of range")

    with pytest.raises(AllowedSignersError, match="no time 20260701"):
        parse_allowed_signers(f'alice valid-after="20260701" {line()}'.encode(), local_time=overflows)


# --- whole files, judged by both ----------------------------------------------------------------------------

_TIMES = ["20260101Z", "20260601Z", "202606011200Z", "20270101120000Z"]


@st.composite
def allowed_lines(draw: st.DrawFn) -> str:
    options = []
    if draw(st.booleans()):
        options.append(f'namespaces="{draw(st.sampled_from(_NAMESPACES))}"')
    after, before = sorted(draw(st.sets(st.sampled_from(_TIMES), min_size=2, max_size=2)), key=_TIMES.index)
    if draw(st.booleans()):
        options.append(f'valid-after="{after}"')
    if draw(st.booleans()):
        options.append(f'valid-before="{before}"')
    draw(st.randoms(use_true_random=False)).shuffle(options)
    principals = draw(st.one_of(st.sampled_from([ALICE, "*", f"{ALICE},{BOB}", f"*,!{BOB}"]), _LIST))
    words = [principals, ",".join(options), line(draw(st.sampled_from([ALICE, BOB])))]
    return draw(st.sampled_from([" ", "\t", "  "])).join(word for word in words if word)


_NAMESPACES = ["asyncsup-patch", "asyncsup-*", "git,asyncsup-patch", "*,!asyncsup-patch", "git", "*", ""]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    lines=st.lists(allowed_lines(), min_size=1, max_size=3),
    identities=st.lists(st.one_of(st.sampled_from([ALICE, BOB]), _NAME), min_size=2, max_size=3),
    at=st.sampled_from(["20251231235959Z", "20260101000000Z", "20260601000000Z", "20260601120001Z"]),
)
def test_what_a_file_allows_is_what_ssh_keygen_reads_in_it(
    lines: list[str], identities: list[str], at: str
) -> None:
    text = "\n".join(lines) + "\n"
    try:
        signers = parse_allowed_signers(text.encode())
    except AllowedSignersError as error:
        assert all("speaks for nobody" in each["problem"] for each in error.details["problems"])
        assume(False)
    now = datetime.fromtimestamp(_moment(at), UTC)
    for identity in identities:
        ours = counts(signers, ALICE, identity, ssh_kit.NAMESPACE, now)
        theirs = ssh_kit.verifies(MESSAGE, signed(ALICE), text, identity=identity, at=at)
        assert ours == theirs, (text, identity, at)
