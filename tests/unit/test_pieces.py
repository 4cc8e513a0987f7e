"""Pieces of a disk worked on by threads: order, bounds, and what an error or a caller that leaves stops."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from vhdx.pieces import IN_FLIGHT, WORKERS, Buffers, worked


def test_results_come_in_the_order_of_the_pieces() -> None:
    second_done = threading.Event()

    def work(piece: int) -> int:
        if piece == 0:
            assert second_done.wait(30)  # so the first piece ends after the second
        elif piece == 1:
            second_done.set()
        return piece * 10

    assert list(worked(range(20), work)) == [piece * 10 for piece in range(20)]


def test_no_more_than_the_workers_run_at_a_time_and_each_has_its_own_buffers() -> None:
    buffers = Buffers(4, count=2)
    held: list[int] = []
    lock = threading.Lock()
    most = 0

    def work(_: int) -> None:
        nonlocal most
        taken = buffers.take()
        with lock:
            assert not {id(buffer) for buffer in taken} & set(held)
            held.extend(id(buffer) for buffer in taken)
            most = max(most, len(held))
        with lock:
            for buffer in taken:
                held.remove(id(buffer))
        buffers.give_back(taken)

    assert len(list(worked(range(200), work))) == 200
    assert most <= WORKERS * 2


def test_pieces_are_taken_only_as_they_are_needed() -> None:
    taken: list[int] = []

    def pieces() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    results = worked(pieces(), lambda piece: piece)
    assert next(results) == 0
    assert len(taken) <= IN_FLIGHT + 1
    results.close()  # type: ignore[attr-defined]
    assert len(taken) <= IN_FLIGHT + 1


def test_an_error_stops_what_has_not_begun() -> None:
    begun: list[int] = []

    def work(piece: int) -> int:
        begun.append(piece)
        if piece == 3:
            raise ValueError("broken")
        return piece

    results = worked(range(1000), work)
    with pytest.raises(ValueError, match="broken"):
        for _ in results:
            pass
    assert len(begun) <= 4 + IN_FLIGHT
