"""The steps of a run as deeds: a VM shut down, started, tested or brought home, and the actions around that.

All but actions can be repeated: they find out what was done before. What is not known of an action is said so.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias

from replica import catalog, history
from replica.drills.checking import Examiner
from replica.drills.checks import Check, Kind
from replica.errors import PlatformError, UsageError
from replica.failover import failover as failing_over
from replica.failover import returning
from replica.failover.failover import Order, new_name
from replica.failover.homecoming import Destination, look_ahead
from replica.failover.means import Means
from replica.failover.returning import Bring
from replica.model import FailoverKind, RecoveryMachine, Standing
from replica.plans import program
from replica.plans.graph import Step, StepKind
from replica.plans.journal import Outcome, Result, RunState, StepState
from replica.plans.model import Action, ActionKind, Plan, RunKind
from replica.plans.networks import mapped
from replica.plans.points import MeansOf
from vhdx.progress import Progress

PING_SECONDS: Final = 5.0
ASK_AGAIN_SECONDS: Final = 1.0

# Asks a person, and gives what they say; None where there is nobody.
Ask: TypeAlias = Callable[[str], "bool | None"]
# Makes the home disks of a VM what its newest point holds.
BringOf: TypeAlias = Callable[[str], Bring]


class Deeds(Protocol):
    """What an engine has done."""

    def machine_for(self, step: Step, state: StepState) -> str | None:
        """Return the name that the machine of a test is to have, known before it is made; None for other steps."""

    def do(self, step: Step, machine: str | None, progress: Progress) -> Outcome:
        """Do a step. What goes wrong is raised, or told by the outcome."""

    def give_up_waiting(self) -> None:
        """Let what only waits come to an end soon."""


@dataclass(slots=True)
class RealDeeds:
    """The deeds of a run on VMs and their platforms. ``state`` is what the journal says, which others write."""

    plan: Plan
    kind: RunKind
    run: int
    points: Mapping[str, int]
    means_of: MeansOf
    ask: Ask
    bring_of: BringOf
    state: RunState
    _over: threading.Event = field(default_factory=threading.Event)

    def give_up_waiting(self) -> None:
        """Let what only waits come to an end soon."""
        self._over.set()

    def machine_for(self, step: Step, state: StepState) -> str | None:
        """Return the name of a test's machine: the one it was given before, unless only another host sees that."""
        if step.kind is not StepKind.START or self.kind is not RunKind.TEST:
            return None
        means = self.means_of(step.vm)
        if state.machines:
            name = state.machines[-1]
            beside = catalog.settings_in_force(means.store, means.found).state.beside
            if all(means.is_reachable(one) for one in beside if one.name == name):
                return name
        return new_name(means)

    def do(self, step: Step, machine: str | None, progress: Progress) -> Outcome:
        """Do a step. Raises GodwitError, ConversionError, DiskError."""
        if step.kind is StepKind.ACTION:
            assert step.action is not None
            return self._act(step, step.action)
        ways = {StepKind.STOP: self._stop, StepKind.START: self._start, StepKind.HOME: self._home}
        return ways[step.kind](step, machine, progress)

    # -- VMs

    def _stop(self, step: Step, machine: str | None, progress: Progress) -> Outcome:
        means = self.means_of(step.vm)
        settings = catalog.settings_in_force(means.store, means.found)
        if settings.state.standing is not Standing.PROTECTED:
            return Outcome(Result.DONE, f"it is {settings.state.standing.value} already")
        progress(0, 0, "shutting down")
        with means.stopped(settings.sources):
            return Outcome(Result.DONE, "it is off")

    def _start(self, step: Step, machine: str | None, progress: Progress) -> Outcome:
        vm = self.plan.vm(step.vm)
        bare = self.means_of(vm.name)
        state = catalog.settings_in_force(bare.store, bare.found).state
        if self.kind is not RunKind.TEST and state.standing is Standing.FAILED_OVER and state.machine is not None:
            return _started(state.machine, "it runs already")
        is_test = self.kind is RunKind.TEST
        means = bare if is_test else mapped(bare, dict(vm.networks))
        number = None if self.kind is RunKind.PLANNED else self.points.get(vm.name)
        kind = FailoverKind(self.kind.value)
        order = Order(kind, number, vm.platform, vm.generation, machine if is_test else None)
        if state.standing is Standing.FAILING_OVER and not is_test and state.machine is not None:
            order = Order(kind if kind is not FailoverKind.PLANNED else None)  # what was begun goes on as it is
        done = failing_over.failover(means, order, progress)
        passed = "".join(f"; point {one.point} was passed over: {one.because}" for one in done.passed_over[:3])
        return _started(done.machine, "".join(f"; {one}" for one in done.notes).removeprefix("; ") + passed)

    def _home(self, step: Step, machine: str | None, progress: Progress) -> Outcome:
        means = self.means_of(step.vm)
        state = catalog.settings_in_force(means.store, means.found).state
        if state.standing is Standing.PROTECTED and not state.beside and self.state.step(step.id).attempts > 1:
            return Outcome(Result.DONE, "it is home already")
        if state.standing is Standing.REPROTECTED:
            look_ahead(means, state, Destination())  # a home disk that is gone is missed before anything is shut down
        done = returning.failback(means, self.bring_of(step.vm), progress=progress)
        left = "".join(f"; {one.name} is on the host {one.host_name} still" for one in done.left)
        point = None if done.point is None else done.point.point
        return Outcome(Result.DONE, f"it is off: start it at home{left}", point=point)

    # -- actions

    def _act(self, step: Step, action: Action) -> Outcome:
        ways: dict[ActionKind, Callable[[Step, Action], Outcome]] = {
            ActionKind.HOST: self._on_host,
            ActionKind.GUEST: self._in_guest,
            ActionKind.AGENT: self._look,
            ActionKind.CONSOLE: self._look,
            ActionKind.TCP: self._await_port,
            ActionKind.CONFIRM: self._confirm,
        }
        return ways[action.kind](step, action)

    def _confirm(self, step: Step, action: Action) -> Outcome:
        answer = self.ask(action.text)
        if answer:
            return Outcome(Result.DONE, "confirmed")
        return Outcome(Result.FAILED, "nobody was there to be asked" if answer is None else "declined", begun=False)

    def _on_host(self, step: Step, action: Action) -> Outcome:
        given = {
            "GODWIT_PLAN": self.plan.name,
            "GODWIT_RUN": str(self.run),
            "GODWIT_KIND": self.kind.value,
            "GODWIT_STEP": step.id,
            "GODWIT_GROUP": step.group,
            "GODWIT_VM": step.vm,
        }
        if step.vm:
            started = self._started_by(step.vm)
            if started is not None and started.machine is not None:
                given |= {"GODWIT_MACHINE": started.machine, "GODWIT_POINT": str(started.point or "")}
        ran = program.run(action.command, given, action.timeout_seconds)
        if not ran.begun:
            return Outcome(Result.FAILED, ran.said, begun=False)
        if ran.status is None:
            return Outcome(Result.FAILED, f"it did not end within {action.timeout_seconds:.0f} s: {ran.said[-400:]}")
        said = f": {ran.said[-400:]}" if ran.said else ""
        return Outcome(Result.DONE if ran.status == 0 else Result.FAILED, f"status {ran.status}{said}")

    def _started_by(self, vm: str) -> Outcome | None:
        return self.state.step(f"vm/{vm}/{StepKind.START}").outcome

    def machine_of(self, vm: str) -> tuple[Means, RecoveryMachine]:
        """Return the machine of a VM in this run. Raises UsageError where there is none."""
        means = self.means_of(vm)
        state = catalog.settings_in_force(means.store, means.found).state
        if self.kind is RunKind.TEST:
            started = self._started_by(vm)
            found = next((one for one in state.beside if started is not None and one.name == started.machine), None)
        else:
            found = state.machine
        if found is None:
            raise UsageError(f"{vm} has no recovery machine in this run")
        return means, found

    def _in_guest(self, step: Step, action: Action) -> Outcome:
        try:
            means, machine = self.machine_of(step.vm)
            channel = means.platform_of(machine).channel(machine.name)
            if channel is None:
                raise PlatformError(f"platform {machine.platform!r} has no way into a guest without a network")
            if not channel.ping(timeout_seconds=min(PING_SECONDS, action.timeout_seconds)):
                raise PlatformError("the guest does not answer", hint="wait for its agent before: 'wait: agent'")
        except (PlatformError, UsageError) as error:
            return Outcome(Result.FAILED, f"{error}; {error.hint}" if error.hint else str(error), begun=False)
        status, _, _ = channel.execute(action.command, timeout_seconds=action.timeout_seconds)
        return Outcome(Result.DONE if status == 0 else Result.FAILED, f"status {status}")

    def _look(self, step: Step, action: Action) -> Outcome:
        means, machine = self.machine_of(step.vm)
        kind = Kind.AGENT if action.kind is ActionKind.AGENT else Kind.CONSOLE
        check = Check(kind, action.name, timeout_seconds=action.timeout_seconds, match=action.text or None)

        def sleep(seconds: float) -> None:
            means.sleep(seconds)
            if self._over.is_set():
                raise PlatformError("it was told to stop waiting")

        examiner = Examiner(
            means.store,
            means.host,
            means.found,
            history.point(means.store, means.found.keys, machine.point),
            means.platform_of(machine),
            machine.name,
            means.host.clock.monotonic() + action.timeout_seconds,
            sleep,
            means.workers,
        )
        seen = examiner.examine(check)
        return Outcome(Result.DONE if seen.passed else Result.FAILED, seen.observed[:400])

    def _await_port(self, step: Step, action: Action) -> Outcome:
        deadline = time.monotonic() + action.timeout_seconds
        while True:
            left = deadline - time.monotonic()
            try:
                with socket.create_connection((action.address, action.port), timeout=max(0.1, min(left, PING_SECONDS))):
                    return Outcome(Result.DONE, "it answers")
            except (OSError, UnicodeError) as error:
                told = f"{action.address}:{action.port} does not answer: {error}"
            if time.monotonic() >= deadline or self._over.wait(ASK_AGAIN_SECONDS):
                return Outcome(Result.FAILED, told)


def _started(machine: RecoveryMachine, note: str) -> Outcome:
    where = f"{machine.name} from point {machine.point} on {machine.platform}, Generation {machine.generation}"
    return Outcome(Result.DONE, f"{where}; {note}" if note else where, machine=machine.name, point=machine.point)
