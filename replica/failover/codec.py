"""Where a VM stands, as its settings hold it (docs/format.md, section 2). Encode and decode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

from replica import manifest, record
from replica.block import LARGEST_DISK_NUMBER
from replica.errors import FormatVersionError, IntegrityError
from replica.model import (
    Change,
    ConversionRef,
    FailoverKind,
    Home,
    Identity,
    MachineDisk,
    RecoveryMachine,
    ReverseBase,
    Settings,
    SourceDisk,
    Standing,
    State,
)
from replica.record import Fields

MOST_MACHINES: Final = 1000
_COMMITTED_ON: Final = (Standing.REPROTECTED, Standing.FAILING_BACK)


def encode(settings: Settings) -> dict[str, Any]:
    """Return the fields of the settings that say where the VM stands, and what made this version; none by default."""
    state, change = settings.state, settings.change
    return {
        **({} if state == State() else {"state": _encode_state(state)}),
        **({} if change is None else {"change": _encode_change(change)}),
        **({"previous": settings.previous} if settings.previous else {}),
    }


def decode(body: Fields) -> tuple[State, Change | None, int]:
    """Return state, change and previous version. Raises IntegrityError, FormatVersionError."""
    state = State() if body.values.get("state") is None else _decode_state(body.fields("state"))
    change = None if body.values.get("change") is None else _decode_change(body.fields("change"))
    previous = 0
    if "previous" in body.values:
        previous = body.integer("previous", most=max(0, body.integer("version", least=1) - 1))
    return state, change, previous


def encode_sources(sources: Sequence[SourceDisk]) -> list[dict[str, Any]]:
    """Return protected disks as JSON."""
    return [{"number": one.number, "name": one.name, "path": one.path, "bus": one.bus} for one in sources]


def decode_sources(body: Fields) -> tuple[SourceDisk, ...]:
    """Return the protected disks in the field ``sources``. Raises IntegrityError."""
    sources = tuple(
        SourceDisk(one.integer("number", most=LARGEST_DISK_NUMBER), one.text("name"), one.text("path"), one.text("bus"))
        for one in body.list_of_fields("sources")
    )
    if len({one.number for one in sources}) != len(sources):
        raise IntegrityError("the settings name a disk number twice", key=body.key)
    return sources


def _encode_state(state: State) -> dict[str, Any]:
    home, reverse = state.home, state.reverse
    return {
        "standing": state.standing.value,
        **({} if state.machine is None else {"machine": _encode_machine(state.machine)}),
        **({"beside": [_encode_machine(one) for one in state.beside]} if state.beside else {}),
        **({} if home is None else {"home": _encode_home(home)}),
        **({} if reverse is None else {"reverse": _encode_reverse(reverse)}),
    }


def _decode_state(body: Fields) -> State:
    text = body.text("standing")
    if text not in set(Standing):
        raise FormatVersionError(
            f"the VM's standing is {text!r:.60}, which this godwit does not know",
            key=body.key,
            hint="use a newer godwit",
        )
    beside = tuple(_decode_machine(one) for one in _machines(body))
    state = State(
        Standing(text),
        None if body.values.get("machine") is None else _decode_machine(body.fields("machine")),
        beside,
        None if body.values.get("home") is None else _decode_home(body.fields("home")),
        None if body.values.get("reverse") is None else _decode_reverse(body.fields("reverse")),
    )
    _check(state, body.key)
    return state


def _machines(body: Fields) -> list[Fields]:
    listed = body.list_of_fields("beside") if "beside" in body.values else []
    if len(listed) > MOST_MACHINES:
        raise IntegrityError(f"the settings name more than {MOST_MACHINES} machines", key=body.key)
    return listed


def _check(state: State, key: str) -> None:
    """Refuse what contradicts itself: nothing further asks whether what a standing needs is there."""
    away = state.standing is not Standing.PROTECTED
    if away != (state.machine is not None) or away != (state.home is not None):
        raise IntegrityError(f"the standing {state.standing.value!r} lacks its machine, or has one too many", key=key)
    if (state.reverse is not None) != (state.standing in _COMMITTED_ON):
        raise IntegrityError(f"the standing {state.standing.value!r} lacks what changes are told by", key=key)
    every = [one.name for one in (*state.beside, *([state.machine] if state.machine else []))]
    if len(set(every)) != len(every):
        raise IntegrityError("the settings name a machine twice", key=key)


def _encode_machine(machine: RecoveryMachine) -> dict[str, Any]:
    return {
        "name": machine.name,
        "platform": machine.platform,
        "kind": machine.kind.value,
        "point": machine.point,
        "generation": machine.generation,
        "isolated": machine.isolated,
        "host_id": machine.host_id,
        "host_name": machine.host_name,
        "begun_at": record.time_text(machine.begun_at),
        "bitmap": machine.bitmap,
        "conversions": _encode_conversions(machine.conversions),
        "disks": [{"number": one.number, "address": one.address} for one in machine.disks],
    }


def _decode_machine(body: Fields) -> RecoveryMachine:
    kind = body.text("kind")
    if kind not in set(FailoverKind):
        raise FormatVersionError(f"a failover of kind {kind!r:.60} is not known", key=body.key, hint="use a newer one")
    generation: Literal[1, 2] = 2 if body.integer("generation", least=1, most=2) == 2 else 1
    return RecoveryMachine(
        name=body.text("name"),
        platform=body.text("platform"),
        kind=FailoverKind(kind),
        point=body.integer("point", least=1),
        generation=generation,
        isolated=body.truth("isolated"),
        host_id=body.text("host_id"),
        host_name=body.text("host_name"),
        begun_at=body.time("begun_at"),
        bitmap=body.optional_text("bitmap"),
        conversions=_decode_conversions(body),
        disks=tuple(
            MachineDisk(one.integer("number", most=LARGEST_DISK_NUMBER), one.text("address"))
            for one in body.list_of_fields("disks")
        ),
    )


def _encode_conversions(conversions: Sequence[ConversionRef]) -> list[dict[str, Any]]:
    return [{"point": one.point, "disk": one.disk} for one in conversions]


def _decode_conversions(body: Fields) -> tuple[ConversionRef, ...]:
    return tuple(
        ConversionRef(one.integer("point", least=1), one.integer("disk", most=LARGEST_DISK_NUMBER))
        for one in body.list_of_fields("conversions")
    )


def _encode_home(home: Home) -> dict[str, Any]:
    return {
        "machine": manifest.encode_machine(home.machine),
        "sources": encode_sources(home.sources),
        "point": home.point,
    }


def _decode_home(body: Fields) -> Home:
    return Home(manifest.decode_machine(body.fields("machine")), decode_sources(body), body.integer("point", least=1))


def _encode_reverse(reverse: ReverseBase) -> dict[str, Any]:
    return {
        "point": reverse.point,
        "bitmap": reverse.bitmap,
        "conversions": _encode_conversions(reverse.conversions),
    }


def _decode_reverse(body: Fields) -> ReverseBase:
    return ReverseBase(body.integer("point", least=1), body.optional_text("bitmap"), _decode_conversions(body))


def _encode_change(change: Change) -> dict[str, Any]:
    identities = [
        {
            "platform": one.platform,
            "hypervisor_id": one.hypervisor_id,
            "bios_uuid": one.bios_uuid,
            "macs": list(one.macs),
        }
        for one in change.identities
    ]
    return {
        "command": change.command,
        "at": record.time_text(change.at),
        "host_id": change.host_id,
        "host_name": change.host_name,
        **({"identities": identities} if identities else {}),
    }


def _decode_change(body: Fields) -> Change:
    listed = body.list_of_fields("identities") if "identities" in body.values else []
    return Change(
        body.text("command"),
        body.time("at"),
        body.text("host_id"),
        body.text("host_name"),
        tuple(
            Identity(one.text("platform"), one.text("hypervisor_id"), one.text("bios_uuid"), _texts(one, "macs"))
            for one in listed
        ),
    )


def _texts(body: Fields, field: str) -> tuple[str, ...]:
    value = body.values.get(field)
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise IntegrityError(f"field {field!r} should be a list of strings", key=body.key)
    return tuple(value)
