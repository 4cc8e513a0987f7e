"""Whether a home disk still is what the base point recorded, and where it differs from the newest point."""

from __future__ import annotations

from dataclasses import dataclass

from replica.blockmap import BlockMap
from replica.errors import GodwitError
from replica.failback.difference import (
    WINDOW_BYTES,
    Dense,
    Difference,
    Gathered,
    Maps,
    dense_window,
    differing,
    windows_in_use,
)
from replica.failback.hashing import Hasher
from replica.model import DiskRecord
from replica.tracking import identity
from vhdx.disk import Disk, Extents
from vhdx.extents import EMPTY, total_length
from vhdx.vhdx import VhdxDisk


class HomeTouchedError(GodwitError):
    """A home disk holds what no recovery point has, and it was not allowed to overwrite that."""


@dataclass(frozen=True, slots=True)
class Base:
    """A disk as the last point has it that came from the home disks."""

    record: DiskRecord
    maps: Maps
    newest: Maps  # of the newest point, beside these


@dataclass(frozen=True, slots=True)
class Examined:
    """A home disk beside the newest point.

    ``difference`` is where the two differ; ``touched`` are the blocks in which the home disk is not what the base
    point holds; ``why`` says how that is known, ``compared`` whether all of it was read.
    """

    difference: Difference
    touched: Extents
    compared: bool
    why: str


@dataclass(frozen=True, slots=True)
class Touched:
    """What would be overwritten of a home disk although no point holds it. ``extents`` are bytes, whole blocks."""

    number: int
    name: str
    path: str
    extents: Extents
    why: str

    @property
    def bytes(self) -> int:
        """How much that is."""
        return total_length(self.extents)

    def error(self) -> HomeTouchedError:
        """Return what says that this was not allowed."""
        return HomeTouchedError(
            f"{self.bytes} bytes of it are not what the last point of this disk holds, from byte "
            f"{int(self.extents[0, 0])} on ({self.why}); failback would overwrite them",
            path=self.path,
            hint="look at what was written there and keep a copy of it, or allow the overwriting",
        )


def examine(home: Disk, base: Base | None, newest: BlockMap, record: DiskRecord, hasher: Hasher) -> Examined:
    """Compare a home disk with the newest point: by the maps alone where its file proves that it was not touched.

    ``record`` is the disk's in the newest point. Raises DiskError, IntegrityError, StoreError.
    """
    why = untouched_or_why(home, base)
    if base is not None and not why:
        found = differing(base.maps, base.newest, record.number, record.size)
        return Examined(found, EMPTY, compared=False, why="the file is as the base point recorded it")
    return _compared(home, base, newest, record, hasher, why)


def untouched_or_why(home: Disk, base: Base | None) -> str:
    """Return nothing where the file proves that the disk is what the base point holds, else why it does not."""
    if base is None:
        return "no point that came from it is kept"
    state = base.record.source.get("state")
    if not isinstance(home, VhdxDisk):
        return f"{home.format} files carry no identifier of their state"
    if not state:
        return "the last point of it was read while the machine ran"
    if home.size != base.record.size or identity(home).get("state") != state:
        return "the file or a parent of it was written to since its last point"
    return ""


def _compared(
    home: Disk, base: Base | None, newest: BlockMap, record: DiskRecord, hasher: Hasher, why: str
) -> Examined:
    """Read all that the home disk holds. Memory: three windows laid out densely, 3.5 MiB, and the result."""
    size = max(home.size, record.size)
    touched, data, zeros = Gathered(size), Gathered(record.size), Gathered(record.size)
    known = [newest] if base is None else [base.maps.all, newest]
    mapped = set(windows_in_use(known, record.number, size))
    held = hasher.windows(home, size)
    upcoming = next(held, None)
    for number in range(-(-size // WINDOW_BYTES)):
        if upcoming is not None and upcoming[0] == number:
            content = upcoming[1]
            upcoming = next(held, None)
        elif number in mapped:
            content = Dense.empty()
        else:
            continue
        after = dense_window(newest, record.number, number)
        unequal = after.differs(content)
        before = after if base is None else dense_window(base.maps.all, record.number, number)
        touched.add(number, content.differs(before))
        data.add(number, unequal & after.is_data)
        zeros.add(number, unequal & ~after.is_data)
    return Examined(Difference(data.extents(), zeros.extents()), touched.extents(), compared=True, why=why)
