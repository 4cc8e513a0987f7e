"""The cmdlets of a Hyper-V host that is none: what scripts call is done to its VMs, switches and files, or refused.

The refusals are those of the documented cmdlets, in words of their own: the words are in the host's language anyway.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable
from typing import Any

from replica.hyperv.session import SessionError
from tests.support.fake_hyperv import GUEST_SERVICE, FakeDisk, FakeHost, FakeVm
from tests.support.fake_hyperv_guest import guest_types, invoke
from tests.support.fake_hyperv_types import host_types
from tests.support.fake_hyperv_wmi import Wmi
from tests.support.powershell import Cmdlet, PowerShell
from tests.support.powershell_expressions import Block
from tests.support.powershell_values import NotKnownError, PsObject, Table, Thrown
from vhdx.errors import DiskError
from vhdx.formats import open_disk

IDE_DVD = (1, 0)  # where New-VM puts a DVD drive in Generation 1
VIRTUALIZATION = ("Microsoft.HyperV.PowerShell.VirtualizationException",)


def executed(host: FakeHost, text: str, given: dict[str, str]) -> dict[str, Any]:
    """Run a script on the host, and return the document that it prints."""
    printed = shell(host).run(text, given)
    assert len(printed) == 1 and isinstance(printed[0], str), f"a script answers with one document: {printed}"
    document: dict[str, Any] = json.loads(printed[0])
    return document


def shell(host: FakeHost) -> PowerShell:
    """Return a PowerShell on the host."""
    return PowerShell(_Cmdlets(host).table(), {**guest_types(host.here), **Wmi.types(), **host_types(host)})


def refusal(message: str, category: str = "InvalidOperation", code: int = -2146233088) -> Thrown:
    """Return what a cmdlet of Hyper-V refuses with."""
    return Thrown(message, category=category, code=code, types=VIRTUALIZATION)


class View:
    """A VM as cmdlets give it: read anew with each member, by its PowerShell name."""

    def __init__(self, host: FakeHost, vm: FakeVm) -> None:
        self._host, self.vm = host, vm

    id = property(lambda self: self.vm.guid)
    name = property(lambda self: self.vm.name)
    state = property(lambda self: self.vm.state)
    notes = property(lambda self: self.vm.notes)
    path = property(lambda self: self.vm.path)
    harddrives = property(lambda self: [_drive(self.vm, one) for one in self.vm.disks])

    generation = property(lambda self: self.vm.generation)
    version = property(lambda self: self.vm.version)
    processorcount = property(lambda self: self.vm.cpus)
    memorystartup = property(lambda self: self.vm.startup)
    memoryassigned = property(lambda self: self.vm.assigned)
    dynamicmemoryenabled = property(lambda self: self.vm.dynamic)
    parentcheckpointid = property(lambda self: self.vm.snapshots[-1].guid if self.vm.snapshots else None)

    @property
    def heartbeat(self) -> str:
        guest = self.vm.guest
        return "OkApplicationsUnknown" if self.vm.state == "Running" and guest.up and guest.has_integration else ""


def _drive(vm: FakeVm, disk: FakeDisk, path: str | None = None) -> PsObject:
    return PsObject(
        ControllerType=disk.controller,
        ControllerNumber=disk.number,
        ControllerLocation=disk.location,
        Id=disk.identifier(vm.guid, "D"),
        Path=disk.files[-1] if path is None else path,
        SupportPersistentReservations=disk.shared,
        DiskNumber=7 if disk.physical else None,
    )


class _Cmdlets:
    """What each cmdlet does. A method for each, its parameters those that scripts may use."""

    def __init__(self, host: FakeHost) -> None:
        self.host = host

    def table(self) -> dict[str, Cmdlet]:
        both = ("VM",)
        return {
            "Get-VM": Cmdlet(self.get_vm, ("Id",)),
            "Get-VMHost": Cmdlet(lambda run: PsObject(Name="HV1")),
            "Get-VMSwitch": Cmdlet(lambda run: list(self.host.switches)),
            "New-VMSwitch": self.changing("New-VMSwitch", self.new_switch, ("Name", "SwitchType", "Notes")),
            "Remove-VMSwitch": self.changing("Remove-VMSwitch", self.remove_switch, ("VMSwitch",), ("Force",)),
            "New-VM": self.changing(
                "New-VM", self.new_vm, ("Name", "Generation", "MemoryStartupBytes", "Path"), ("NoVHD",)
            ),
            "Set-VM": self.changing("Set-VM", self.set_vm, (*both, *self._set_vm_parameters())),
            "Set-VMMemory": self.changing("Set-VMMemory", self.set_memory, (*both, "DynamicMemoryEnabled")),
            "Set-VMProcessor": self.changing("Set-VMProcessor", self.set_processor, (*both, "Count")),
            "Set-VMFirmware": self.changing(
                "Set-VMFirmware",
                self.set_firmware,
                (*both, "EnableSecureBoot", "SecureBootTemplate", "FirstBootDevice"),
            ),
            "Get-VMSnapshot": Cmdlet(self.get_snapshots, both),
            "Get-VMFirmware": Cmdlet(self.get_firmware, both),
            "Get-VMNetworkAdapter": Cmdlet(self.get_adapters, both, ("All",)),
            "Add-VMNetworkAdapter": self.changing(
                "Add-VMNetworkAdapter", self.add_adapter, (*both, "Name", "SwitchName", "StaticMacAddress")
            ),
            "Remove-VMNetworkAdapter": self.changing(
                "Remove-VMNetworkAdapter", self.remove_adapter, ("VMNetworkAdapter",), pipeline="VMNetworkAdapter"
            ),
            "Get-VMScsiController": Cmdlet(lambda run, vm: [PsObject()] * vm.vm.scsi, both),
            "Add-VMScsiController": self.changing("Add-VMScsiController", self.add_controller, both),
            "Get-VMHardDiskDrive": Cmdlet(lambda run, vm: vm.harddrives, both),
            "Add-VMHardDiskDrive": self.changing(
                "Add-VMHardDiskDrive",
                self.add_disk,
                (*both, "ControllerType", "ControllerNumber", "ControllerLocation", "Path"),
            ),
            "Start-VM": self.changing("Start-VM", self.start, both),
            "Resume-VM": self.changing("Resume-VM", self.resume, both),
            "Stop-VM": self.changing("Stop-VM", self.stop, both, ("TurnOff", "Force", "AsJob")),
            "Remove-VMSavedState": self.changing("Remove-VMSavedState", self.remove_saved, both),
            "Remove-VM": self.changing("Remove-VM", self.remove, both, ("Force",)),
            "Wait-Job": Cmdlet(lambda run, job, timeout: None, ("Job", "Timeout")),
            "Receive-Job": Cmdlet(self.receive, ("Job",)),
            "Get-VMIntegrationService": Cmdlet(self.get_integration, both),
            "Enable-VMIntegrationService": self.changing(
                "Enable-VMIntegrationService", self.enable_integration, ("VMIntegrationService",)
            ),
            "Copy-VMFile": Cmdlet(
                self.copy, (*both, "SourcePath", "DestinationPath", "FileSource"), ("CreateFullPath", "Force")
            ),
            "Invoke-Command": Cmdlet(self.invoke, ("VMId", "Credential", "ScriptBlock", "ArgumentList")),
            **Wmi(self.host).table(),
            "Get-Command": Cmdlet(self.get_command, ("Name",)),
            "Get-Module": Cmdlet(lambda run, name, list_available: PsObject(Name=name), ("Name",), ("ListAvailable",)),
            "Get-Item": Cmdlet(lambda run, literal_path: PsObject(FullName=literal_path), ("LiteralPath",)),
            "Test-Path": Cmdlet(self.test_path, ("LiteralPath", "PathType")),
            "Remove-Item": self.changing("Remove-Item", self.remove_item, ("LiteralPath",), ("Recurse", "Force")),
            "Start-Sleep": Cmdlet(self.sleep, ("Milliseconds",)),
            "New-Object": Cmdlet(_new_object, ("TypeName", "ArgumentList")),
            "ConvertFrom-Json": Cmdlet(lambda run, input_object: _objects(json.loads(input_object)), ("InputObject",)),
            "ConvertTo-Json": Cmdlet(_to_json, ("InputObject", "Depth"), ("Compress",)),
        }

    def changing(
        self,
        name: str,
        work: Callable[..., Any],
        parameters: tuple[str, ...],
        switches: tuple[str, ...] = (),
        pipeline: str = "",
    ) -> Cmdlet:
        """Return a cmdlet that changes the host, which may end before it."""

        def run(shell_: Any, **given: Any) -> Any:
            self.host.done.append(name)
            if len(self.host.done) == self.host.dies_at:
                raise SessionError("the host is gone")
            return work(shell_, **given)

        return Cmdlet(run, parameters, switches, pipeline)

    def _set_vm_parameters(self) -> tuple[str, ...]:
        known = ("Notes", "CheckpointType", "AutomaticStartAction")
        return known if self.host.is_2016 else (*known, "AutomaticCheckpointsEnabled")

    # -- machines

    def get_vm(self, run: Any, id: str | None = None) -> list[View]:  # noqa: A002
        found = [View(self.host, one) for one in self.host.vms if id is None or one.guid == id]
        if id is not None and not found:
            raise refusal(f'Der virtuelle Computer mit der ID "{id}" wurde nicht gefunden.', "InvalidArgument")
        return found

    def new_vm(
        self, run: Any, name: str, generation: int, memory_startup_bytes: int, path: str, no_vhd: bool
    ) -> list[View]:
        assert no_vhd
        if generation not in (1, 2) or memory_startup_bytes % (2 << 20) or memory_startup_bytes < 32 << 20:
            raise refusal(f"The value {memory_startup_bytes} is not valid.", "InvalidArgument")
        if set(name) & set('<>:"/\\|?*'):
            raise refusal(f"Failed to create a new virtual machine: the name {name} is not valid.")
        folder = f"{path}\\{name}"
        self.host.here(f"{folder}\\Virtual Machines").mkdir(parents=True, exist_ok=True)
        vm = self.host.add_vm(name, generation=generation, startup=memory_startup_bytes, off=True, cpus=1, path=folder)
        vm.settings = {"AutomaticCheckpointsEnabled": True, "SecureBoot": "On", "bios": str(uuid.uuid4()).upper()}
        vm.adapters = [{"name": "Network Adapter", "mac": "000000000000", "dynamic": True, "network": ""}]
        return [View(self.host, vm)]

    def set_vm(self, run: Any, vm: View, notes: str | None = None, **others: Any) -> None:
        if notes is not None:
            vm.vm.notes = notes
        for name, value in others.items():
            wanted = {"checkpoint_type": ("Production", "ProductionOnly", "Standard", "Disabled")}.get(name)
            if wanted and value not in wanted:
                raise refusal(f"Cannot bind parameter {name}.", "InvalidArgument")
            vm.vm.settings[name] = value

    def _off(self, view: View) -> FakeVm:
        if view.vm.state != "Off":
            raise refusal("Der Vorgang kann im aktuellen Zustand des virtuellen Computers nicht ausgeführt werden.")
        return view.vm

    def set_memory(self, run: Any, vm: View, dynamic_memory_enabled: bool) -> None:
        self._off(vm).dynamic = dynamic_memory_enabled

    def set_processor(self, run: Any, vm: View, count: int) -> None:
        if not 1 <= count <= 240:
            raise refusal("The number of virtual processors is out of range.", "InvalidArgument")
        self._off(vm).cpus = count

    def set_firmware(
        self,
        run: Any,
        vm: View,
        enable_secure_boot: str,
        secure_boot_template: str | None = None,
        first_boot_device: PsObject | None = None,
    ) -> None:
        if vm.vm.generation != 2:
            raise refusal("Secure Boot and boot order are of virtual machines of Generation 2.", "InvalidArgument")
        vm.vm.secure = enable_secure_boot == "On"
        vm.vm.settings["template"] = secure_boot_template
        vm.vm.settings["first"] = None if first_boot_device is None else first_boot_device.Path  # type: ignore[attr-defined]

    def start(self, run: Any, vm: View) -> None:
        machine = vm.vm
        if machine.startup > self.host.memory:
            raise refusal(
                f'"{machine.name}" konnte nicht gestartet werden: nicht genug Arbeitsspeicher', code=-2147023446
            )
        for disk in machine.disks:
            try:
                open_disk(self.host.here(disk.files[-1])).close()
            except (OSError, DiskError) as error:
                raise refusal(f"Attachment '{disk.files[-1]}' could not be opened.", code=-2147024894) from error
        machine.off, machine.held = False, ""

    def resume(self, run: Any, vm: View) -> None:
        if vm.vm.state != "Paused":
            raise refusal("The operation cannot be performed in the current state.")
        vm.vm.held = ""

    def stop(
        self, run: Any, vm: View, turn_off: bool = False, force: bool = False, as_job: bool = False
    ) -> PsObject | None:
        assert force, "it would ask, and nobody is there"
        machine, guest = vm.vm, vm.vm.guest
        job = PsObject(State="Completed", Error=None)
        if machine.state == "Saved":
            raise refusal("The operation cannot be performed in the current state.")
        if turn_off:
            machine.off, machine.held = True, ""
        elif not guest.has_integration or not guest.up:
            job.Error = refusal("Die Herunterfahrkomponente ist nicht verfügbar.", code=-2143878880)  # type: ignore[attr-defined]
        elif guest.shuts_down_after == 1:
            machine.off = True
        elif guest.shuts_down_after:
            guest.shuts_down_after -= 1
        self.host.now += 1000
        return job if as_job else None

    def remove_saved(self, run: Any, vm: View) -> None:
        if vm.vm.state != "Saved":
            raise refusal("The virtual machine has no saved state.")
        vm.vm.off, vm.vm.held = True, ""

    def receive(self, run: Any, job: PsObject) -> None:
        if job.Error is not None:  # type: ignore[attr-defined]
            raise job.Error  # type: ignore[attr-defined]

    def remove(self, run: Any, vm: View, force: bool = False) -> None:
        assert force, "it would ask, and nobody is there"
        machine = self._off(vm)
        self.host.vms.remove(machine)

    def get_snapshots(self, run: Any, vm: View) -> list[PsObject]:
        return [
            PsObject(
                Id=one.guid,
                HardDrives=[_drive(vm.vm, disk, path) for disk, path in zip(vm.vm.disks, one.frozen, strict=True)],
            )
            for one in vm.vm.snapshots
        ]

    def get_firmware(self, run: Any, vm: View) -> PsObject:
        if vm.vm.generation != 2:
            raise refusal("A virtual machine of Generation 1 has no such firmware.", "InvalidArgument")
        order = [PsObject(BootType="Drive", Device=_drive(vm.vm, one)) for one in reversed(vm.vm.disks)]
        order.insert(0, PsObject(BootType="Network", Device=PsObject(Id="an adapter")))
        return PsObject(SecureBoot="On" if vm.vm.secure else "Off", BootOrder=order)

    # -- networks

    def new_switch(self, run: Any, name: str, switch_type: str, notes: str) -> PsObject:
        made = PsObject(Name=name, SwitchType=switch_type, Notes=notes)
        self.host.switches.append(made)
        return made

    def remove_switch(self, run: Any, vm_switch: PsObject, force: bool) -> None:
        self.host.switches.remove(vm_switch)

    def get_adapters(self, run: Any, vm: View | None = None, all: bool = False) -> list[Any]:  # noqa: A002
        machines = [vm.vm] if vm is not None else self.host.vms
        assert vm is not None or all
        return [
            PsObject(
                vm=one,
                adapter=each,
                Name=each.get("name"),
                MacAddress=each["mac"],
                DynamicMacAddressEnabled=each["dynamic"],
                SwitchName=each["network"],
            )
            for one in machines
            for each in one.adapters
        ]

    def add_adapter(self, run: Any, vm: View, name: str, switch_name: str = "", static_mac_address: str = "") -> None:
        if switch_name and all(one.Name != switch_name for one in self.host.switches):
            raise refusal(f'Hyper-V konnte keinen Switch mit dem Namen "{switch_name}" finden.', "InvalidArgument")
        if static_mac_address and (len(static_mac_address) != 12 or set(static_mac_address) - set("0123456789ABCDEF")):
            raise refusal("The MAC address is not valid.", "InvalidArgument")
        if len(vm.vm.adapters) >= 8:
            raise refusal("The maximum number of network adapters was reached.")
        vm.vm.adapters.append(
            {
                "name": name,
                "mac": static_mac_address or "000000000000",
                "dynamic": not static_mac_address,
                "network": switch_name,
            }
        )

    def remove_adapter(self, run: Any, vm_network_adapter: PsObject) -> None:
        vm_network_adapter.vm.adapters.remove(vm_network_adapter.adapter)  # type: ignore[attr-defined]

    # -- disks

    def add_controller(self, run: Any, vm: View) -> None:
        if self._off(vm).scsi >= 4:
            raise refusal("The maximum number of SCSI controllers was reached.")
        vm.vm.scsi += 1

    def add_disk(
        self, run: Any, vm: View, controller_type: str, controller_number: int, controller_location: int, path: str
    ) -> None:
        machine, place = vm.vm, (controller_number, controller_location)
        is_ide = controller_type == "IDE"
        fits = (machine.generation == 1 and max(place) < 2) if is_ide else controller_number < machine.scsi
        taken = [(one.number, one.location) for one in machine.disks if one.controller == controller_type]
        if is_ide:
            taken.append(IDE_DVD)
        if not fits or place in taken or controller_location > 63:
            raise refusal(f"{controller_type} {place} cannot take a drive.", "InvalidArgument")
        try:
            with open_disk(self.host.here(path)) as disk:
                content = bytearray(disk.read_at(0, disk.size))
        except (OSError, DiskError) as error:
            raise refusal(f"'{path}' cannot be attached.", "ObjectNotFound", -2147024894) from error
        owner = next((one.controller_id for one in machine.disks if one.controller == controller_type), None)
        machine.disks.append(
            FakeDisk(
                self.host, controller_type, *place, len(content), [path], content, owner or str(uuid.uuid4()).upper()
            )
        )

    # -- guests

    def get_integration(self, run: Any, vm: View) -> list[PsObject]:
        return [
            PsObject(
                vm=vm.vm, Id=f"Microsoft:{vm.vm.guid.upper()}\\{one}", Name="Gastdienstschnittstelle", Enabled=is_on
            )
            for one, is_on in vm.vm.integration.items()
        ]

    def enable_integration(self, run: Any, vm_integration_service: PsObject) -> None:
        vm_integration_service.vm.integration[GUEST_SERVICE] = True  # type: ignore[attr-defined]

    def copy(
        self,
        run: Any,
        vm: View,
        source_path: str,
        destination_path: str,
        file_source: str,
        create_full_path: bool = False,
        force: bool = False,
    ) -> None:
        assert file_source == "Host"
        guest = vm.vm.guest
        if vm.state != "Running" or not guest.up or not vm.vm.integration[GUEST_SERVICE]:
            raise refusal("Das Kopieren von Dateien auf den Gast konnte nicht initiiert werden.", code=-2147024875)
        if destination_path in guest.files and not force:
            raise refusal("The file exists.", code=-2147024816)
        if not self.host.here(source_path).is_file():
            raise refusal(f"'{source_path}' was not found on the host.", "ObjectNotFound", -2147024894)
        guest.files[destination_path] = self.host.here(source_path).read_bytes()

    def invoke(
        self, run: Any, vm_id: str, credential: PsObject, script_block: Block, argument_list: Any = ()
    ) -> list[Any]:
        arguments = argument_list if isinstance(argument_list, list) else list(argument_list)
        view = self.get_vm(run, vm_id)[0]
        if view.state != "Running" or not view.vm.guest.up or not view.vm.guest.windows:
            raise Thrown(
                "Der virtuelle Computer kann nicht erreicht werden.",
                category="OpenError",
                types=("System.Management.Automation.Remoting.PSDirectException",),
            )
        return invoke(view.vm.guest, credential, script_block, arguments, self.table())

    # -- the rest

    def get_command(self, run: Any, name: str) -> PsObject:
        assert name == "Set-VM"
        return PsObject(Parameters=Table.fromkeys(self._set_vm_parameters()))

    def test_path(self, run: Any, literal_path: str, path_type: str = "Any") -> bool:
        here = self.host.here(literal_path)
        return {"Any": here.exists, "Leaf": here.is_file, "Container": here.is_dir}[path_type]()

    def remove_item(self, run: Any, literal_path: str, recurse: bool, force: bool) -> None:
        assert recurse and force
        if self.host.busy:
            self.host.busy -= 1
            raise Thrown("Der Prozess kann nicht auf die Datei zugreifen.", category="WriteError", code=-2147024864)
        shutil.rmtree(self.host.here(literal_path))

    def sleep(self, run: Any, milliseconds: int) -> None:
        self.host.now += milliseconds


def _new_object(run: Any, type_name: str, argument_list: Any = None) -> Any:
    given = [] if argument_list is None else argument_list if isinstance(argument_list, list) else [argument_list]
    low = type_name.lower().removeprefix("system.")
    if low == "exception":
        return Thrown(given[0], category="OperationStopped")
    if low == "byte[]":
        return bytearray(given[0])
    if low in run.shell.types:
        return run.shell.types[low](*given)
    raise NotKnownError(f"there is no type {type_name}")


def _objects(value: Any) -> Any:
    if isinstance(value, dict):
        return PsObject(**{key: _objects(one) for key, one in value.items()})
    return [_objects(one) for one in value] if isinstance(value, list) else value


def _to_json(run: Any, input_object: Any, depth: int, compress: bool) -> str:
    def plain(value: Any, left: int) -> Any:
        assert left > 0, "too deep: it would be cut off"
        if isinstance(value, dict):
            return {key: plain(one, left - 1) for key, one in value.items()}
        if isinstance(value, list):
            return [plain(one, left - 1) for one in value]
        assert value is None or isinstance(value, bool | int | str), f"{value!r} is no plain value"
        return value

    return json.dumps(plain(input_object, depth + 1), ensure_ascii=False)
