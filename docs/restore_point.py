#!/usr/bin/env python3
# ruff: noqa: D103, T201, RET503
"""Restore a disk from a folder that holds a Godwit store, without Godwit: Python and the zstandard package suffice.

    restore_point.py FOLDER [VM]                     the VMs, or one, with their points and disks
    restore_point.py FOLDER VM POINT DISK TARGET     write that disk's bytes, a raw image, into the new file TARGET

FOLDER is the store, or a copy of it with objects as files under their keys; VM is a name or an id, DISK a number.
Section numbers are those of format.md. Checksums and block hashes are checked where the xxhash package is installed.
VMs that are encrypted (section 7) are not for this script: they need Godwit, and the key.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import zstandard

try:
    import xxhash
except ImportError:  # everything restores without it; what is damaged may then go unnoticed
    xxhash = None  # type: ignore[assignment]

BLOCK = 65536
ZERO = 0xFFFFFFFF
Place = tuple[str, int, int, int, bytes]  # segment (its key), offset, stored length, codec, hash


def check(holds: bool, message: str) -> None:
    if not holds:
        sys.exit(f"restore_point: {message}")


def read(store: Path, key: str) -> bytes:
    check((store / key).is_file(), f"{key}: the object is missing")
    return (store / key).read_bytes()


def same_hash(data: bytes, expected: bytes, seed: int = 0) -> bool:
    return xxhash is None or xxhash.xxh3_128_digest(data, seed=seed) == expected


def read_record(store: Path, key: str, kind: str) -> dict[str, Any]:
    """Return the body of a JSON object (section 2)."""
    try:
        outer = json.loads(read(store, key))
        body: dict[str, Any] = outer["body"]
        check(outer["suite"] == 0, f"{key}: encrypted, which this script does not read; use Godwit, with the key")
        check((outer["format"], outer["kind"]) == (1, kind), f"{key}: unknown format, or not a {kind} record")
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        check(same_hash(text.encode(), bytes.fromhex(outer["checksum"])), f"{key}: the checksum does not match")
    except (ValueError, LookupError, TypeError) as error:
        sys.exit(f"restore_point: {key}: not a Godwit record ({error!r})")
    return body


def part_key(vm: str, folder: str, point: int, epoch: int, ordinal: int) -> str:
    """Return the key of a segment or map part (section 1); ``vm`` is the prefix of the VM's keys."""
    return f"{vm}/{folder}/{point:020}/{epoch:010}-{ordinal:06}"


def planes(page: bytes, start: int, count: int, width: int) -> list[int]:
    """Return a column that is stored as byte planes (section 5)."""
    column = bytearray(count * width)
    for plane in range(width):
        column[plane::width] = page[start + plane * count : start + (plane + 1) * count]
    return list(struct.unpack(f"<{count}{'Q' if width == 8 else 'I'}", column))


def read_map_part(store: Path, vm: str, part: dict[str, Any], disk: int, places: dict[int, Place | None]) -> None:
    """Put what a map part says of the disk's blocks into ``places``, over what older maps said (section 5)."""
    key = part_key(vm, "maps", part["point"], part["epoch"], part["ordinal"])
    data = read(store, key)
    check(data[:8] == b"GWBLKMAP" and data[-8:] == b"GWMAPEND", f"{key}: not a map, or cut short")
    check(len(data) == part["size_bytes"], f"{key}: {len(data)} bytes, the manifest says {part['size_bytes']}")
    check(same_hash(data, bytes.fromhex(part["checksum"])), f"{key}: the checksum does not match")
    index, pages = struct.unpack_from("<QI", data, len(data) - 64)
    refs = [
        part_key(f"{vm.rsplit('/', 1)[0]}/{owner.hex()}", "segments", point, epoch, ordinal)
        for owner, point, epoch, ordinal, _ in struct.iter_unpack("<16sQIIQ", data[index + pages * 48 : -64])
    ]
    for first, last, offset, length, n, _ in struct.iter_unpack("<QQQII16s", data[index : index + pages * 48]):
        if last >> 48 < disk or first >> 48 > disk:
            continue
        page = zstandard.ZstdDecompressor().decompress(data[offset : offset + length])
        block_key, end, hashes = first, 0, iter(range(21 * n, len(page), 16))
        columns = [planes(page, 0, n, 8), *(planes(page, at * n, n, 4) for at in (8, 12, 16)), page[20 * n : 21 * n]]
        for step, segment, gap, stored, codec in zip(*columns, strict=True):
            block_key, start = block_key + step, (end + gap) % 2**32
            end = start + stored
            at = 0 if segment == ZERO else next(hashes)
            if block_key >> 48 == disk:
                place = None if segment == ZERO else (refs[segment], start, stored, codec, page[at : at + 16])
                places[block_key & (1 << 48) - 1] = place
        check(block_key == last, f"{key}: a page does not end with the key that the index says")


