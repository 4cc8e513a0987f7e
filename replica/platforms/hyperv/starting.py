"""The script that makes and starts a machine on a Hyper-V host out of the files that lie beside it.

It is made of the functions by which the platform makes machines itself, and of the same description of the machine:
JSON in plain ASCII, in a here-string that holds no line which could end it.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Final

from replica.hyperv.scripts import STOP_FUNCTION
from replica.platforms.hyperv import description
from replica.platforms.hyperv.scripts import FUNCTIONS
from replica.platforms.platform import MachineSpec

NAME: Final = "start-on-hyperv.ps1"
_UNFIT: Final = re.compile(r'[\x00-\x1f<>:"/\\|?*]')

_HEAD: Final = r"""<#
.SYNOPSIS
Makes a Hyper-V virtual machine of the disk files beside this script, and starts it.

.DESCRIPTION
Copy this folder to the Hyper-V host, and run there, as a Hyper-V administrator:

    powershell.exe -ExecutionPolicy Bypass -File start-on-hyperv.ps1 -Switch NAME

The machine uses the files where they are. Run again, the script makes nothing that is there already: a machine that
it made is started, one that it made halfway is made anew, and any other machine is left alone.
Written by Godwit. Never tried on a real host: read it first.

.PARAMETER Path
The folder with the disk files. [default: the folder of this script]

.PARAMETER Switch
The virtual switch of the machine's network adapters. Without it they are connected to none. A machine for a test
is connected to a private switch only.

.PARAMETER NoStart
Make the machine, and do not start it.
#>
param(
    [string]$Path = $PSScriptRoot,
    [string]$Switch = '',
    [switch]$NoStart
)
$ErrorActionPreference = 'Stop'

# The machine as it was protected: change what is to be otherwise, and not the notes, by which it is found again.
$Description = @'
"""

_TAIL: Final = r"""
if (-not (Get-Module -ListAvailable -Name Hyper-V)) {
    Stop-Godwit 'NotFound' 'this is no Hyper-V host, or its PowerShell module is not installed' 0
}
if (-not (Test-Path -LiteralPath $Path -PathType Container)) {
    Stop-Godwit 'NotFound' ('there is no folder ' + $Path) 0
}
if ($Switch) { Confirm-GodwitSwitch $Switch }

$Machine = ConvertFrom-Json -InputObject $Description
if ($Machine.isolated -and $Switch) {
    foreach ($Found in @(Get-VMSwitch | Where-Object { $_.Name -eq $Switch })) {
        if ([string]$Found.SwitchType -ne 'Private') {
            Stop-Godwit 'Refused' ('this machine is a test, and ' + $Switch + ' is no private switch') 0
        }
    }
}
$Machine.folder = (Get-Item -LiteralPath $Path).FullName.TrimEnd('\')
$Machine.switch = $Switch
foreach ($Disk in @($Machine.disks)) { $Disk.path = $Machine.folder + '\' + $Disk.path }

$Made = $null
foreach ($Vm in @(Find-GodwitMachines $Machine.notes $Machine.name $Machine.folder)) {
    if ([string]$Vm.Notes -eq $Machine.notes) {
        $Made = $Vm
    } elseif ([string]$Vm.State -eq 'Off') {
        Remove-VM -VM $Vm -Force
    } else {
        Stop-Godwit 'Taken' ('the machine ' + $Machine.name + ' was made halfway, and runs') 0
    }
}
if ($null -eq $Made) {
    Confirm-GodwitName $Machine.name
    $Made = New-GodwitMachine $Machine
}
if ((-not $NoStart) -and ([string]$Made.State -ne 'Running')) { Start-VM -VM $Made }
Get-VM -Id $Made.Id
"""


def script(spec: MachineSpec, suffix: str = ".vhdx") -> str:
    """Return the text of the script, plain ASCII, for disk files that end in ``suffix``. Raises PlatformError."""
    # The switch is chosen where the script is run: what a plan calls networks may be anything there.
    machine = description.document(replace(spec, networks=()), "", name=fitting_name(spec.vm_name), suffix=suffix)
    return "".join((_HEAD, json.dumps(machine, indent=1), "\n'@\n", STOP_FUNCTION, FUNCTIONS, _TAIL))


def fitting_name(name: str) -> str:
    """Return a VM's name as Hyper-V can name a folder after it."""
    kept = " ".join(_UNFIT.sub("_", "".join(c if c.isprintable() else "_" for c in name)).split())[:80]
    return kept.strip(" .") or "recovered"
