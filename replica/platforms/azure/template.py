"""The template of a machine on Azure: its disks, made of page blobs, its adapters, and the machine on them.

One tree of parameters, resources and outputs is written twice, as ARM's JSON and as Bicep. Neither names a secret:
blobs are named by their addresses and read by Azure through the storage account's own id.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from replica.platforms.azure.expression import Expression, Value, arm, bicep, quoted

SCHEMA: Final = "https://schema.management.azure.com/schemas/2019-04-01/deploymentTemplate.json#"
PARAMETERS_SCHEMA: Final = "https://schema.management.azure.com/schemas/2019-04-01/deploymentParameters.json#"
DISKS: Final = "Microsoft.Compute/disks"
MACHINES: Final = "Microsoft.Compute/virtualMachines"
ADAPTERS: Final = "Microsoft.Network/networkInterfaces"
NETWORKS: Final = "Microsoft.Network/virtualNetworks"
GROUPS: Final = "Microsoft.Network/networkSecurityGroups"
VERSIONS: Final = {
    DISKS: "2023-10-02",
    MACHINES: "2024-03-01",
    ADAPTERS: "2023-11-01",
    NETWORKS: "2023-11-01",
    GROUPS: "2023-11-01",
}
MACHINE_TAG: Final = "godwit-machine"
VM_TAG: Final = "godwit-vm"
LONGEST_TAG: Final = 256
TEST_RANGE: Final = "192.168.250.0/24"


@dataclass(frozen=True, slots=True)
class TemplateDisk:
    """A disk: its number, and the address of the blob that it is made of."""

    number: int
    blob_url: str


@dataclass(frozen=True, slots=True)
class MachineTemplate:
    """What a template is made from. The first disk is the one that the machine starts from.

    ``closed``: the machine has a network of its own, which nothing comes into or out of.
    """

    name: str
    vm_name: str
    generation: Literal[1, 2]
    size: str
    account: str
    disks: tuple[TemplateDisk, ...]
    nics: int = 1
    closed: bool = False
    disk_sku: str = "Premium_LRS"
    system: Literal["linux", "windows"] | None = None
    location: str | None = None
    subnet: str | None = None
    storage_account_id: str | None = None


@dataclass(frozen=True, slots=True)
class _Parameter:
    name: str
    description: str
    default: Value | None = None
    allowed: tuple[str, ...] = ()
    value: str | None = None  # of this machine, in the file of parameters

    @property
    def expression(self) -> Expression:
        return Expression(f"parameters('{self.name}')", self.name)


@dataclass(frozen=True, slots=True)
class _Resource:
    symbol: str
    type: str
    name: Expression
    body: Mapping[str, Value]
    needs: tuple[_Resource, ...] = field(default=())

    @property
    def id(self) -> Expression:
        return Expression(f"resourceId('{self.type}', {self.name.arm})", f"{self.symbol}.id")


@dataclass(frozen=True, slots=True)
class Template:
    """A template, ready to be written."""

    parameters: tuple[_Parameter, ...]
    resources: tuple[_Resource, ...]
    outputs: Mapping[str, tuple[str, Expression]]  # description, value

    def arm(self) -> str:
        """Return the template as ARM's JSON."""
        document: dict[str, Any] = {
            "$schema": SCHEMA,
            "contentVersion": "1.0.0.0",
            "parameters": {one.name: _arm_parameter(one) for one in self.parameters},
            "resources": [_arm_resource(one) for one in self.resources],
            "outputs": {
                name: {"type": "string", "value": arm(value), "metadata": {"description": description}}
                for name, (description, value) in self.outputs.items()
            },
        }
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"

    def bicep(self) -> str:
        """Return the template as Bicep."""
        parts = ["targetScope = 'resourceGroup'"]
        for parameter in self.parameters:
            lines = [f"@description({quoted(parameter.description)})"]
            if parameter.allowed:
                lines.append(f"@allowed({bicep(list(parameter.allowed))})")
            default = "" if parameter.default is None else f" = {bicep(parameter.default)}"
            lines.append(f"param {parameter.name} string{default}")
            parts.append("\n".join(lines))
        for resource in self.resources:
            body = {"name": resource.name, **resource.body}
            version = VERSIONS[resource.type]
            parts.append(f"resource {resource.symbol} '{resource.type}@{version}' = {bicep(body)}")
        for name, (description, value) in self.outputs.items():
            parts.append(f"@description({quoted(description)})\noutput {name} string = {value.bicep}")
        return "\n\n".join(parts) + "\n"

    def parameter_file(self) -> str:
        """Return the parameters of this machine, for either."""
        values = {one.name: {"value": one.value} for one in self.parameters if one.value is not None}
        document = {"$schema": PARAMETERS_SCHEMA, "contentVersion": "1.0.0.0", "parameters": values}
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"

    @property
    def missing(self) -> tuple[str, ...]:
        """Return the parameters that somebody has to give a value yet."""
        return tuple(one.name for one in self.parameters if one.default is None and one.value is None)


