"""The template of a machine on Azure in both its languages, what the settings may say, and which machines are taken."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from replica.errors import ConfigurationError, PlatformError
from replica.model import Machine, Nic
from replica.platforms.azure.expression import Expression, arm, bicep, quoted
from replica.platforms.azure.settings import read
from replica.platforms.azure.sizes import SIZES, check_disks, size_for
from replica.platforms.azure.template import MachineTemplate, TemplateDisk, template
from replica.platforms.platform import DiskSpec, MachineSpec

GIB = 1 << 30
BLOBS = "https://acct.blob.core.windows.net/recovery"
SUBNET = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Network/virtualNetworks/n/subnets/a"
MACHINE = MachineTemplate(
    "godwit-1a-2b",
    "it's [web] ${1}",
    1,
    "Standard_D2s_v5",
    "acct",
    (TemplateDisk(0, f"{BLOBS}/godwit-1a-2b/disk-0.vhd"), TemplateDisk(3, f"{BLOBS}/godwit-1a-2b/disk-3.vhd")),
    system="linux",
    subnet=SUBNET,
)
TAGS = {"godwit-machine": "godwit-1a-2b", "godwit-vm": "it's [web] ${1}"}
HERE = {"location": "[parameters('location')]", "tags": TAGS}


def resources(machine: MachineTemplate) -> dict[str, dict[str, Any]]:
    document = json.loads(template(machine).arm())
    return {f"{one['type'].rpartition('/')[2]} {one['name']}": one for one in document["resources"]}


def test_the_template_imports_each_blob_and_attaches_the_disks_to_a_machine() -> None:
    document = json.loads(template(MACHINE).arm())
    assert document["$schema"].endswith("/2019-04-01/deploymentTemplate.json#")
    assert document["contentVersion"] == "1.0.0.0"
    assert document["resources"] == [
        {
            "type": "Microsoft.Compute/disks",
            "apiVersion": "2023-10-02",
            "name": "[concat(parameters('machineName'), '-disk-0')]",
            **HERE,
            "sku": {"name": "[parameters('diskSku')]"},
            "properties": {
                "creationData": {
                    "createOption": "Import",
                    "storageAccountId": "[parameters('storageAccountId')]",
                    "sourceUri": "[parameters('disk0Blob')]",
                },
                "osType": "[parameters('osType')]",
                "hyperVGeneration": "V1",
            },
        },
        {
            "type": "Microsoft.Compute/disks",
            "apiVersion": "2023-10-02",
            "name": "[concat(parameters('machineName'), '-disk-3')]",
            **HERE,
            "sku": {"name": "[parameters('diskSku')]"},
            "properties": {
                "creationData": {
                    "createOption": "Import",
                    "storageAccountId": "[parameters('storageAccountId')]",
                    "sourceUri": "[parameters('disk3Blob')]",
                },
            },
        },
        {
            "type": "Microsoft.Network/networkInterfaces",
            "apiVersion": "2023-11-01",
            "name": "[concat(parameters('machineName'), '-nic-0')]",
            **HERE,
            "properties": {
                "ipConfigurations": [
                    {
                        "name": "first",
                        "properties": {
                            "subnet": {"id": "[parameters('subnetId')]"},
                            "privateIPAllocationMethod": "Dynamic",
                        },
                    }
                ]
            },
        },
        {
            "type": "Microsoft.Compute/virtualMachines",
            "apiVersion": "2024-03-01",
            "name": "[parameters('machineName')]",
            "dependsOn": [
                "[resourceId('Microsoft.Compute/disks', concat(parameters('machineName'), '-disk-0'))]",
                "[resourceId('Microsoft.Compute/disks', concat(parameters('machineName'), '-disk-3'))]",
                "[resourceId('Microsoft.Network/networkInterfaces', concat(parameters('machineName'), '-nic-0'))]",
            ],
            **HERE,
            "properties": {
                "hardwareProfile": {"vmSize": "[parameters('vmSize')]"},
                "storageProfile": {
                    "osDisk": {
                        "osType": "[parameters('osType')]",
                        "createOption": "Attach",
                        "caching": "ReadWrite",
                        "managedDisk": {
                            "id": "[resourceId('Microsoft.Compute/disks', "
                            "concat(parameters('machineName'), '-disk-0'))]"
                        },
                    },
                    "dataDisks": [
                        {
                            "lun": 0,
                            "createOption": "Attach",
                            "caching": "None",
                            "managedDisk": {
                                "id": "[resourceId('Microsoft.Compute/disks', "
                                "concat(parameters('machineName'), '-disk-3'))]"
                            },
                        }
                    ],
                },
                "networkProfile": {
                    "networkInterfaces": [
                        {
                            "id": "[resourceId('Microsoft.Network/networkInterfaces', "
                            "concat(parameters('machineName'), '-nic-0'))]",
                            "properties": {"primary": True},
                        }
                    ]
                },
                "diagnosticsProfile": {"bootDiagnostics": {"enabled": True}},
            },
        },
    ]
    assert list(document["outputs"]) == ["machineId", "systemDiskId", "privateAddress"]


def test_the_parameters_are_typed_described_and_given_for_this_machine() -> None:
    made = template(replace(MACHINE, location="westeurope"))
    told = json.loads(made.arm())["parameters"]
    assert all(one["type"] == "string" and one["metadata"]["description"] for one in told.values())
    assert told["osType"]["allowedValues"] == ["Linux", "Windows"]
    assert told["storageAccountId"]["defaultValue"] == "[resourceId('Microsoft.Storage/storageAccounts', 'acct')]"
    given = {name: one["value"] for name, one in json.loads(made.parameter_file())["parameters"].items()}
    assert given == {
        "machineName": "godwit-1a-2b",
        "location": "westeurope",
        "diskSku": "Premium_LRS",
        "osType": "Linux",
        "disk0Blob": f"{BLOBS}/godwit-1a-2b/disk-0.vhd",
        "disk3Blob": f"{BLOBS}/godwit-1a-2b/disk-3.vhd",
        "subnetId": SUBNET,
        "vmSize": "Standard_D2s_v5",
    }
    assert made.missing == ()
    assert template(replace(MACHINE, subnet=None, system=None)).missing == ("osType", "subnetId")


def test_a_test_has_a_network_of_its_own_that_nothing_comes_into_or_out_of() -> None:
    found = resources(replace(MACHINE, closed=True, subnet=None, nics=2))
    group = found["networkSecurityGroups [concat(parameters('machineName'), '-closed')]"]
    rules = [one["properties"] for one in group["properties"]["securityRules"]]
    assert [(one["direction"], one["access"], one["priority"], one["protocol"]) for one in rules] == [
        ("Inbound", "Deny", 100, "*"),
        ("Outbound", "Deny", 100, "*"),
    ]
    assert {one[f"{end}{what}"] for one in rules for end in ("source", "destination") for what in _WHAT} == {"*"}
    network = found["virtualNetworks [concat(parameters('machineName'), '-network')]"]["properties"]
    assert "virtualNetworkPeerings" not in network and len(network["subnets"]) == 1
    subnet = network["subnets"][0]["properties"]
    assert subnet["defaultOutboundAccess"] is False
    assert subnet["networkSecurityGroup"]["id"] == (
        "[resourceId('Microsoft.Network/networkSecurityGroups', concat(parameters('machineName'), '-closed'))]"
    )
    nics = [one for name, one in found.items() if name.startswith("networkInterfaces")]
    assert len(nics) == 2
    for nic in nics:
        place = nic["properties"]["ipConfigurations"][0]["properties"]["subnet"]["id"]
        assert place.startswith("[resourceId('Microsoft.Network/virtualNetworks/subnets',")
        assert "-network" in nic["dependsOn"][0]
    assert "subnetId" not in json.loads(template(replace(MACHINE, closed=True, subnet=None)).arm())["parameters"]
    named = resources(replace(MACHINE, closed=True))
    assert not any(name.startswith("virtualNetworks") for name in named)


_WHAT = ("AddressPrefix", "PortRange")


def test_generation_2_is_said_of_the_disk() -> None:
    found = resources(replace(MACHINE, generation=2))
    disk = found["disks [concat(parameters('machineName'), '-disk-0')]"]
    assert disk["properties"]["hyperVGeneration"] == "V2"


def test_bicep_says_what_the_json_says() -> None:
    """Read as what it is: no Bicep compiler was at hand, so what is held here is that nothing is in one alone."""
    for machine in (MACHINE, replace(MACHINE, closed=True, subnet=None, generation=2, nics=2)):
        made = template(machine)
        text, document = made.bicep(), json.loads(made.arm())
        parameters = re.findall(r"^@description\('.+'\)\n(?:@allowed\(\[[^]]*\]\)\n)?param (\w+) string", text, re.M)
        assert parameters == list(document["parameters"])
        declared = re.findall(r"^resource (\w+) '([\w./]+)@([\d-]+)' = \{$", text, re.M)
        assert [one[1:] for one in declared] == [(one["type"], one["apiVersion"]) for one in document["resources"]]
        assert len({one[0] for one in declared}) == len(declared)
        assert re.findall(r"^output (\w+) string = ", text, re.M) == list(document["outputs"])
        keys = set(re.findall(r"^\s+'?([\w-]+)'?:", text, re.M))
        assert keys == _keys(document["resources"]) - {"type", "apiVersion", "dependsOn"}
        assert text.count("{") == text.count("}") and text.count("[") == text.count("]")
        for symbol, _, _ in declared[:-1]:
            assert re.search(rf"\b{symbol}\.(id|properties)", text), symbol


def _keys(value: Any) -> set[str]:
    if isinstance(value, Mapping):
        return set(value).union(*map(_keys, value.values())) if value else set()
    return set[str]().union(*map(_keys, value)) if isinstance(value, list) and value else set()


def test_text_is_never_taken_for_an_expression() -> None:
    assert arm("[x") == "[[x" and arm(Expression("a", "b")) == "[a]" and bicep(Expression("a", "b")) == "b"
    assert quoted("it's ${a} \\ \n") == "'it\\'s \\${a} \\\\ \\n'"
    assert bicep({"a-b": [1, True, "x"], "c": {}, "d": []}) == (
        "{\n  'a-b': [\n    1\n    true\n    'x'\n  ]\n  c: {}\n  d: []\n}"
    )


# -- settings ---------------------------------------------------------------------------------------------------------


def test_settings_are_read() -> None:
    found = read({"container": f"{BLOBS}/", "resource_group": "dr-rg", "subnet": SUBNET, "uploads": 3})
    assert (found.container.url, found.container.account) == (BLOBS, "acct")
    assert (found.resource_group, found.subnet, found.uploads, found.verify) == ("dr-rg", SUBNET, 3, "sampled")
    emulated = read({"container": "http://127.0.0.1:10000/devstoreaccount1/recovery"}).container
    assert (emulated.url, emulated.account) == ("http://127.0.0.1:10000/devstoreaccount1/recovery", "devstoreaccount1")


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({}, "container: is needed"),
        ({"container": "http://acct.blob.core.windows.net/recovery"}, "should begin with https://"),
        ({"container": "https://acct.blob.core.windows.net"}, "should be https://ACCOUNT"),
        ({"container": "https://acct.blob.core.windows.net/a/b"}, "should be https://ACCOUNT"),
        ({"container": "https://acct.blob.core.windows.net/A"}, "should be https://ACCOUNT"),
        ({"container": "https://[/recovery"}, "is no address"),
        ({"container": "https://acct.blob.core.windows.net:x/recovery"}, "is no address"),
        ({"container": 5}, "container: should be text"),
        ({"container": BLOBS, "colour": "red"}, "'colour' is not a setting: there are container,"),
        ({"container": BLOBS, "subnet": "mine"}, "should be a resource's id"),
        ({"container": BLOBS, "uploads": 0}, "whole number from 1 to 32"),
        ({"container": BLOBS, "uploads": True}, "whole number from 1 to 32"),
        ({"container": BLOBS, "system": "BeOS"}, "linux or windows"),
        ({"container": BLOBS, "verify": "no"}, "sampled or full"),
        ({"container": BLOBS, "resource_group": "a b"}, "not a name that Azure gives"),
        ({"container": BLOBS, "resource_group": "--help"}, "not a name that Azure gives"),
    ],
)
def test_what_the_settings_say_wrong_is_named(table: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(said)) as caught:
        read(table)
    assert "platforms.azure: " in str(caught.value)


def test_a_signature_in_the_address_is_refused_and_not_shown() -> None:
    for url in (f"{BLOBS}?sig=SECRET", "https://user:SECRET@acct.blob.core.windows.net/recovery"):
        with pytest.raises(ConfigurationError, match="no credentials belong here") as caught:
            read({"container": url})
        assert "SECRET" not in str(caught.value)


# -- which machines are taken -----------------------------------------------------------------------------------------


def test_the_least_size_that_will_do_is_chosen() -> None:
    machine = Machine(1, cpus=2, memory_bytes=4 * GIB)
    assert size_for(machine, 0) == "Standard_D2s_v5"
    assert size_for(replace(machine, memory_bytes=9 * GIB), 0) == "Standard_E2s_v5"
    assert size_for(machine, 5) == "Standard_D4s_v5"
    assert size_for(replace(machine, nics=(Nic(),) * 3), 0) == "Standard_D8s_v5"
    assert size_for(replace(machine, cpus=17), 0) == "Standard_E20s_v5"
    assert size_for(machine, 40, "Standard_M128") == "Standard_M128"
    assert size_for(replace(machine, cpus=1), 4, "Standard_D2s_v5") == "Standard_D2s_v5"
    for wanted, disks in ((None, 40), ("Standard_D2s_v5", 5)):
        with pytest.raises(PlatformError) as caught:
            size_for(machine, disks, wanted)
        assert "vm_size" in str(caught.value.hint)
    assert len({one.name for one in SIZES}) == len(SIZES)


def _spec(*disks: DiskSpec, generation: Any = 1) -> MachineSpec:
    return MachineSpec("m", "web", Machine(generation), disks)


def test_disks_that_azure_does_not_take_are_named_all_at_once() -> None:
    good = DiskSpec(0, 2048 * GIB, "ide")
    check_disks(_spec(good, DiskSpec(1, 4095 * GIB, "scsi")))
    check_disks(_spec(DiskSpec(0, 4095 * GIB, "scsi"), generation=2))
    with pytest.raises(PlatformError, match=f"disk 0 has {2048 * GIB + 512} bytes, and a machine of Generation 1 "):
        check_disks(_spec(replace(good, size=2048 * GIB + 512)))
    with pytest.raises(PlatformError) as caught:
        check_disks(_spec(good, DiskSpec(1, 4095 * GIB + 1, "scsi"), DiskSpec(2, GIB, "scsi", sector_size=4096)))
    assert f"disk 1 has {4095 * GIB + 1} bytes, and a page blob" in str(
        caught.value
    ) and "disk 2 has sectors of 4096" in str(caught.value)
    with pytest.raises(PlatformError, match="no disks"):
        check_disks(_spec())


def test_only_what_a_bios_starts_from_is_held_to_what_an_mbr_addresses() -> None:
    large, small = DiskSpec(0, 3000 * GIB, "scsi"), DiskSpec(1, GIB, "scsi")
    check_disks(_spec(large, small))  # nobody has looked yet
    check_disks(_spec(large, small), 1)
    with pytest.raises(PlatformError, match="starts from 2048"):
        check_disks(_spec(large, small), 0)
