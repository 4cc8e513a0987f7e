"""Map parts in the store and in the local cache: fetched by reference and checked, written as they are finished."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Final

import xxhash

from replica.blockmap import BlockMap, level_for, merge_into, plan_merge
from replica.errors import IntegrityError, ObjectMissingError
from replica.host import Host
from replica.keys import VmKeys
from replica.maptable import EncodedPart, Entries, MapPart, MapWriter, SegmentTable
from replica.model import MapPartRef, MapRef
from replica.stores.store import Store

REPAIR_HINT: Final = "'godwit verify' tells what that costs, and 'godwit repair' puts right what can be"


class MapStore:
    """One VM's map parts. The cache folder (None for no cache) holds whole objects by key; it may be deleted."""

    def __init__(self, store: Store, keys: VmKeys, cache_folder: Path | None) -> None:
        self._store = store
        self._keys = keys
        self._cache = cache_folder

    def fetch(self, ref: MapPartRef) -> MapPart:
        """Return a part. Raises IntegrityError where it is missing or not what the manifest says."""
        key = self._keys.map_part(ref.part)
        data = self.cached(ref)
        if data is None:
            try:
                data = self._store.get(key)
            except ObjectMissingError as error:
                raise IntegrityError(
                    "a map that a recovery point needs is missing", key=key, hint=REPAIR_HINT
                ) from error
            if xxhash.xxh3_128_hexdigest(data) != ref.checksum:
                raise IntegrityError(
                    "the map's checksum does not match the manifest: it is damaged", key=key, hint=REPAIR_HINT
                )
            self._keep(key, data)
        part = MapPart(data, key=key, vm_id=self._keys.vm_id, part=ref.part)
        if part.entries != ref.entries:
            raise IntegrityError("the map has another number of entries than the manifest says", key=key)
        return part

    def write(self, made: EncodedPart) -> None:
        """Put a finished part into the store."""
        key = self._keys.map_part(made.part)
        self._store.create(key, made.data)
        self._keep(key, made.data)

    def cached(self, ref: MapPartRef) -> bytes | None:
        """Return the cached object if it is whole; the checksum decides, so a damaged cache only costs a request."""
        if self._cache is None:
            return None
        try:
            data = (self._cache / self._keys.map_part(ref.part)).read_bytes()
        except OSError:
            return None
        return data if xxhash.xxh3_128_hexdigest(data) == ref.checksum else None

    def _keep(self, key: str, data: bytes) -> None:
        if self._cache is None:
            return
        path = self._cache / key
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with contextlib.suppress(OSError):  # the cache is a convenience: a full disk must not fail a cycle
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            temporary.replace(path)

    def forget_all_but(self, refs: Iterable[MapPartRef]) -> None:
        """Drop cached parts that no longer are in use."""
        if self._cache is None:
            return
        wanted = {self._cache / self._keys.map_part(ref.part) for ref in refs}
        with contextlib.suppress(OSError):
            for path in (self._cache / self._keys.prefix / "maps").glob("*/*"):
                if path not in wanted:
                    path.unlink()
                    with contextlib.suppress(OSError):
                        path.parent.rmdir()


class MapBuilder:
    """Builds the maps of a new point: collects the cycle's entries, merges them with older maps by level, writes.

    The first part stays in memory until there is a second, so that a small change costs one object, merged or not.
    ``before_write`` returns once all that entries refer to is stored: it is called before each write. ``disks`` are the
    numbers of the new point's disks: entries of disks that it no longer has go whenever maps are merged.
    """

    def __init__(
        self,
        maps: MapStore,
        vm_id: str,
        point: int,
        epoch: int,
        before: tuple[MapRef, ...],
        *,
        disks: Collection[int],
        before_write: Callable[[], None],
    ) -> None:
        self._disks = disks
        self._before_write = before_write
        self._maps = maps
        self._vm_id = vm_id
        self._point = point
        self._epoch = epoch
        self._before = before
        self._writer = MapWriter(vm_id, point, epoch)
        self._held: EncodedPart | None = None
        self._parts: list[MapPartRef] = []

    def append(self, entries: Entries, table: SegmentTable) -> None:
        """Add entries, ascending by key, that follow all before."""
        for part in self._writer.append(entries, table):
            self._add(part)

    def _add(self, part: EncodedPart) -> None:
        if self._parts:
            if self._held is not None:
                self._write(self._held)
                self._held = None
            self._write(part)
        else:
            self._held = part
        self._parts.append(_reference(part))

    def finish(self) -> tuple[MapRef, ...]:
        """Write what is to be written and return the new point's maps, oldest first."""
        for part in self._writer.finish():
            self._add(part)
        if not self._parts:
            return self._before
        own = MapRef(level_for(sum(ref.entries for ref in self._parts)), tuple(self._parts))
        kept, level = plan_merge([one.level for one in self._before], own.level)
        if kept == len(self._before):
            if self._held is not None:
                self._write(self._held)
            return (*self._before, own)
        merged = BlockMap([*self._before[kept:], own], self._fetch)
        writer = MapWriter(self._vm_id, self._point, self._epoch, first_ordinal=len(self._parts))
        refs = []
        for part in merge_into(writer, merged, keep_zeros=kept > 0, disks=self._disks):
            self._write(part)
            refs.append(_reference(part))
        return (*self._before[:kept], MapRef(level, tuple(refs))) if refs else self._before[:kept]

    def _write(self, part: EncodedPart) -> None:
        self._before_write()
        self._maps.write(part)

    def _fetch(self, ref: MapPartRef) -> MapPart:
        held = self._held
        if held is not None and held.part == ref.part:
            return MapPart(held.data, key=f"map part {ref.part}", vm_id=self._vm_id, part=ref.part)
        return self._maps.fetch(ref)


def _reference(made: EncodedPart) -> MapPartRef:
    return MapPartRef(made.part, made.entries, made.first_key, made.last_key, len(made.data), made.checksum)


def map_cache(host: Host) -> Path | None:
    """Return where this machine keeps copies of maps, or None where it keeps nothing."""
    return host.state_folder / "cache" if host.state_folder else None
