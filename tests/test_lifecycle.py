"""The transition table, pair by pair."""

from __future__ import annotations

import itertools

import pytest

from asyncsup.errors import IllegalTransitionError
from asyncsup.lifecycle import ALIVE, READY, TRANSITIONS, Event, State, accepts, next_state

S, E = State, Event

# Written down a second time, as the sentences an operator would say; the table must agree with every one of
# them and have nothing else.
EXPECTED = {
    (S.STOPPED, E.START): S.STARTING,
    (S.STOPPED, E.WAIT): S.WAITING,
    (S.WAITING, E.START): S.STARTING,
    (S.WAITING, E.STOP): S.STOPPED,
    (S.STARTING, E.READY): S.RUNNING,
    (S.STARTING, E.STOP): S.STOPPING,
    (S.STARTING, E.ENDED): S.EXITED,
    (S.STARTING, E.CRASHED): S.BACKOFF,
    (S.STARTING, E.RESPAWN): S.STARTING,
    (S.STARTING, E.GAVE_UP): S.FAILED,
    (S.RUNNING, E.RELOAD): S.RELOADING,
    (S.RUNNING, E.STOP): S.STOPPING,
    (S.RUNNING, E.ENDED): S.EXITED,
    (S.RUNNING, E.CRASHED): S.BACKOFF,
    (S.RUNNING, E.RESPAWN): S.STARTING,
    (S.RUNNING, E.GAVE_UP): S.FAILED,
    (S.RELOADING, E.RELOADED): S.RUNNING,
    (S.RELOADING, E.STOP): S.STOPPING,
    (S.RELOADING, E.ENDED): S.EXITED,
    (S.RELOADING, E.CRASHED): S.BACKOFF,
    (S.RELOADING, E.RESPAWN): S.STARTING,
    (S.RELOADING, E.GAVE_UP): S.FAILED,
    (S.STOPPING, E.GONE): S.STOPPED,
    (S.BACKOFF, E.BACKOFF_ELAPSED): S.STARTING,
    (S.BACKOFF, E.START): S.STARTING,
    (S.BACKOFF, E.WAIT): S.WAITING,
    (S.BACKOFF, E.STOP): S.STOPPED,
    (S.EXITED, E.START): S.STARTING,
    (S.EXITED, E.WAIT): S.WAITING,
    (S.EXITED, E.STOP): S.STOPPED,
    (S.EXITED, E.GAVE_UP): S.FAILED,
    (S.FAILED, E.START): S.STARTING,
    (S.FAILED, E.WAIT): S.WAITING,
    (S.FAILED, E.STOP): S.STOPPED,
    (S.STARTING, E.LOST): S.LOST,
    (S.RUNNING, E.LOST): S.LOST,
    (S.RELOADING, E.LOST): S.LOST,
    (S.STOPPING, E.LOST): S.LOST,
    (S.LOST, E.START): S.STARTING,
    (S.LOST, E.WAIT): S.WAITING,
    (S.LOST, E.STOP): S.STOPPED,
    (S.LOST, E.ENDED): S.EXITED,
    (S.LOST, E.CRASHED): S.BACKOFF,
    (S.LOST, E.RESPAWN): S.STARTING,
    (S.LOST, E.GAVE_UP): S.FAILED,
}


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_every_pair_of_state_and_event(state: State, event: Event) -> None:
    expected = EXPECTED.get((state, event))
    assert accepts(state, event) is (expected is not None)
    if expected is not None:
        assert next_state(state, event) is expected
        return
    with pytest.raises(IllegalTransitionError) as caught:
        next_state(state, event)
    assert state.value in caught.value.message
    assert event.value in caught.value.message


def test_every_state_has_a_row_and_can_be_reached_and_left() -> None:
    assert set(TRANSITIONS) == set(State)
    reached = {after for cells in TRANSITIONS.values() for after in cells.values()}
    assert reached == set(State)
    assert all(TRANSITIONS.values())


def test_a_stop_is_possible_from_everywhere_but_where_it_is_done_or_under_way() -> None:
    assert {state for state in State if not accepts(state, Event.STOP)} == {S.STOPPED, S.STOPPING}


def test_what_is_ready_is_alive() -> None:
    assert READY < ALIVE
