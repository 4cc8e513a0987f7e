"""Clones of a template that are seeded from it: what they store, what their points need, and what happens to it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest

from replica import catalog, garbage, history, holds, protection, prune, retention, seeding, verify
from replica.block import KeyArray
from replica.blockmap import Window
from replica.errors import UsageError
from replica.seeding import SeedPoint
from replica.stores.memory import MemoryStore
from replica.stores.store import Store
from replica.vault import vault_of
from tests.support.encryption import encrypted_lab, sealed
from tests.support.engine import BLOCK, WORKERS, FakeClock, Lab, make_host, make_lab, random_blocks
from tests.support.store_doubles import RecordingStore

BLOCKS = 96
OWN = 5  # blocks that each clone has for itself
CLONES = 10
LAST = retention.parse("last:1")


@pytest.fixture(autouse=True)
def _merged_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replica.blockmap.MERGE_MAPS", 3)


def _clone(template: Lab, name: str, own: dict[int, bytes], *, seed_from: str = "template", disks: int = 1) -> Lab:
    """Return a copy of the template with other bytes in some blocks, seeded from it."""
    folder = template.folder.parent / name
    folder.mkdir()
    paths = tuple(folder / f"disk{number}.img" for number in range(disks))
    for number, path in enumerate(paths):
        path.write_bytes(template.contents()[number])
    host = make_host(folder / "state", name=name, clock=_clock(template))
    vault = vault_of(template.store)
    encrypted = vault is not None and vault.is_encrypted(template.found.keys)
    found, _ = protection.protect(
        template.store,
        host,
        tenant="default",
        name=name,
        disks=paths,
        seed_from=seed_from,
        vault=vault if encrypted else None,
    )
    lab = Lab(folder, template.store, host, found, paths)
    for block, data in own.items():
        lab.patch(block * BLOCK, data)
    return lab


def _clock(lab: Lab) -> FakeClock:
    assert isinstance(lab.host.clock, FakeClock)
    return lab.host.clock


def _own(number: int) -> dict[int, bytes]:
    return {(number * 7 + at * 11) % BLOCKS: random_blocks(1000 + number * 10 + at, 1) for at in range(OWN)}


def _stored_bytes(store: Store) -> int:
    return sum(info.size for info in store.list("tenants/"))


def _collect(store: Store, labs: Sequence[Lab]) -> None:
    """Prune each VM to its newest point, and collect twice without any grace."""
    for lab in labs:
        prune.prune(store, lab.host, lab.found, rule=LAST)
    for _ in range(2):
        for lab in labs:
            references = garbage.survey(store, "default", workers=WORKERS)
            garbage.collect(store, lab.host, lab.found, references, grace=timedelta(0), workers=WORKERS)


def _points(lab: Lab) -> list[int]:
    return [one.point for one in history.points(lab.store, lab.found.keys) if not isinstance(one, Exception)]


def _template(folder: Path, *, encrypted: bool = False, store: Store | None = None) -> Lab:
    inner = store or MemoryStore("lab")
    disk = [random_blocks(1, BLOCKS) + bytes(4 * BLOCK) + b"tail" * 128]
    if encrypted:
        lab = encrypted_lab(folder / "template", disk, inner, name="template")
    else:
        lab = make_lab(folder / "template", disk, store=inner, name="template")
    lab.replicate()
    return lab


@pytest.mark.parametrize("encrypted", [False, True], ids=["clear", "encrypted"])
def test_ten_clones_cost_little_more_than_one_and_outlive_their_template(tmp_path: Path, encrypted: bool) -> None:
    template = _template(tmp_path, encrypted=encrypted)
    store = template.store
    alone = _stored_bytes(store)
    clones = []
    for number in range(CLONES):
        clone = _clone(template, f"clone-{number}", _own(number))
        point = clone.replicate()
        assert point.cycle.reused_blocks == BLOCKS + 1 - OWN
        clones.append(clone)
    together = _stored_bytes(store)
    own_bytes = CLONES * OWN * BLOCK
    print(f"template {alone} bytes; with {CLONES} clones {together}, {own_bytes} of them blocks of their own")
    assert together - alone < own_bytes + CLONES * 24_000
    assert together < 2 * alone
    assert list(holds.holds(store, template.found.keys)) == []

    # The template goes on and loses every point that the clones were seeded from.
    for turn in range(4):
        _clock(template).advance(3600)
        template.write(random_blocks(500 + turn, BLOCKS))
        template.replicate()
    _collect(store, [template, *clones])
    assert _points(template) == [5]
    for clone in clones:
        clone.assert_restores(1)
        clone.patch(3 * BLOCK, random_blocks(9000, 1))
        assert clone.replicate().cycle.changed_blocks == 1
        clone.assert_restores(1, 2)
        found = catalog.find(store, "default", clone.found.vm.name)
        assert not verify.verify(store, make_host(), found, full=True, workers=WORKERS).damaged
    template.assert_restores(5)
    # Read by a process that knows nothing but the store and the secret.
    if encrypted:
        assert isinstance(store, type(sealed(MemoryStore("none"))))
        fresh = sealed(store.inner)
        again = Lab(clones[0].folder, fresh, make_host(name="fresh"), clones[0].found, clones[0].paths)
        again.published = {1: clones[0].published[1]}
        again.assert_restores(1)


def test_the_seed_s_point_is_held_until_the_clone_has_one(tmp_path: Path) -> None:
    template = _template(tmp_path)
    clone = _clone(template, "clone", _own(1))
    late = _clone(template, "late", _own(2))
    for turn in range(3):
        template.write(random_blocks(700 + turn, BLOCKS))
        template.replicate()
    assert 1 in prune.prune(template.store, template.host, template.found, rule=LAST).pinned
    assert clone.replicate().cycle.reused_blocks == BLOCKS + 1 - OWN
    assert [one.holder for one in holds.holds(template.store, template.found.keys)] == [late.found.keys]
    _collect(template.store, [template])
    assert late.replicate().cycle.reused_blocks == BLOCKS + 1 - OWN
    _collect(template.store, [template])
    assert _points(template) == [4]
    for lab in (clone, late):
        lab.assert_restores(1)


def test_holds_that_nobody_released_are_swept(tmp_path: Path) -> None:
    template = _template(tmp_path)
    clone = _clone(template, "clone", {})
    with mock.patch.object(holds, "release"):  # whose credentials may not delete
        clone.replicate()
    keys = template.found.keys
    never_made = type(keys)("default", "f" * 32)
    assert holds.hold(template.store, template.host, keys, 1, never_made)
    template.write(random_blocks(3, BLOCKS))
    template.replicate()
    prune.prune(template.store, template.host, template.found, rule=LAST)
    assert [one.holder for one in holds.holds(template.store, keys)] == [never_made]
    _clock(template).advance(25 * 3600)
    assert [one.point for one in prune.prune(template.store, template.host, template.found, rule=LAST).removed] == [1]
    assert list(holds.holds(template.store, keys)) == []


def test_a_seed_that_is_gone_costs_room_and_nothing_else(tmp_path: Path) -> None:
    template = _template(tmp_path)
    clone = _clone(template, "clone", {})
    template.store.delete(template.found.keys.manifest(1))
    assert clone.replicate().cycle.reused_blocks == 0
    clone.assert_restores(1)
    assert list(holds.holds(template.store, template.found.keys)) == []


def test_what_is_damaged_in_the_seed_is_stored_anew(tmp_path: Path) -> None:
    store = MemoryStore("lab")
    template = _template(tmp_path, store=store)
    clone = _clone(template, "clone", {})
    segment = next(info.key for info in store.list(template.found.keys.segments))
    data = bytearray(store.get(segment))
    data[2000] ^= 1
    store.delete(segment)
    store.create(segment, bytes(data))
    point = clone.replicate()
    assert 0 < point.cycle.reused_blocks < BLOCKS + 1
    clone.assert_restores(1)


def test_blocks_that_only_their_hashes_make_equal_are_told_apart(tmp_path: Path) -> None:
    template = _template(tmp_path)
    clone = _clone(template, "clone", _own(1))

    def all_of_them(
        _: SeedPoint, data: memoryview, picked: npt.NDArray[np.intp], keys: KeyArray, window: Window
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Take every block that the point has for a likely one, as if all hashes collided."""
        rows = np.minimum(np.searchsorted(window.entries.keys, keys), len(window.entries) - 1)
        there = np.flatnonzero((window.entries.keys[rows] == keys) & window.entries.is_data[rows])
        return there, rows[there]

    with mock.patch.object(SeedPoint, "_candidates", all_of_them):
        point = clone.replicate()
    assert point.cycle.reused_blocks == BLOCKS + 1 - OWN
    clone.assert_restores(1)