def restore(store: Path, vm: str, point: int, disk_number: int, target: Path) -> None:
    seed = int(read_record(store, f"{vm}/vm.json", "vm")["hash_seed"])
    manifest = read_record(store, f"{vm}/manifests/{point:020}.json", "manifest")
    check(manifest["type"] == "point", f"number {point} is a fence, not a recovery point")
    disks = {disk["number"]: disk for disk in manifest["disks"]}
    check(disk_number in disks, f"point {point} has no disk {disk_number}; it has {', '.join(map(str, disks))}")
    places: dict[int, Place | None] = {}
    for one in manifest["maps"]:  # oldest first: a newer entry replaces an older one
        for part in one["parts"]:
            read_map_part(store, vm, part, disk_number, places)
    size, data_blocks = disks[disk_number]["size_bytes"], disks[disk_number]["data_blocks"]
    found = sorted((place, block) for block, place in places.items() if place is not None)
    check(len(found) == data_blocks, f"the maps have {len(found)} blocks of data, the manifest says {data_blocks}")
    with target.open("xb") as file:
        file.truncate(size)
        key, segment = "", b""
        for (ref, start, stored, codec, digest), block in found:
            if ref != key:
                key, segment = ref, read(store, ref)
                check(segment[:8] == b"GWSEGMNT" and segment[-8:] == b"GWSEGEND", f"{key}: not a segment, or cut short")
            frame = segment[start : start + stored]
            data = zstandard.ZstdDecompressor().decompress(frame) if codec == 1 else frame
            good = len(data) == BLOCK and same_hash(data, digest, seed)
            check(good, f"{key}: block {block} is damaged; {target} is not whole")
            file.seek(block * BLOCK)
            file.write(data[: size - block * BLOCK])
    print(f"{target}: {size} bytes, {len(found)} blocks of data{'' if xxhash else ', hashes not checked: no xxhash'}")


def main(arguments: list[str]) -> None:
    check(len(arguments) in (1, 2, 5), f"how to call it:\n{__doc__}")
    store = Path(arguments[0])
    check((store / "godwit.json").is_file(), f"{store} holds no Godwit store: it has no godwit.json")
    vms = {}
    for path in sorted(store.glob("tenants/*/names/*.json")):
        vm_id = read_record(store, path.relative_to(store).as_posix(), "name")["vm_id"]
        if len(arguments) == 1 or arguments[1] in (unquote(path.stem), vm_id):
            vms[f"tenants/{path.parts[-3]}/vms/{vm_id}"] = unquote(path.stem)
    check(len(arguments) == 1 or len(vms) == 1, f"{len(vms)} VMs have that name; give the id of one")
    for vm, name in vms.items():
        if len(arguments) == 5:
            check(arguments[2].isdigit() and arguments[3].isdigit(), "POINT and DISK are numbers")
            return restore(store, vm, int(arguments[2]), int(arguments[3]), Path(arguments[4]))
        print(ascii(f"{name} ({vm.rsplit('/', 1)[1]})")[1:-1])
        for path in sorted((store / vm / "manifests").glob("*.json")):
            body = read_record(store, path.relative_to(store).as_posix(), "manifest")
            disks = ", ".join(
                f"disk {d['number']} ({d['name']}, {d['size_bytes']} bytes)" for d in body.get("disks", ())
            )
            if body["type"] == "point":
                print(ascii(f"  point {body['point']}  {body['created_at']}  {disks}")[1:-1])


if __name__ == "__main__":
    main(sys.argv[1:])
