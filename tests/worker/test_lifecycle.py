"""A worker's life follows one table of moves."""

from __future__ import annotations

import pytest

from orcd_jax.worker.lifecycle import MOVES, IllegalMove, Lifecycle, State


@pytest.mark.requirement("WORKER-4030")
def test_the_usual_life_is_legal_and_heard() -> None:
    heard: list[State] = []
    life = Lifecycle()
    life.subscribe(heard.append)
    path = [State.LOADING, State.READY, State.EXECUTING, State.READY, State.DRAINING, State.STOPPED]
    for state in path:
        life.move(state)
    assert heard == path


@pytest.mark.requirement("WORKER-4030")
@pytest.mark.parametrize(("start", "to"), [(s, t) for s in State for t in State if s is not t and t not in MOVES[s]])
def test_a_move_outside_the_table_raises_and_changes_nothing(start: State, to: State) -> None:
    life = Lifecycle()
    life._state = start
    with pytest.raises(IllegalMove, match=f"from {start} to {to}"):
        life.move(to)
    assert life.state is start


def test_moving_to_the_present_state_is_silent() -> None:
    heard: list[State] = []
    life = Lifecycle()
    life.subscribe(heard.append)
    life.move(State.STARTING)
    assert heard == []


@pytest.mark.requirement("WORKER-4231")
@pytest.mark.parametrize("state", list(State))
def test_jobs_are_accepted_only_when_ready_or_executing(state: State) -> None:
    life = Lifecycle()
    life._state = state
    assert life.serving is (state in (State.READY, State.EXECUTING))
