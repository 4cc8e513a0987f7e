"""Where a VM stands, told: as JSON, and in sentences with what can be done next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from replica.failover import transitions
from replica.failover.offer import OFFERS, Offer
from replica.model import FailoverKind, RecoveryMachine, Settings, Standing


def document(name: str, settings: Settings, offers: Mapping[str, Offer] = OFFERS) -> dict[str, Any]:
    """Return the JSON form of where a VM stands; ``offers`` are those of this configuration."""
    state, change = settings.state, settings.change
    home = state.home
    return {
        "standing": state.standing.value,
        "says": transitions.say(state, offers),
        "next": list(transitions.next_commands(name, state)),
        "recovery_machine": None if state.machine is None else machine_document(state.machine),
        "other_machines": [machine_document(one) for one in state.beside],
        "home": None
        if home is None
        else {"point": home.point, "disks": [{"number": one.number, "path": one.path} for one in home.sources]},
        "changed_at": None if change is None else change.at,
        "changed_by": None if change is None else change.host_name,
        "changed_with": None if change is None else change.command,
    }


def machine_document(machine: RecoveryMachine) -> dict[str, Any]:
    """Return the JSON form of a recovery machine."""
    return {
        "name": machine.name,
        "platform": machine.platform,
        "kind": machine.kind.value,
        "point": machine.point,
        "generation": machine.generation,
        "isolated": machine.isolated,
        "converted": bool(machine.conversions),
        "host": machine.host_name,
        "begun_at": machine.begun_at,
        "disks": [{"number": one.number, "address": one.address} for one in machine.disks],
    }


def lines(told: Mapping[str, Any]) -> list[tuple[str, object]]:
    """Return names and values for people, of a ``document``: where the VM stands, its machines, and what leads on."""
    shown: list[tuple[str, object]] = [("standing", f"{told['standing']}: {told['says']}")]
    if told["other_machines"]:
        shown.append(("other machines", [_beside(one) for one in told["other_machines"]]))
    return [*shown, ("next", told["next"])]


def _beside(machine: Mapping[str, Any]) -> str:
    what = "a test" if machine["kind"] == FailoverKind.TEST else "to be removed; made"
    return (
        f"{machine['name']} ({machine['platform']} on {machine['host']}): {what} from point {machine['point']}, "
        f"{machine['begun_at']:%Y-%m-%d %H:%M} UTC"
    )


def short(told: Mapping[str, Any]) -> str:
    """Return what a list of VMs says of one, of a ``document``: nothing where it runs at its source, alone."""
    parts = [] if told["standing"] == Standing.PROTECTED else [str(told["standing"])]
    others = len(told["other_machines"])
    if others:
        parts.append(f"{others} more machine{'s' if others > 1 else ''}")
    return ", ".join(parts)
