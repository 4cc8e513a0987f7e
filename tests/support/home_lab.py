"""A VM that was failed over and replicated from elsewhere: home disks in one folder, recovery disks in another."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from replica import catalog, cycle, protection
from replica.catalog import ProtectedVm
from replica.failback.examination import Touched
from replica.failback.home import Homecoming, HomeDisk, bring_home
from replica.host import Host
from replica.model import Point
from replica.stores.memory import MemoryStore
from replica.stores.store import Store
from replica.vault import Vault
from tests.support.engine import BLOCK, WORKERS, make_host
from vhdx.create import create_disk
from vhdx.disk import Disk
from vhdx.formats import open_disk
from vhdx.target import create_target

MIB = 1 << 20


def write_disk(path: Path, data: bytes, kind: str) -> None:
    """Make a disk image of ``data``; blocks of zeros are left out."""
    if kind == "raw":
        path.write_bytes(data)
        return
    if kind in ("vhd", "vhd-dynamic"):
        with create_target(path, kind, len(data)) as target:  # type: ignore[arg-type]
            _fill(target, data)
            target.commit()
        return
    create_disk(path, size=len(data), kind="fixed" if kind == "vhdx-fixed" else "dynamic", block_size=MIB)
    patch_disk(path, 0, data)


def patch_disk(path: Path, offset: int, data: bytes) -> None:
    """Write into a disk image as a guest would."""
    with open_disk(path, writable=True) as disk:
        _fill(disk, data, offset)


def _fill(disk: object, data: bytes, offset: int = 0) -> None:
    for at in range(0, len(data), BLOCK):
        piece = data[at : at + BLOCK]
        if piece.count(0) != len(piece):
            disk.write_at(offset + at, piece)  # type: ignore[attr-defined]


def read_disk(path: Path) -> bytes:
    """Return all that a disk image holds."""
    with open_disk(path) as disk:
        return whole(disk)


def whole(disk: Disk) -> bytes:
    return disk.read_at(0, disk.size)


def changed(data: bytes, seed: int, *, writes: int = 6, size: int | None = None) -> bytes:
    """Return what a guest makes of a disk: writes of any place and length, some blocks zeroed."""
    chance = random.Random(seed)
    content = bytearray(data[: size or len(data)] + bytes(max(0, (size or 0) - len(data))))
    for _ in range(writes):
        length = chance.choice((512, 4096, BLOCK, 3 * BLOCK + 512))
        offset = chance.randrange(0, len(content) - length) // 512 * 512
        content[offset : offset + length] = chance.randbytes(length)
    start = chance.randrange(0, len(content) // BLOCK - 4) * BLOCK
    content[start : start + 3 * BLOCK] = bytes(3 * BLOCK)
    return bytes(content)


@dataclass(slots=True)
class HomeLab:
    """``homes`` are the home disks, as they were in ``base``; ``wanted`` is what ``newest`` holds."""

    folder: Path
    store: Store
    host: Host
    found: ProtectedVm
    homes: tuple[Path, ...]
    base: Point
    newest: Point
    wanted: tuple[bytes, ...]
    asked: list[Touched] = field(default_factory=list)

    def disks(self) -> list[HomeDisk]:
        return [HomeDisk(number, path) for number, path in enumerate(self.homes)]

    def bring(self, *, allow: bool = False, store: Store | None = None, **options: object) -> Homecoming:
        """Bring it home; what it asks about is kept in ``asked``."""

        def asked(touched: Touched) -> bool:
            self.asked.append(touched)
            return allow

        options = {"base": self.base, "newest": self.newest, "homes": self.disks(), **options}
        return bring_home(
            store or self.store,
            self.host,
            self.found,
            may_overwrite=asked,
            workers=WORKERS,
            **options,  # type: ignore[arg-type]
        )

    def names(self) -> list[str]:
        """Return the names of all files beside the home disks."""
        return sorted(path.name for path in self.homes[0].parent.iterdir())

    def is_home(self) -> bool:
        """Whether nothing is left to do."""
        held = all(read_disk(path) == data for path, data in zip(self.homes, self.wanted, strict=True))
        return held and self.names() == sorted(path.name for path in self.homes)

    def assert_home(self) -> None:
        """Compare the home disks with what they are to hold, and look for leftovers."""
        for path, data in zip(self.homes, self.wanted, strict=True):
            assert read_disk(path) == data, path
        assert self.names() == sorted(path.name for path in self.homes)


def make_home_lab(
    folder: Path,
    contents: Sequence[bytes],
    wanted: Sequence[bytes],
    *,
    kind: str = "vhdx",
    store: Store | None = None,
    vault: Vault | None = None,
    host: Host | None = None,
) -> HomeLab:
    """Protect disks of ``contents`` in ``folder/home``, replicate them, and then ``wanted`` from elsewhere."""
    home, away = folder / "home", folder / "away"
    home.mkdir(parents=True)
    away.mkdir()
    suffix = {"raw": "img", "vhd-dynamic": "vhd", "vhdx-fixed": "vhdx"}.get(kind, kind)
    homes = tuple(home / f"disk{number}.{suffix}" for number in range(len(contents)))
    for path, data in zip(homes, contents, strict=True):
        write_disk(path, data, kind)
    made: Store = MemoryStore("home") if store is None else store
    host = host or make_host(folder / "state")
    catalog.init_store(made, host)
    found, _ = protection.protect(made, host, tenant="default", name="web", disks=homes, vault=vault)
    base = cycle.replicate(made, host, found, workers=WORKERS)
    newest = base
    if tuple(wanted) != tuple(contents):
        sources = []
        for one, data in zip(catalog.settings_in_force(made, found).sources, wanted, strict=True):
            path = away / f"disk{one.number}.img"
            path.write_bytes(data)
            sources.append(replace(one, path=str(path)))
        catalog.update_settings(made, host, found, sources=tuple(sources))
        newest = cycle.replicate(made, host, found, workers=WORKERS)
    return HomeLab(folder, made, host, found, homes, base, newest, tuple(wanted))