def test_what_differs_is_not_read_from_the_seed(tmp_path: Path) -> None:
    template = _template(tmp_path)
    clone = _clone(template, "clone", {})
    clone.write(random_blocks(77, BLOCKS))
    recording = RecordingStore(template.store)
    point = clone.replicate(store=recording)
    assert point.cycle.reused_blocks == 0
    assert [one for one in recording.requests if one.kind == "get" and "/segments/" in one.key] == []


def test_seeds_are_named_by_vm_and_point(tmp_path: Path) -> None:
    template = _template(tmp_path)
    template.patch(0, random_blocks(5, 1))
    template.replicate()
    store = template.store
    assert seeding.choose(store, "default", "template", encrypted=False).point == 2
    assert seeding.choose(store, "default", "template@1", encrypted=False).point == 1
    odd = make_lab(tmp_path / "odd", [random_blocks(1, 2)], store=store, host=make_host(name="odd"), name="odd@7")
    with pytest.raises(UsageError, match="no recovery point yet"):
        seeding.choose(store, "default", "odd@7", encrypted=False)
    odd.replicate()
    assert seeding.choose(store, "default", "odd@7", encrypted=False).vm_id == odd.found.keys.vm_id
    for wrong in ("nobody", "template@9", "nobody@1", "template@x"):
        with pytest.raises(UsageError):
            seeding.choose(store, "default", wrong, encrypted=False)
    with pytest.raises(UsageError, match="cannot share blocks"):
        seeding.choose(store, "default", "template", encrypted=True)


def test_an_encrypted_seed_does_not_serve_a_vm_that_is_not(tmp_path: Path) -> None:
    template = _template(tmp_path, encrypted=True)
    with pytest.raises(UsageError, match="cannot share blocks"):
        seeding.choose(template.store, "default", "template", encrypted=False)
    assert seeding.choose(template.store, "default", "template", encrypted=True).point == 1
