"""What is due when: compared with a dictionary that is sorted at each question."""

from __future__ import annotations

import random

from replica.daemon.agenda import Agenda


def test_an_agenda_is_a_dictionary_of_moments_of_which_the_earliest_is_taken() -> None:
    draw = random.Random(3)
    agenda: Agenda[int] = Agenda()
    model: dict[int, tuple[float, int]] = {}
    for step in range(4000):
        key, due = draw.randrange(30), float(draw.randrange(50))
        way = draw.random()
        if way < 0.5:
            agenda.set(key, due)
            model[key] = due, step
        elif way < 0.7:
            agenda.drop(key)
            model.pop(key, None)
        else:
            first = min(model, key=lambda one: model[one], default=None)
            wanted = None if first is None or model[first][0] > due else first
            assert agenda.take(due) == wanted
            if wanted is not None:
                del model[wanted]
        assert len(agenda) == len(model)
        assert agenda.next() == min((moment for moment, _ in model.values()), default=None)
        assert agenda.due(key) == (model[key][0] if key in model else None)


def test_what_is_put_down_again_and_again_takes_no_more_room() -> None:
    agenda: Agenda[str] = Agenda()
    agenda.set("first", 0.0)
    for number in range(10_000):
        agenda.set("later", 1e6 - number)  # never the earliest, so nothing is cleared away by asking
        assert agenda.next() == 0.0
    assert len(agenda._heap) <= 4 * len(agenda) + 65
    assert agenda.take(1e6) == "first"
    assert (agenda.due("later"), len(agenda)) == (1e6 - 9999, 1)
