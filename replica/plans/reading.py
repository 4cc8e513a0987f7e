"""A plan read from its text: every mistake is named with its line, unknown keys with the nearest that there is."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from replica.drills import checks as drill_checks
from replica.drills.checks import Check
from replica.errors import ConfigurationError, UsageError
from replica.failover.offer import OFFERS
from replica.keys import PlanKeys, encode_name
from replica.plans import document, graph
from replica.plans.document import DocumentError, Mistake, Node, Place, Scalar, Sequence, plain
from replica.plans.document import Mapping as Table
from replica.plans.model import (
    AT_ONCE,
    START_SECONDS,
    Action,
    ActionKind,
    Group,
    OnFailure,
    Plan,
    PlannedVm,
    PointPolicy,
    Policy,
    RunKind,
)

T = TypeVar("T")

LONGEST_TEXT: Final = 2000
MOST_VMS: Final = 1000
LONGEST_SECONDS: Final = 7 * 86400

_DURATION: Final = re.compile(r"(\d{1,9})([smhd])")
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_WORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")

_PLAN_KEYS: Final = ("plan", "description", "defaults", "before", "groups", "after")
_OF_VM: Final = (
    "platform",
    "generation",
    "point",
    "max_point_age",
    "on_old_point",
    "networks",
    "timeout",
    "on_failure",
)
_DEFAULT_KEYS: Final = (*_OF_VM, "at_once", "checks")
_GROUP_KEYS: Final = ("group", "at_once", "consistent_within", "on_failure", "before", "vms", "after")
_VM_KEYS: Final = ("vm", "depends_on", *_OF_VM, "before", "after", "checks")
_WAYS: Final = ("host", "guest", "wait", "confirm")
_ACTION_KEYS: Final = (*_WAYS, "name", "vm", "runs", "timeout", "repeatable", "on_failure")


def load(path: Path) -> Plan:
    """Read a plan from its file. Raises ConfigurationError naming every mistake, UsageError where there is no file."""
    plan, mistakes = read(text_of(path))
    return required(plan, mistakes or graph.mistakes(plan), path=str(path))


def text_of(path: Path) -> str:
    """Return the text of a plan's file. Raises ConfigurationError, UsageError where there is no file."""
    try:
        with path.open("rb") as file:
            held = file.read(document.LARGEST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read the file: {error.strerror}", path=str(path)) from error
    try:
        return held.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigurationError("a plan is text in UTF-8", path=str(path)) from error


def required(plan: Plan, mistakes: Iterable[Mistake], *, path: str | None = None) -> Plan:
    """Return the plan if nothing is wrong with it. Raises ConfigurationError naming every mistake."""
    found = [str(one) for one in mistakes]
    if found:
        raise ConfigurationError("; ".join(found), path=path, hint="docs/plans.md says what a plan may hold")
    return plan


def read(text: str) -> tuple[Plan, list[Mistake]]:
    """Return the plan that the text says, as far as it can be understood, and all that is wrong with it."""
    mistakes: list[Mistake] = []
    try:
        root = document.parse(text, mistakes)
    except DocumentError as error:
        return Plan(""), [*mistakes, error.mistake]
    plan = _Reader(mistakes).plan(root)
    mistakes.sort(key=lambda one: (one.place.line, one.place.column))
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return replace(plan, text=text, sha256=digest), mistakes[: document.MOST_MISTAKES]


class _Fields:
    """The values of a table by their keys; those that nobody knows are mistakes."""

    def __init__(self, node: Table, known: tuple[str, ...], mistakes: list[Mistake]) -> None:
        self.node = node
        self._mistakes = mistakes
        self._values: dict[str, tuple[Place, Node]] = {}
        for key, value in node.entries:
            if key.text in known:
                self._values.setdefault(key.text, (key.place, value))
                continue
            near = get_close_matches(key.text, known, n=1, cutoff=0.6) or get_close_matches(
                re.sub(r"(?<=[a-z])(?=[A-Z])|-", "_", key.text).lower(), known, n=1, cutoff=0.6
            )
            told = f": did you mean {near[0]!r}?" if near else f": there are {', '.join(known)}"
            mistakes.append(Mistake(key.place, f"{key.text!r:.60} is nothing that can be said here{told}"))

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def place(self, key: str) -> Place:
        """Return where a key is written, or where its table is."""
        return self._values[key][0] if key in self._values else self.node.place

    def node_of(self, key: str) -> Node | None:
        """Return the value of a key as it is written."""
        return self._values[key][1] if key in self._values else None

    def take(self, key: str, check: Callable[[Node], T], default: T) -> T:
        """Return what ``check`` makes of a value, or the default where there is none or it is wrong."""
        if key not in self._values:
            return default
        place, node = self._values[key]
        try:
            if isinstance(node, Scalar) and node.is_empty:
                raise ValueError("has no value")
            return check(node)
        except (ValueError, UsageError) as error:
            at = place if isinstance(node, Scalar) and node.is_empty else node.place
            self._mistakes.append(Mistake(at, f"{key} {error}"))
            return default

    def need(self, key: str, what: str) -> None:
        """Note a mistake where the key is not there."""
        if key not in self._values:
            self._mistakes.append(Mistake(self.node.place, f"{what} needs {key!r}"))


class _Reader:
    """Reads a tree."""

    def __init__(self, mistakes: list[Mistake]) -> None:
        self._mistakes = mistakes
        self._defaults: Mapping[str, Any] = {}

    def plan(self, root: Node) -> Plan:
        if not isinstance(root, Table):
            self._wrong(root, "a plan is a table of keys and values: plan, groups, …")
            return Plan("")
        fields = _Fields(root, _PLAN_KEYS, self._mistakes)
        fields.need("plan", "a plan")
        fields.need("groups", "a plan")
        self._defaults = self._read_defaults(fields.node_of("defaults"))
        plan = Plan(
            name=fields.take("plan", _plan_name, ""),
            description=fields.take("description", _text, ""),
            before=self._actions(fields, "before", is_of_vm=False),
            after=self._actions(fields, "after", is_of_vm=False),
        )
        groups = [self._group(one) for one in self._items(fields, "groups", "groups")]
        plan = replace(plan, groups=tuple(one for one in groups if one is not None))
        self._look_at_names(plan)
        return plan

    def _wrong(self, node: Node, text: str) -> None:
        self._mistakes.append(Mistake(node.place, text))

    def _items(self, fields: _Fields, key: str, what: str) -> list[Node]:
        node = fields.node_of(key)
        if node is None:
            return []
        if not isinstance(node, Sequence) or not node.items:
            self._mistakes.append(Mistake(fields.place(key), f"{key} should be a list of {what}, each after a dash"))
            return []
        return node.items

    def _read_defaults(self, node: Node | None) -> Mapping[str, Any]:
        if node is None:
            return {}
        if not isinstance(node, Table):
            self._wrong(node, "defaults should be a table of keys and values")
            return {}
        fields = _Fields(node, _DEFAULT_KEYS, self._mistakes)
        found = self._of_vm(fields, {})
        found["at_once"] = fields.take("at_once", _at_once, AT_ONCE)
        found["checks"] = self._checks(fields)
        return found

    def _of_vm(self, fields: _Fields, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Return what VMs have in common with the defaults."""

        def take(key: str, check: Callable[[Node], Any], otherwise: Any, name: str = "") -> Any:
            return fields.take(key, check, defaults.get(name or key, otherwise))

        return {
            "platform": take("platform", _platform, None),
            "generation": take("generation", _generation, None),
            "point": take("point", self._point, PointPolicy()),
            "max_point_age_seconds": take("max_point_age", _seconds, None, "max_point_age_seconds"),
            "on_old_point": take("on_old_point", _one_of("refuse", "ask"), "refuse"),
            "networks": take("networks", _networks, ()),
            "timeout_seconds": take("timeout", _seconds, START_SECONDS, "timeout_seconds"),
            "on_failure": take("on_failure", _on_failure, OnFailure.STOP),
        }

    def _group(self, node: Node) -> Group | None:
        if not isinstance(node, Table):
            self._wrong(node, "a group is a table: group, vms, …")
            return None
        fields = _Fields(node, _GROUP_KEYS, self._mistakes)
        fields.need("group", "a group")
        fields.need("vms", "a group")
        before = self._defaults
        if "on_failure" in fields:
            self._defaults = {**before, "on_failure": fields.take("on_failure", _on_failure, OnFailure.STOP)}
        vms = [self._vm(one) for one in self._items(fields, "vms", "VMs")]
        made = Group(
            name=fields.take("group", _word, ""),
            place=node.place,
            vms=tuple(one for one in vms if one is not None),
            at_once=fields.take("at_once", _at_once, self._defaults.get("at_once", AT_ONCE)),
            within_seconds=fields.take("consistent_within", _seconds, None),
            before=self._actions(fields, "before", is_of_vm=False),
            after=self._actions(fields, "after", is_of_vm=False),
        )
        self._defaults = before
        return made

    def _vm(self, node: Node) -> PlannedVm | None:
        if isinstance(node, Scalar):  # no more than a name
            node = Table(node.place, [(Scalar(node.place, "vm", True), node)])
        if not isinstance(node, Table):
            self._wrong(node, "a VM is its name, or a table: vm, depends_on, …")
            return None
        fields = _Fields(node, _VM_KEYS, self._mistakes)
        fields.need("vm", "a VM")
        return PlannedVm(
            name=fields.take("vm", _vm_name, ""),
            place=node.place,
            depends_on=fields.take("depends_on", _names, ()),
            before=self._actions(fields, "before", is_of_vm=True),
            after=self._actions(fields, "after", is_of_vm=True),
            checks=self._checks(fields) if "checks" in fields else self._defaults.get("checks", ()),
            **self._of_vm(fields, self._defaults),
        )

    def _point(self, node: Node) -> PointPolicy:
        if isinstance(node, Table):
            fields = _Fields(node, ("at_or_before",), self._mistakes)
            at = fields.take("at_or_before", _moment, None)
            if at is None and "at_or_before" not in fields:
                raise ValueError("should say at_or_before")
            return PointPolicy(Policy.AT_OR_BEFORE, at)
        text = _text(node)
        if text.isascii() and text.isdecimal() and 0 < int(text) < 10**20:
            return PointPolicy(Policy.NUMBER, number=int(text))
        for known in (Policy.NEWEST, Policy.NEWEST_VERIFIED, Policy.APPLICATION):
            if text == known.value:
                return PointPolicy(known)
        raise ValueError(
            "should be newest, newest-verified, application-consistent, a point's number, or {at_or_before: TIME}"
        )

    def _checks(self, fields: _Fields) -> tuple[Check, ...]:
        found: list[Check] = []
        for node in self._items(fields, "checks", "checks"):
            terms, wrong = drill_checks.read({"check": [plain(node)]})
            self._mistakes += [Mistake(node.place, one.removeprefix("drill.check 1: ")) for one in wrong]
            found += terms.checks
        return tuple(found)

    # -- actions

    def _actions(self, fields: _Fields, key: str, *, is_of_vm: bool) -> tuple[Action, ...]:
        found = [self._action(one, is_of_vm=is_of_vm) for one in self._items(fields, key, "actions")]
        return tuple(one for one in found if one is not None)

    def _action(self, node: Node, *, is_of_vm: bool) -> Action | None:
        if not isinstance(node, Table):
            self._wrong(node, f"an action is a table with one of {', '.join(_WAYS)}")
            return None
        fields = _Fields(node, _ACTION_KEYS, self._mistakes)
        ways = [one for one in _WAYS if one in fields]
        if len(ways) != 1:
            self._wrong(node, f"an action needs one of {', '.join(_WAYS)}{', and no more' if ways else ''}")
            return None
        number = len(self._mistakes)
        made = fields.take(ways[0], lambda value: _way(ways[0], value, node.place), None)
        if made is None:
            if len(self._mistakes) == number:  # pragma: no cover - take tells of each
                self._wrong(node, "the action cannot be read")
            return None
        repeats = made.kind not in (ActionKind.HOST, ActionKind.GUEST)
        if repeats and "repeatable" in fields:
            self._mistakes.append(Mistake(fields.place("repeatable"), "repeatable is of programs: others always are"))
        if is_of_vm and "vm" in fields:
            self._mistakes.append(Mistake(fields.place("vm"), "vm is of the actions of a group or plan: this has one"))
        if not is_of_vm and made.kind.is_of_guest and "vm" not in fields:
            self._wrong(node, "here it has to be said whose guest is meant: vm")
        return replace(
            made,
            name=fields.take("name", _text, made.name),
            vm=fields.take("vm", _vm_name, ""),
            runs=fields.take("runs", _runs, made.kind.runs),
            timeout_seconds=fields.take("timeout", _seconds, made.timeout_seconds),
            repeatable=fields.take("repeatable", _truth, repeats),
            on_failure=fields.take("on_failure", _on_failure, OnFailure.STOP),
        )

    # -- what must fit together

    def _look_at_names(self, plan: Plan) -> None:
        groups: dict[str, Place] = {}
        for group in plan.groups:
            if group.name and groups.setdefault(group.name, group.place) is not group.place:
                first = groups[group.name].line
                self._mistakes.append(Mistake(group.place, f"there is a group {group.name!r} already, line {first}"))
        vms: dict[str, Place] = {}
        for number, vm in enumerate(plan.vms):
            if vm.name and vms.setdefault(vm.name, vm.place) is not vm.place:
                self._mistakes.append(
                    Mistake(vm.place, f"the VM {vm.name!r} is in the plan already, line {vms[vm.name].line}")
                )
            if number == MOST_VMS:
                self._mistakes.append(Mistake(vm.place, f"a plan has at most {MOST_VMS} VMs"))


# -- values -----------------------------------------------------------------------------------------------------------


def _way(way: str, node: Node, place: Place) -> Action:
    if way in ("host", "guest"):
        command = _command(node)
        kind = ActionKind.HOST if way == "host" else ActionKind.GUEST
        return Action(kind, f"{way}: {' '.join(command)}"[:120], place, command, runs=kind.runs)
    if way == "confirm":
        text = _text(node)
        return Action(ActionKind.CONFIRM, text[:120], place, text=text, timeout_seconds=LONGEST_SECONDS)
    if isinstance(node, Scalar) and node.text == "agent":
        return Action(ActionKind.AGENT, "wait for the agent", place, runs=ActionKind.AGENT.runs)
    entries = node.entries if isinstance(node, Table) else []
    if len(entries) != 1 or entries[0][0].text not in ("console", "tcp"):
        raise ValueError("should be agent, {console: REGULAR EXPRESSION} or {tcp: HOST:PORT}")
    what, value = entries[0]
    text = _text(value)
    if what.text == "console":
        try:
            re.compile(text)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"console is no regular expression: {error}") from error
        return Action(ActionKind.CONSOLE, f"wait for {text!r}"[:120], place, text=text, runs=ActionKind.CONSOLE.runs)
    address, _, port = text.rpartition(":")
    if not address or not port.isdecimal() or not port.isascii() or not 0 < int(port[:6]) < 65536:
        raise ValueError("tcp should be HOST:PORT")
    address = address.removeprefix("[").removesuffix("]")
    return Action(ActionKind.TCP, f"wait for {text}"[:120], place, address=address, port=int(port))


def _text(node: Node) -> str:
    if not isinstance(node, Scalar) or not node.text.strip():
        raise ValueError("should be text")
    if len(node.text) > LONGEST_TEXT or "\0" in node.text or any(0xD800 <= ord(c) < 0xE000 for c in node.text):
        raise ValueError(f"should be text of up to {LONGEST_TEXT} characters")
    return node.text


def _plan_name(node: Node) -> str:
    return PlanKeys("default", _text(node)).plan


def _vm_name(node: Node) -> str:
    encode_name(_text(node))
    return _text(node)


def _word(node: Node) -> str:
    if not _WORD.fullmatch(_text(node)):
        raise ValueError("should be one word, of letters, digits, dots, hyphens and underscores")
    return _text(node)


def _names(node: Node) -> tuple[tuple[str, Place], ...]:
    listed = node.items if isinstance(node, Sequence) else [node]
    return tuple((_vm_name(one), one.place) for one in listed)


def _command(node: Node) -> tuple[str, ...]:
    if not isinstance(node, Sequence) or not node.items or len(node.items) > 200:
        raise ValueError("should be a program and its arguments as a list, [program, argument]: there is no shell")
    if not all(isinstance(one, Scalar) and "\0" not in one.text for one in node.items):
        raise ValueError("should be a list of texts")
    words = tuple(cast("Scalar", one).text for one in node.items)
    if not words[0].strip() or sum(map(len, words)) > 16384:
        raise ValueError("should begin with a program, and have at most 16384 characters")
    return words


def _seconds(node: Node) -> float:
    match = _DURATION.fullmatch(_text(node))
    seconds = int(match[1]) * _UNITS[match[2]] if match else 0
    if not 0 < seconds <= LONGEST_SECONDS:
        raise ValueError("should be a time, from 1s to 7d, as 30s, 5m or 2h")
    return float(seconds)


def _moment(node: Node) -> datetime:
    try:
        found = datetime.fromisoformat(_text(node))
        if found.tzinfo is None:
            raise ValueError("no zone")
        return found.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise ValueError("should be a time with its zone, as 2026-05-01T08:00:00Z") from error


def _truth(node: Node) -> bool:
    if not isinstance(node, Scalar) or node.text not in ("true", "false"):
        raise ValueError("should be true or false")
    return node.text == "true"


def _at_once(node: Node) -> int:
    text = _text(node)
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text[:4]) <= 64:
        raise ValueError("should be a whole number from 1 to 64")
    return int(text)


def _platform(node: Node) -> str:
    if _text(node) not in OFFERS:
        raise ValueError(f"should be one of {', '.join(OFFERS)}")
    return _text(node)


def _generation(node: Node) -> int | None:
    if _text(node) not in ("1", "2", "auto"):
        raise ValueError("should be 1, 2 or auto")
    return None if _text(node) == "auto" else int(_text(node))


def _on_failure(node: Node) -> OnFailure:
    return OnFailure(_one_of(*(one.value for one in OnFailure))(node))


def _one_of(*known: str) -> Callable[[Node], str]:
    def check(node: Node) -> str:
        if _text(node) not in known:
            raise ValueError(f"should be {' or '.join(known)}")
        return _text(node)

    return check


def _runs(node: Node) -> frozenset[RunKind]:
    listed = node.items if isinstance(node, Sequence) else [node]
    check = _one_of(*(one.value for one in RunKind))
    found = frozenset(RunKind(check(one)) for one in listed)
    if not found:
        raise ValueError(f"should be a list of {', '.join(one.value for one in RunKind)}")
    return found


def _networks(node: Node) -> tuple[tuple[str, str], ...]:
    if not isinstance(node, Table) or not node.entries:
        raise ValueError("should be a table: a network of the source, and one of the platform")
    return tuple((key.text, _text(value)) for key, value in node.entries)
