"""Which point a machine starts from: the newest that verifies, and which newer ones were passed over for what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from replica import history, lease
from replica.catalog import ProtectedVm
from replica.errors import FormatVersionError, IntegrityError, ObjectMissingError, UsageError
from replica.host import Host
from replica.model import Point
from replica.stores.store import Store
from replica.verify import verify
from replica.workers import Workers


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A newer point that was not chosen, and what is wrong with it."""

    point: int
    because: str


@dataclass(frozen=True, slots=True)
class Choice:
    """A point to start from; ``passed_over`` newest first."""

    point: Point
    passed_over: tuple[PassedOver, ...] = ()


def choose(
    store: Store, host: Host, found: ProtectedVm, number: int | None = None, *, workers: Workers | None = None
) -> Choice:
    """Return the point of that ``number``, or the newest one; in either case one that verifies (quick).

    Raises UsageError where there is none, IntegrityError where the one asked for, or every one, is damaged.
    """
    if number is not None:
        point = history.point(store, found.keys, number)
        wrong = _what_is_wrong(store, host, found, point, workers)
        if wrong is not None:
            raise IntegrityError(
                f"point {number} does not restore: {wrong}",
                key=found.keys.manifest(number),
                hint="leave --point out, to take the newest that does",
            )
        return Choice(point)
    passed: list[PassedOver] = []
    for one in _newest_first(store, found):
        wrong = one.because if isinstance(one, PassedOver) else _what_is_wrong(store, host, found, one, workers)
        if wrong is None:
            assert isinstance(one, Point)
            return Choice(one, tuple(passed))
        passed.append(PassedOver(one.point, wrong))
    if not passed:
        raise UsageError(
            f"{found.vm.name} has no recovery point yet", hint=f"'godwit replicate {found.vm.name}' makes the first"
        )
    raise IntegrityError(
        f"none of the {len(passed)} points of {found.vm.name} restores; the newest: {passed[0].because}",
        hint=f"'godwit verify {found.vm.name}' names all that is damaged, 'godwit repair' may mend it",
    )


def _newest_first(store: Store, found: ProtectedVm) -> Iterator[Point | PassedOver]:
    """Yield the points, those that cannot be read as what is wrong with them; later ones are not asked for ahead."""
    state, _ = lease.read(store, found.keys)
    number = history.newest_number(store, found.keys, state.point)
    while number > 0:
        try:
            one = history.read(store, found.keys, number)
        except ObjectMissingError:  # pruned
            pass
        except (IntegrityError, FormatVersionError) as error:
            yield PassedOver(number, f"its manifest cannot be read: {error.message}")
        else:
            if isinstance(one, Point):
                yield one
        number -= 1


def _what_is_wrong(store: Store, host: Host, found: ProtectedVm, point: Point, workers: Workers | None) -> str | None:
    report = verify(store, host, found, points=[point], workers=workers)
    damage = [one for verdict in report.verdicts for one in verdict.damage]
    if not damage:
        return None
    more = f", and {len(damage) - 1} more" if len(damage) > 1 else ""
    named = f"{damage[0].key}: " if damage[0].key else ""
    return f"{named}{damage[0].message}{more}"