def template(machine: MachineTemplate) -> Template:
    """Return the template that makes the machine."""
    return _Builder(machine).build()


def _arm_parameter(parameter: _Parameter) -> dict[str, Any]:
    told: dict[str, Any] = {"type": "string"}
    if parameter.default is not None:
        told["defaultValue"] = arm(parameter.default)
    if parameter.allowed:
        told["allowedValues"] = list(parameter.allowed)
    return {**told, "metadata": {"description": parameter.description}}


def _arm_resource(resource: _Resource) -> dict[str, Any]:
    told: dict[str, Any] = {
        "type": resource.type,
        "apiVersion": VERSIONS[resource.type],
        "name": arm(resource.name),
    }
    if resource.needs:
        told["dependsOn"] = [arm(one.id) for one in resource.needs]
    return {**told, **{name: arm(value) for name, value in resource.body.items()}}


class _Builder:
    """Puts a template together."""

    def __init__(self, machine: MachineTemplate) -> None:
        self._machine = machine
        self._parameters: list[_Parameter] = []
        self._resources: list[_Resource] = []
        self._tags: dict[str, Value] = {
            MACHINE_TAG: machine.name,
            VM_TAG: machine.vm_name[:LONGEST_TAG],
        }

    def build(self) -> Template:
        machine = self._machine
        self._name = self._takes(
            "machineName", "The name of the machine, which those of its parts begin with.", value=machine.name
        )
        here = Expression("resourceGroup().location", "resourceGroup().location")
        self._location = self._takes(
            "location", "The region, which is that of the storage account.", here, value=machine.location
        )
        disks = self._disks()
        adapters = self._adapters()
        vm = self._vm(disks, adapters)
        first = adapters[0]
        address = Expression(
            f"reference({first.id.arm}, '{VERSIONS[ADAPTERS]}').ipConfigurations[0].properties.privateIPAddress",
            f"{first.symbol}.properties.ipConfigurations[0].properties.privateIPAddress",
        )
        outputs = {
            "machineId": ("The machine.", vm.id),
            "systemDiskId": ("The disk that it starts from.", disks[0].id),
            "privateAddress": ("The address of its first adapter.", address),
        }
        return Template(tuple(self._parameters), tuple(self._resources), outputs)

    def _takes(
        self,
        name: str,
        description: str,
        default: Value | None = None,
        *,
        allowed: tuple[str, ...] = (),
        value: str | None = None,
    ) -> Expression:
        parameter = _Parameter(name, description, default, allowed, value)
        self._parameters.append(parameter)
        return parameter.expression

    def _makes(
        self, symbol: str, type_: str, suffix: str, body: Mapping[str, Value], needs: tuple[_Resource, ...] = ()
    ) -> _Resource:
        name = self._name
        if suffix:
            name = Expression(f"concat({self._name.arm}, '{suffix}')", f"'${{{self._name.bicep}}}{suffix}'")
        resource = _Resource(symbol, type_, name, {"location": self._location, "tags": self._tags, **body}, needs)
        self._resources.append(resource)
        return resource

    def _disks(self) -> list[_Resource]:
        machine = self._machine
        sku = self._takes(
            "diskSku",
            "What the disks are kept on.",
            "Premium_LRS",
            value=machine.disk_sku,
        )
        self._system = self._takes(
            "osType",
            "The system that is on the first disk.",
            allowed=("Linux", "Windows"),
            value=None if machine.system is None else machine.system.capitalize(),
        )
        account = quoted(machine.account)
        storage = Expression(
            f"resourceId('Microsoft.Storage/storageAccounts', {account})",
            f"resourceId('Microsoft.Storage/storageAccounts', {account})",
        )
        account_id = self._takes(
            "storageAccountId",
            "The id of the storage account that the blobs are in; without a value one of this resource group.",
            storage,
            value=machine.storage_account_id,
        )
        made = []
        for place, disk in enumerate(machine.disks):
            url = self._takes(
                f"disk{disk.number}Blob",
                f"The address of the page blob that disk {disk.number} is made of.",
                value=disk.blob_url,
            )
            source: dict[str, Value] = {"createOption": "Import", "storageAccountId": account_id, "sourceUri": url}
            properties: dict[str, Value] = {"creationData": source}
            if place == 0:
                properties["osType"] = self._system
                properties["hyperVGeneration"] = f"V{machine.generation}"
            body: dict[str, Value] = {"sku": {"name": sku}, "properties": properties}
            made.append(self._makes(f"disk{disk.number}", DISKS, f"-disk-{disk.number}", body))
        return made

    def _adapters(self) -> list[_Resource]:
        machine = self._machine
        if machine.closed and machine.subnet is None:
            network = self._closed_network()
            subnet = Expression(
                f"resourceId('{NETWORKS}/subnets', {network.name.arm}, 'closed')",
                f"{network.symbol}.properties.subnets[0].id",
            )
            needs: tuple[_Resource, ...] = (network,)
        else:
            subnet = self._takes("subnetId", "The id of the subnet that the machine is in.", value=machine.subnet)
            needs = ()
        made = []
        for number in range(machine.nics):
            place: dict[str, Value] = {"subnet": {"id": subnet}, "privateIPAllocationMethod": "Dynamic"}
            properties: dict[str, Value] = {"ipConfigurations": [{"name": "first", "properties": place}]}
            made.append(self._makes(f"nic{number}", ADAPTERS, f"-nic-{number}", {"properties": properties}, needs))
        return made

    def _closed_network(self) -> _Resource:
        """Return a network that has no peer, and whose one subnet lets nothing in or out."""
        rules: list[Value] = [
            {"name": f"Deny{direction}", "properties": _denied(direction)} for direction in ("Inbound", "Outbound")
        ]
        closed = self._makes("closed", GROUPS, "-closed", {"properties": {"securityRules": rules}})
        subnet: dict[str, Value] = {
            "addressPrefix": TEST_RANGE,
            "defaultOutboundAccess": False,
            "networkSecurityGroup": {"id": closed.id},
        }
        properties: dict[str, Value] = {
            "addressSpace": {"addressPrefixes": [TEST_RANGE]},
            "subnets": [{"name": "closed", "properties": subnet}],
        }
        return self._makes("network", NETWORKS, "-network", {"properties": properties}, (closed,))

    def _vm(self, disks: list[_Resource], adapters: list[_Resource]) -> _Resource:
        machine = self._machine
        size = self._takes("vmSize", "The size of the machine.", machine.size, value=machine.size)
        first: dict[str, Value] = {
            "osType": self._system,
            "createOption": "Attach",
            "caching": "ReadWrite",
            "managedDisk": {"id": disks[0].id},
        }
        others: list[Value] = [
            {"lun": lun, "createOption": "Attach", "caching": "None", "managedDisk": {"id": disk.id}}
            for lun, disk in enumerate(disks[1:])
        ]
        nics: list[Value] = [
            {"id": nic.id, "properties": {"primary": number == 0}} for number, nic in enumerate(adapters)
        ]
        properties: dict[str, Value] = {
            "hardwareProfile": {"vmSize": size},
            "storageProfile": {"osDisk": first, "dataDisks": others},
            "networkProfile": {"networkInterfaces": nics},
            "diagnosticsProfile": {"bootDiagnostics": {"enabled": True}},
        }
        return self._makes("machine", MACHINES, "", {"properties": properties}, (*disks, *adapters))


def _denied(direction: str) -> dict[str, Value]:
    return {
        "priority": 100,
        "direction": direction,
        "access": "Deny",
        "protocol": "*",
        "sourceAddressPrefix": "*",
        "sourcePortRange": "*",
        "destinationAddressPrefix": "*",
        "destinationPortRange": "*",
    }
