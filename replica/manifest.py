"""Manifests: the create-only objects that make recovery points exist (docs/format.md, section 6). Encode and decode."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from replica import record
from replica.block import LARGEST_DISK_BYTES, LARGEST_DISK_NUMBER, Digest, block_count
from replica.errors import IntegrityError
from replica.generation import convertibility
from replica.generation.convertibility import Convertibility
from replica.keys import LARGEST_EPOCH, LARGEST_ORDINAL, PartId
from replica.model import (
    Consistency,
    CycleStatistics,
    DiskRecord,
    Fence,
    Machine,
    MapPartRef,
    MapRef,
    Nic,
    Point,
)
from replica.record import Fields

KIND = "manifest"


def encode(manifest: Point | Fence) -> bytes:
    """Return the object of a point or a fence."""
    if isinstance(manifest, Fence):
        return record.encode(
            KIND,
            {
                "type": "fence",
                "vm_id": manifest.vm_id,
                "point": manifest.point,
                "epoch": manifest.epoch,
                "published_at": record.time_text(manifest.published_at),
            },
        )
    return record.encode(
        KIND,
        {
            "type": "point",
            "vm_id": manifest.vm_id,
            "vm_name": manifest.vm_name,
            "point": manifest.point,
            "epoch": manifest.epoch,
            "previous": manifest.previous,
            "created_at": record.time_text(manifest.created_at),
            "published_at": record.time_text(manifest.published_at),
            "consistency": manifest.consistency.value,
            "machine": encode_machine(manifest.machine),
            "disks": [_encode_disk(disk) for disk in manifest.disks],
            "maps": [_encode_map(one) for one in manifest.maps],
            "cycle": {
                "read_bytes": manifest.cycle.read_bytes,
                "changed_blocks": manifest.cycle.changed_blocks,
                "zero_blocks": manifest.cycle.zero_blocks,
                "reused_blocks": manifest.cycle.reused_blocks,
                "stored_bytes": manifest.cycle.stored_bytes,
                "segments": manifest.cycle.segments,
                "seconds": round(manifest.cycle.seconds, 3),
            },
            **({"repeats": manifest.repeats} if manifest.repeats else {}),
            **({"convertibility": convertibility.encode(manifest.convertibility)} if manifest.convertibility else {}),
        },
    )


def decode(data: bytes, *, key: str, vm_id: str, point: int) -> Point | Fence:
    """Decode the manifest that should be of ``vm_id`` and ``point``. Raises IntegrityError, FormatVersionError."""
    body = record.decode(KIND, data, key=key)
    number = body.integer("point", least=1)
    if (body.text("vm_id"), number) != (vm_id, point):
        raise IntegrityError("the manifest is another one than its key says: objects were mixed up", key=key)
    epoch = body.integer("epoch", least=1, most=LARGEST_EPOCH)
    if body.text("type") == "fence":
        return Fence(vm_id, number, epoch, body.time("published_at"))
    if body.text("type") != "point":
        raise IntegrityError(f"a manifest of type {body.text('type')!r:.60} is not known", key=key)
    disks = tuple(_decode_disk(disk) for disk in body.list_of_fields("disks"))
    if len({disk.number for disk in disks}) != len(disks):
        raise IntegrityError("the manifest names a disk number twice", key=key)
    return Point(
        vm_id=vm_id,
        point=number,
        epoch=epoch,
        previous=body.integer("previous", most=number - 1),
        created_at=body.time("created_at"),
        published_at=body.time("published_at"),
        consistency=_consistency(body),
        vm_name=body.text("vm_name"),
        machine=decode_machine(body.fields("machine")),
        disks=disks,
        maps=tuple(_decode_map(one, key) for one in body.list_of_fields("maps")),
        cycle=_decode_cycle(body.fields("cycle")),
        repeats=body.integer("repeats", most=number - 1) if "repeats" in body.values else 0,
        convertibility=_decode_convertibility(body),
    )


def encode_machine(machine: Machine) -> dict[str, Any]:
    """Return the machine description as JSON."""
    return {
        "generation": machine.generation,
        "firmware": machine.firmware,
        "secure_boot": machine.secure_boot,
        "cpus": machine.cpus,
        "memory_bytes": machine.memory_bytes,
        "nics": [{"mac": nic.mac, "network": nic.network} for nic in machine.nics],
    }


def decode_machine(body: Fields) -> Machine:
    """Decode a machine description. Raises IntegrityError."""
    return Machine(
        generation=2 if body.integer("generation", least=1, most=2) == 2 else 1,
        cpus=body.integer("cpus", least=1, most=4096),
        memory_bytes=body.integer("memory_bytes", least=1),
        nics=tuple(Nic(nic.optional_text("mac"), nic.optional_text("network")) for nic in body.list_of_fields("nics")),
        secure_boot=body.truth("secure_boot"),
    )


def _decode_convertibility(body: Fields) -> Convertibility | None:
    """Return the verdict; None where there is none, or none that is understood: that costs the point nothing."""
    if not isinstance(body.values.get("convertibility"), dict):
        return None
    return convertibility.decode(body.fields("convertibility"))


def _consistency(body: Fields) -> Consistency:
    try:
        return Consistency(body.text("consistency"))
    except ValueError as error:
        raise IntegrityError(f"consistency {body.text('consistency')!r:.60} is not known", key=body.key) from error


def _encode_disk(disk: DiskRecord) -> dict[str, Any]:
    return {
        "number": disk.number,
        "name": disk.name,
        "size_bytes": disk.size,
        "sector_size_bytes": disk.sector_size,
        "format": disk.format,
        "bus": disk.bus,
        "data_blocks": disk.data_blocks,
        "digest": str(disk.digest),
        "source": disk.source,
    }


def _decode_disk(body: Fields) -> DiskRecord:
    source = body.fields("source")
    sector_size = body.integer("sector_size_bytes")
    if sector_size not in (512, 4096):
        raise IntegrityError(f"field 'sector_size_bytes' should be 512 or 4096, it is {sector_size}", key=body.key)
    size = body.integer("size_bytes", least=1, most=LARGEST_DISK_BYTES)
    return DiskRecord(
        number=body.integer("number", most=LARGEST_DISK_NUMBER),
        name=body.text("name"),
        size=size,
        sector_size=sector_size,
        format=body.text("format"),
        bus=body.text("bus"),
        data_blocks=body.integer("data_blocks", most=block_count(size)),
        digest=Digest.parse(body.hexadecimal("digest", digits=32)),
        source={name: source.text(name) for name in source.values},
    )


def _encode_map(one: MapRef) -> dict[str, Any]:
    return {
        "level": one.level,
        "parts": [
            {
                "point": ref.part.point,
                "epoch": ref.part.epoch,
                "ordinal": ref.part.ordinal,
                "entries": ref.entries,
                "first_key": f"{ref.first_key:016x}",
                "last_key": f"{ref.last_key:016x}",
                "size_bytes": ref.size,
                "checksum": ref.checksum,
            }
            for ref in one.parts
        ],
    }


def _decode_map(body: Fields, key: str) -> MapRef:
    parts = tuple(
        MapPartRef(
            PartId(
                part.integer("point", least=1),
                part.integer("epoch", least=1, most=LARGEST_EPOCH),
                part.integer("ordinal", most=LARGEST_ORDINAL),
            ),
            part.integer("entries", least=1),
            int(part.hexadecimal("first_key", digits=16), 16),
            int(part.hexadecimal("last_key", digits=16), 16),
            part.integer("size_bytes", least=1),
            part.hexadecimal("checksum", digits=32),
        )
        for part in body.list_of_fields("parts")
    )
    edges = [edge for part in parts for edge in (2 * part.first_key, 2 * part.last_key + 1)]  # a part may be one key
    if not parts or any(one >= later for one, later in pairwise(edges)):
        raise IntegrityError("the parts of a map are missing or not in ascending order", key=key)
    return MapRef(body.integer("level", most=64), parts)


def _decode_cycle(body: Fields) -> CycleStatistics:
    return CycleStatistics(
        read_bytes=body.integer("read_bytes"),
        changed_blocks=body.integer("changed_blocks"),
        zero_blocks=body.integer("zero_blocks"),
        reused_blocks=body.integer("reused_blocks"),
        stored_bytes=body.integer("stored_bytes"),
        segments=body.integer("segments"),
        seconds=body.number("seconds"),
    )
