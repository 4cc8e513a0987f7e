"""Asks Azure's resource manager: the one place that runs the program az. Each question is a process, bounded in time.

Nothing secret is among its arguments; it is signed in by whoever runs us (az login, a managed identity).
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from replica.errors import PlatformError
from replica.platforms.azure.template import ADAPTERS, DISKS, GROUPS, MACHINE_TAG, MACHINES, NETWORKS
from replica.platforms.platform import Power

PROGRAM: Final = "az"
NOT_FOUND: Final = 3  # az's exit code for a resource that is not there
ASK_SECONDS: Final = 120.0
CHANGE_SECONDS: Final = 3600.0  # a deployment copies the blobs into disks
MOST_ERROR_CHARACTERS: Final = 2000
LARGEST_ANSWER_BYTES: Final = 64 << 20
# What uses goes before what is used.
REMOVED_IN_ORDER: Final = (MACHINES, ADAPTERS, DISKS, NETWORKS, GROUPS)

_POWERS: Final = {
    "PowerState/running": Power.RUNNING,
    "PowerState/starting": Power.RUNNING,
    "PowerState/stopping": Power.RUNNING,  # still on
    "PowerState/stopped": Power.OFF,
    "PowerState/deallocating": Power.OFF,
    "PowerState/deallocated": Power.OFF,
}


@dataclass(frozen=True, slots=True)
class Resource:
    """A resource of a machine."""

    id: str
    type: str


class Az:
    """A resource group, through az."""

    def __init__(self, resource_group: str, environment: Mapping[str, str], *, program: str = PROGRAM) -> None:
        self.resource_group = resource_group
        self._environment = dict(environment)
        self._program = program

    def check(self) -> None:
        """Ask whether the resource group is there. Raises PlatformError where it is not, or az is not signed in."""
        if self._ask("group", "show", "--name", self.resource_group) is None:
            raise PlatformError(f"there is no resource group {self.resource_group}", hint="az group create makes one")

    def deploy(self, name: str, template: Path, parameters: Path) -> None:
        """Make what the template says, and return once it is there. Raises PlatformError."""
        self._change(
            "deployment",
            "group",
            "create",
            *self._named(name),
            "--mode",
            "Incremental",
            "--template-file",
            str(template),
            "--parameters",
            f"@{parameters}",
        )

    def power(self, name: str) -> Power:
        """Return whether the machine runs. Raises PlatformError."""
        found = self._ask("vm", "get-instance-view", *self._named(name))
        if found is None:
            return Power.GONE
        try:
            codes = [str(one["code"]) for one in found["instanceView"]["statuses"]]
        except (KeyError, TypeError) as error:
            raise PlatformError(f"az tells nothing of the power of {name}") from error
        return next((_POWERS[one] for one in codes if one in _POWERS), Power.OFF)

    def start(self, name: str) -> None:
        """Turn the machine on."""
        self._change("vm", "start", *self._named(name))

    def stop(self, name: str, *, force: bool, timeout_seconds: float) -> None:
        """Shut the guest down, or with ``force`` pull the plug; and give the processors back, which are paid for."""
        skip = ("--skip-shutdown",) if force else ()
        self._change("vm", "stop", *self._named(name), *skip, seconds=max(timeout_seconds, ASK_SECONDS))
        self._change("vm", "deallocate", *self._named(name))

    def resources(self, name: str) -> list[Resource]:
        """Return all that carries the machine's tag, in the order in which it can be removed."""
        found = self._ask("resource", "list", "--resource-group", self.resource_group)
        try:
            tagged = [
                Resource(str(one["id"]), str(one["type"]))
                for one in found or []
                if (one.get("tags") or {}).get(MACHINE_TAG) == name
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise PlatformError(f"az lists the resources of {self.resource_group} in an unknown form") from error
        order = {one.lower(): place for place, one in enumerate(REMOVED_IN_ORDER)}
        return sorted(tagged, key=lambda one: (order.get(one.type.lower(), 0), one.id))

    def remove(self, name: str) -> None:
        """Remove all that carries the machine's tag, and the record of its deployment. Raises PlatformError."""
        for one in self.resources(name):
            self._change("resource", "delete", "--ids", one.id)
        left = self.resources(name)
        if left:
            raise PlatformError(
                f"{len(left)} resources of {name} are still there: {', '.join(one.id for one in left)}",
                hint="the same command goes on",
            )
        if self._ask("deployment", "group", "show", *self._named(name)) is not None:
            self._change("deployment", "group", "delete", *self._named(name))

    def machine(self, name: str) -> Mapping[str, Any]:
        """Return what Azure tells of the machine, nothing where it is gone. Raises PlatformError."""
        found = self._ask("vm", "show", *self._named(name))
        return found if isinstance(found, dict) else {}

    def pictures(self, name: str) -> tuple[str | None, str | None]:
        """Return addresses of the console's picture and of what the serial port said: secrets, for minutes."""
        found = self._ask("vm", "boot-diagnostics", "get-boot-log-uris", *self._named(name))
        if not isinstance(found, dict):
            return None, None
        return found.get("consoleScreenshotBlobUri"), found.get("serialConsoleLogBlobUri")

    def run_script(self, name: str, command: str, script: Path, *, timeout_seconds: float) -> str:
        """Run the script in the guest by its agent of Azure; return the message. Raises PlatformError."""
        found = self._run(
            ("vm", "run-command", "invoke", *self._named(name), "--command-id", command, "--scripts", f"@{script}"),
            timeout_seconds,
        )
        try:
            assert found is not None
            return "\n".join(str(one["message"]) for one in found["value"])
        except (AssertionError, KeyError, TypeError) as error:
            raise PlatformError(f"az tells nothing of what was run in {name}") from error

    def _named(self, name: str) -> tuple[str, ...]:
        return ("--resource-group", self.resource_group, "--name", name)

    def _ask(self, *arguments: str) -> Any:
        """Return the answer, None where what is asked for is not there."""
        return self._run(arguments, ASK_SECONDS, may_be_missing=True)

    def _change(self, *arguments: str, seconds: float = CHANGE_SECONDS) -> None:
        self._run(arguments, seconds)

    def _run(self, arguments: tuple[str, ...], seconds: float, *, may_be_missing: bool = False) -> Any:
        what = f"{PROGRAM} {' '.join(one for one in arguments[:3] if not one.startswith('-'))}"
        program = shutil.which(self._program, path=self._environment.get("PATH"))
        if program is None:
            raise PlatformError(
                f"{PROGRAM} is needed to start machines on Azure, and is not installed",
                hint="install azure-cli and sign in; or leave resource_group out of [platforms.azure]: then the blobs "
                "and a template are made, for you to deploy",
            )
        command = [program, *arguments, "--output", "json", "--only-show-errors"]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=seconds,
                check=False,
                env=self._environment,
            )
        except (OSError, ValueError) as error:
            raise PlatformError(f"{program} cannot be run: {error}") from error
        except subprocess.TimeoutExpired as error:
            raise PlatformError(f"{what} does not end", hint="the same command goes on") from error
        if done.returncode == NOT_FOUND and may_be_missing:
            return None
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip()[-MOST_ERROR_CHARACTERS:]
            raise PlatformError(f"{what} failed: {said or f'exit code {done.returncode}'}")
        if not done.stdout.strip():
            return None
        if len(done.stdout) > LARGEST_ANSWER_BYTES:
            raise PlatformError(f"{what} answers too much")
        try:
            return json.loads(done.stdout)
        except (ValueError, RecursionError) as error:
            raise PlatformError(f"{what} answers what is no JSON") from error
