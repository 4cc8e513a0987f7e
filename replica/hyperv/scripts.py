r"""The PowerShell that runs on a Hyper-V host: constants, each with parameters that are never part of its text.

What they call, and where it is documented (all under learn.microsoft.com/windows/win32/hyperv_v2 unless said):

- ``Msvm_VirtualSystemSnapshotService.CreateSnapshot`` with ``Msvm_VirtualSystemSnapshotSettingData`` (ConsistencyLevel
  1 application, 2 crash; GuestBackupType 2 copy, so that the guest's own backups keep their logs). The type 32768, of
  a recovery snapshot, is vendor-specific and named by Microsoft's own sample alone (MicrosoftDocs,
  Virtualization-Documentation, hyperv-samples/taylorb-wmi/xhypervbackup), as is the VirtualSystemType by which such
  snapshots are told: ``Microsoft:Hyper-V:Snapshot:Recovery``.
- ``ConvertToReferencePoint`` of the same service: the snapshot goes, and a ``Msvm_VirtualSystemReferencePoint`` stays,
  with parallel arrays VirtualDiskIdentifiers and ResilientChangeTrackingIdentifiers. ``DestroySnapshot``.
- ``Msvm_VirtualSystemReferencePointService.DestroyReferencePoint``; its parameter's name is the sample's.
- ``Msvm_ImageManagementService.GetVirtualDiskChanges`` (Path, LimitId, ByteOffset, ByteLength), the remote face of
  virtdisk's ``QueryChangesVirtualDisk``.
- Jobs (``Msvm_ConcreteJob``): JobState below 7 is at work, 7 completed, 32768 completed with warnings in the sample.
- Stop-VM asks through the guest's integration service, and waits as long as that takes: so it runs as a job.
- Get-VM, Get-VMSnapshot, Get-VMFirmware and Get-VMNetworkAdapter of the Hyper-V module
  (learn.microsoft.com/powershell/module/hyper-v). VMs and checkpoints are chosen by comparing, never by a name that
  could be a wildcard or a query.

What belongs to us is written down on the host, in a ledger: a file in ProgramData named by the protected VM's id,
only ever appended to by what makes or removes something, a line each, fields divided by tabs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MOST_READ_BYTES: Final = 1 << 20

# Ends a script, or a part of it, with a failure of a kind.
STOP_FUNCTION: Final = r"""
function Stop-Godwit([string]$Kind, [string]$Message, [long]$Code) {
    $Fault = New-Object System.Exception -ArgumentList $Message
    $Fault.Data['GodwitKind'] = $Kind
    $Fault.Data['GodwitCode'] = $Code
    throw $Fault
}
"""

_PRELUDE: Final = r"""
$ErrorActionPreference = 'Stop'
$ProgressPreference = 'SilentlyContinue'
$WarningPreference = 'SilentlyContinue'
$Namespace = 'root\virtualization\v2'
$Recovery = 'Microsoft:Hyper-V:Snapshot:Recovery'

function Write-Godwit([hashtable]$Values) {
    $Values['godwit'] = 1
    ConvertTo-Json -InputObject $Values -Depth 8 -Compress
}

function Write-GodwitFault($Fault) {
    $Kind = 'Failed'
    $Code = [long]$Fault.Exception.HResult
    $Category = [string]$Fault.CategoryInfo.Category
    if ($Category -eq 'PermissionDenied') { $Kind = 'Denied' }
    if ($Category -eq 'ObjectNotFound') { $Kind = 'NotFound' }
    $Inner = $Fault.Exception
    for ($Depth = 0; ($null -ne $Inner) -and ($Depth -lt 8); $Depth++) {
        if ($Inner.Data.Contains('GodwitKind')) {
            $Kind = [string]$Inner.Data['GodwitKind']
            $Code = [long]$Inner.Data['GodwitCode']
            break
        }
        if ($Inner -is [System.UnauthorizedAccessException]) { $Kind = 'Denied' }
        if (($Inner -is [System.IO.FileNotFoundException]) -or ($Inner -is [System.IO.DirectoryNotFoundException])) {
            $Kind = 'NotFound'
        }
        if ($Inner -is [Microsoft.Management.Infrastructure.CimException]) {
            if ([int]$Inner.NativeErrorCode -eq 2) { $Kind = 'Denied' }
            if ([int]$Inner.NativeErrorCode -eq 6) { $Kind = 'NotFound' }
        }
        $Inner = $Inner.InnerException
    }
    Write-Godwit @{ fault = @{ kind = $Kind; code = $Code; message = [string]$Fault.Exception.Message } }
}

function Get-GodwitService([string]$Class) {
    Get-CimInstance -Namespace $Namespace -ClassName $Class
}

function Get-GodwitSystem([string]$VmId) {
    $Found = @(Get-GodwitService 'Msvm_ComputerSystem' | Where-Object { $_.Name -eq $VmId })
    if ($Found.Count -ne 1) { Stop-Godwit 'NotFound' 'there is no such virtual machine' 0 }
    $Found[0]
}

function Get-GodwitSnapshots($System) {
    Get-CimAssociatedInstance -InputObject $System -ResultClassName Msvm_VirtualSystemSettingData `
        -Association Msvm_SnapshotOfVirtualSystem |
        Where-Object { ($null -ne $_) -and ($_.VirtualSystemType -eq $Recovery) }
}

function Get-GodwitReferences($System) {
    Get-CimAssociatedInstance -InputObject $System -ResultClassName Msvm_VirtualSystemReferencePoint `
        -Association Msvm_ReferencePointOfVirtualSystem | Where-Object { $null -ne $_ }
}

function Get-GodwitIds($Instances) {
    foreach ($Instance in $Instances) { [string]$Instance.InstanceID }
}

function Select-GodwitInstance($Instances, [string]$Id) {
    foreach ($Instance in $Instances) { if ([string]$Instance.InstanceID -eq $Id) { $Instance } }
}

function Select-GodwitNew($Instances, [string[]]$Known) {
    foreach ($Id in @(Get-GodwitIds $Instances)) { if ($Known -notcontains $Id) { $Id } }
}

function Format-GodwitReference($Reference) {
    @{
        id = [string]$Reference.InstanceID
        type = [int]$Reference.ReferencePointType
        disks = @($Reference.VirtualDiskIdentifiers | ForEach-Object { [string]$_ })
        changes = @($Reference.ResilientChangeTrackingIdentifiers | ForEach-Object { [string]$_ })
    }
}

function Format-GodwitDrive($Drive) {
    @{
        controller = [string]$Drive.ControllerType
        number = [int]$Drive.ControllerNumber
        location = [int]$Drive.ControllerLocation
        id = [string]$Drive.Id
        path = [string]$Drive.Path
        shared = [bool]$Drive.SupportPersistentReservations
        physical = ($null -ne $Drive.DiskNumber)
    }
}

function Complete-GodwitJob($Result, [string]$TimeoutSeconds) {
    if ($Result.ReturnValue -eq 0) { return $Result.Job }
    if ($Result.ReturnValue -eq 32769) { Stop-Godwit 'Denied' 'access is denied' $Result.ReturnValue }
    if ($Result.ReturnValue -ne 4096) { Stop-Godwit 'Refused' 'the call was refused' $Result.ReturnValue }
    $Deadline = [DateTime]::UtcNow.AddSeconds([int]$TimeoutSeconds)
    $Job = Get-CimInstance -InputObject $Result.Job
    while ($Job.JobState -lt 7) {
        if ([DateTime]::UtcNow -gt $Deadline) { Stop-Godwit 'Timeout' 'the job has not finished in time' 0 }
        Start-Sleep -Milliseconds 200
        $Job = Get-CimInstance -InputObject $Job
    }
    if (($Job.JobState -ne 7) -and ($Job.JobState -ne 32768)) {
        Stop-Godwit 'Refused' ([string]$Job.ErrorDescription) ([long]$Job.ErrorCode)
    }
    $Job
}

function Get-GodwitLedgerPath([string]$Ledger) {
    if ($Ledger -cnotmatch '^[0-9a-f]{32}$') { Stop-Godwit 'Failed' 'the ledger has no possible name' 0 }
    $Folder = [System.IO.Path]::Combine([Environment]::GetFolderPath('CommonApplicationData'), 'Godwit')
    $null = [System.IO.Directory]::CreateDirectory($Folder)
    [System.IO.Path]::Combine($Folder, $Ledger + '.txt')
}

function Add-GodwitLine([string]$Ledger, [string[]]$Fields) {
    $Path = Get-GodwitLedgerPath $Ledger
    [System.IO.File]::AppendAllText($Path, ([string]::Join("`t", $Fields)) + "`n")
}

function Read-GodwitLedger([string]$Ledger) {
    $Path = Get-GodwitLedgerPath $Ledger
    if ([System.IO.File]::Exists($Path)) { [System.IO.File]::ReadAllText($Path) } else { '' }
}
"""


@dataclass(frozen=True, slots=True)
class Script:
    """A script: ``name`` completes the sentence "Hyper-V refuses to…"; all parameters are texts, and must be given."""

    name: str
    parameters: tuple[str, ...]
    text: str


def compose(name: str, parameters: tuple[str, ...], body: str, functions: str = "") -> Script:
    """Return a script of ours: ``functions`` are put before its ``body``, which answers with Write-Godwit."""
    declared = ", ".join(f"[Parameter(Mandatory = $true)] [AllowEmptyString()] [string]${one}" for one in parameters)
    before = f"param({declared})\n{_PRELUDE}{STOP_FUNCTION}{functions}"
    text = f"{before}\ntry {{\n{body}\n}} catch {{\n    Write-GodwitFault $_\n}}\n"
    return Script(name, parameters, text)


DESCRIBE: Final = compose(
    "describe the VM",
    ("Name",),
    r"""
    $Found = @(Get-VM | Where-Object { ($_.Name -eq $Name) -or ([string]$_.Id -eq $Name) })
    $Machines = @(foreach ($Vm in $Found) {
        $Generation = [int]$Vm.Generation
        $Secure = $false
        $Boot = @()
        if ($Generation -eq 2) {
            $Firmware = Get-VMFirmware -VM $Vm
            $Secure = ([string]$Firmware.SecureBoot -eq 'On')
            $Boot = @($Firmware.BootOrder | Where-Object { [string]$_.BootType -eq 'Drive' } |
                ForEach-Object { [string]$_.Device.Id })
        }
        @{
            id = [string]$Vm.Id
            name = [string]$Vm.Name
            version = [string]$Vm.Version
            generation = $Generation
            cpus = [int]$Vm.ProcessorCount
            startup = [long]$Vm.MemoryStartup
            assigned = [long]$Vm.MemoryAssigned
            dynamic = [bool]$Vm.DynamicMemoryEnabled
            secure = $Secure
            boot = $Boot
            drives = @($Vm.HardDrives | Where-Object { $null -ne $_ } | ForEach-Object { Format-GodwitDrive $_ })
            adapters = @(Get-VMNetworkAdapter -VM $Vm | Where-Object { $null -ne $_ } | ForEach-Object {
                @{
                    mac = [string]$_.MacAddress
                    dynamic = [bool]$_.DynamicMacAddressEnabled
                    network = [string]$_.SwitchName
                }
            })
        }
    })
    Write-Godwit @{ machines = $Machines }
""",
)

SURVEY: Final = compose(
    "tell what there is of the VM",
    ("VmId", "Ledger"),
    r"""
    $Vm = Get-VM -Id ([guid]$VmId)
    $System = Get-GodwitSystem $VmId
    Write-Godwit @{
        off = ([string]$Vm.State -eq 'Off')
        version = [string]$Vm.Version
        snapshots = @(Get-GodwitIds @(Get-GodwitSnapshots $System))
        references = @(Get-GodwitReferences $System | ForEach-Object { Format-GodwitReference $_ })
        drives = @($Vm.HardDrives | Where-Object { $null -ne $_ } | ForEach-Object { Format-GodwitDrive $_ })
        ledger = [string](Read-GodwitLedger $Ledger)
    }
""",
)

TAKE: Final = compose(
    "make a recovery checkpoint",
    ("VmId", "Ledger", "Label", "Consistency", "TimeoutSeconds"),
    r"""
    $System = Get-GodwitSystem $VmId
    $Vm = Get-VM -Id ([guid]$VmId)
    $OffBefore = ([string]$Vm.State -eq 'Off')
    $Known = @(Get-GodwitIds @(Get-GodwitSnapshots $System))
    $Class = Get-CimClass -Namespace $Namespace -ClassName Msvm_VirtualSystemSnapshotSettingData
    $Properties = @{ ConsistencyLevel = [byte]$Consistency; IgnoreNonSnapshottableDisks = $true }
    if ($null -ne $Class.CimClassProperties['GuestBackupType']) { $Properties['GuestBackupType'] = [byte]2 }
    $Settings = New-CimInstance -CimClass $Class -ClientOnly -Property $Properties
    $Serializer = [Microsoft.Management.Infrastructure.Serialization.CimSerializer]::Create()
    $None = [Microsoft.Management.Infrastructure.Serialization.InstanceSerializationOptions]::None
    $Bytes = $Serializer.Serialize($Settings, $None)
    Add-GodwitLine $Ledger @('taking', $Label)
    $Result = Invoke-CimMethod -InputObject (Get-GodwitService 'Msvm_VirtualSystemSnapshotService') `
        -MethodName CreateSnapshot -Arguments @{
            AffectedSystem = $System
            SnapshotSettings = [System.Text.Encoding]::Unicode.GetString($Bytes)
            SnapshotType = [uint16]32768
        }
    $Job = Complete-GodwitJob $Result $TimeoutSeconds
    $Made = @(if ($null -ne $Job) {
        Get-CimAssociatedInstance -InputObject $Job -ResultClassName Msvm_VirtualSystemSettingData |
            Where-Object { $_.VirtualSystemType -eq $Recovery } | ForEach-Object { [string]$_.InstanceID }
    })
    if ($Made.Count -ne 1) {
        $Made = @(Select-GodwitNew @(Get-GodwitSnapshots $System) $Known)
    }
    if ($Made.Count -ne 1) { Stop-Godwit 'Failed' 'the checkpoint that was made cannot be told from others' 0 }
    Add-GodwitLine $Ledger @('snapshot', $Label, $Made[0])
    $Guid = $Made[0].Split(':')[-1]
    $Checkpoint = @(Get-VMSnapshot -VM $Vm | Where-Object { [string]$_.Id -eq $Guid })
    if ($Checkpoint.Count -ne 1) { Stop-Godwit 'NotFound' 'the checkpoint that was made is not listed' 0 }
    $Vm = Get-VM -Id ([guid]$VmId)
    Write-Godwit @{
        snapshot = $Made[0]
        off = ($OffBefore -and ([string]$Vm.State -eq 'Off'))
        drives = @($Checkpoint[0].HardDrives | Where-Object { $null -ne $_ } | ForEach-Object { Format-GodwitDrive $_ })
    }
""",
)

NEWEST: Final = compose(
    "find the newest checkpoint",
    ("VmId",),
    r"""
    $Vm = Get-VM -Id ([guid]$VmId)
    $Parent = [string]$Vm.ParentCheckpointId
    $Checkpoint = @(Get-VMSnapshot -VM $Vm | Where-Object { [string]$_.Id -eq $Parent })
    $Off = ([string]$Vm.State -eq 'Off')
    $Drives = @()
    if ($Off) { $Drives = $Vm.HardDrives } elseif ($Checkpoint.Count -eq 1) { $Drives = $Checkpoint[0].HardDrives }
    Write-Godwit @{
        off = $Off
        checkpoint = $(if ($Checkpoint.Count -eq 1) { $Parent } else { '' })
        drives = @($Drives | Where-Object { $null -ne $_ } | ForEach-Object { Format-GodwitDrive $_ })
    }
""",
)

CHANGES: Final = compose(
    "tell what was written",
    ("Path", "Limit", "Offset", "Length", "TimeoutSeconds"),
    r"""
    $Result = Invoke-CimMethod -InputObject (Get-GodwitService 'Msvm_ImageManagementService') `
        -MethodName GetVirtualDiskChanges -Arguments @{
            Path = $Path
            LimitId = $Limit
            ByteOffset = [uint64]$Offset
            ByteLength = [uint64]$Length
        }
    $null = Complete-GodwitJob $Result $TimeoutSeconds
    $Starts = [uint64[]]@()
    $Lengths = [uint64[]]@()
    if ($null -ne $Result.ChangedByteOffsets) { $Starts = [uint64[]]@($Result.ChangedByteOffsets) }
    if ($null -ne $Result.ChangedByteLengths) { $Lengths = [uint64[]]@($Result.ChangedByteLengths) }
    $StartBytes = New-Object byte[] ($Starts.Length * 8)
    $LengthBytes = New-Object byte[] ($Lengths.Length * 8)
    [System.Buffer]::BlockCopy($Starts, 0, $StartBytes, 0, $StartBytes.Length)
    [System.Buffer]::BlockCopy($Lengths, 0, $LengthBytes, 0, $LengthBytes.Length)
    Write-Godwit @{
        processed = [string]$Result.ProcessedByteLength
        starts = [Convert]::ToBase64String($StartBytes)
        lengths = [Convert]::ToBase64String($LengthBytes)
    }
""",
)

CONVERT: Final = compose(
    "make a reference point of the checkpoint",
    ("VmId", "Ledger", "Label", "Snapshot", "TimeoutSeconds"),
    r"""
    $System = Get-GodwitSystem $VmId
    $Found = @(Select-GodwitInstance @(Get-GodwitSnapshots $System) $Snapshot)
    if ($Found.Count -ne 1) { Stop-Godwit 'NotFound' 'the checkpoint is gone' 0 }
    $Known = @(Get-GodwitIds @(Get-GodwitReferences $System))
    Add-GodwitLine $Ledger @('converting', $Label, $Snapshot)
    $Result = Invoke-CimMethod -InputObject (Get-GodwitService 'Msvm_VirtualSystemSnapshotService') `
        -MethodName ConvertToReferencePoint -Arguments @{ AffectedSnapshot = $Found[0] }
    $Job = Complete-GodwitJob $Result $TimeoutSeconds
    $Made = @(if ($null -ne $Job) {
        Get-CimAssociatedInstance -InputObject $Job -ResultClassName Msvm_VirtualSystemReferencePoint |
            ForEach-Object { [string]$_.InstanceID }
    })
    if ($Made.Count -ne 1) {
        $Made = @(Select-GodwitNew @(Get-GodwitReferences $System) $Known)
    }
    if ($Made.Count -ne 1) { Stop-Godwit 'Failed' 'the reference point that was made cannot be told from others' 0 }
    Add-GodwitLine $Ledger @('reference', $Label, $Made[0])
    Write-Godwit @{ reference = $Made[0] }
""",
)

DISCARD: Final = compose(
    "remove the checkpoint",
    ("VmId", "Ledger", "Snapshot", "TimeoutSeconds"),
    r"""
    $System = Get-GodwitSystem $VmId
    $Found = @(Select-GodwitInstance @(Get-GodwitSnapshots $System) $Snapshot)
    if ($Found.Count -eq 1) {
        $Result = Invoke-CimMethod -InputObject (Get-GodwitService 'Msvm_VirtualSystemSnapshotService') `
            -MethodName DestroySnapshot -Arguments @{ AffectedSnapshot = $Found[0] }
        $null = Complete-GodwitJob $Result $TimeoutSeconds
    }
    Add-GodwitLine $Ledger @('gone', $Snapshot)
    Write-Godwit @{ removed = ($Found.Count -eq 1) }
""",
)

FORGET: Final = compose(
    "remove the reference point",
    ("VmId", "Ledger", "Reference", "TimeoutSeconds"),
    r"""
    $System = Get-GodwitSystem $VmId
    $Found = @(Select-GodwitInstance @(Get-GodwitReferences $System) $Reference)
    if ($Found.Count -eq 1) {
        $Result = Invoke-CimMethod -InputObject (Get-GodwitService 'Msvm_VirtualSystemReferencePointService') `
            -MethodName DestroyReferencePoint -Arguments @{ AffectedReferencePoint = $Found[0] }
        $null = Complete-GodwitJob $Result $TimeoutSeconds
    }
    Add-GodwitLine $Ledger @('gone', $Reference)
    Write-Godwit @{ removed = ($Found.Count -eq 1) }
""",
)

COMPACT: Final = compose(
    "write the ledger anew",
    ("Ledger", "Text"),
    r"""
    $Path = Get-GodwitLedgerPath $Ledger
    $Fresh = $Path + '.new'
    [System.IO.File]::WriteAllText($Fresh, $Text)
    if ([System.IO.File]::Exists($Path)) {
        [System.IO.File]::Replace($Fresh, $Path, [NullString]::Value)
    } else {
        [System.IO.File]::Move($Fresh, $Path)
    }
    Write-Godwit @{ }
""",
)

MEASURE: Final = compose(
    "look at a file",
    ("Path",),
    r"""
    $File = [System.IO.File]::Open($Path, 'Open', 'Read', 'ReadWrite, Delete')
    try { Write-Godwit @{ length = [string]$File.Length } } finally { $File.Dispose() }
""",
)

READ: Final = compose(
    "read a file",
    ("Path", "Offset", "Length"),
    r"""
    $File = [System.IO.File]::Open($Path, 'Open', 'Read', 'ReadWrite, Delete')
    try {
        $null = $File.Seek([long]$Offset, 'Begin')
        $Bytes = New-Object byte[] ([int]$Length)
        $Done = 0
        while ($Done -lt $Bytes.Length) {
            $More = $File.Read($Bytes, $Done, $Bytes.Length - $Done)
            if ($More -eq 0) { break }
            $Done += $More
        }
        Write-Godwit @{ data = [Convert]::ToBase64String($Bytes, 0, $Done) }
    } finally { $File.Dispose() }
""",
)

TURN_OFF_FUNCTION: Final = r"""
function Stop-GodwitMachine($Vm) {
    # A saved machine has no power that could be turned off.
    if ([string]$Vm.State -like '*Saved*') {
        Remove-VMSavedState -VM $Vm
    } elseif ([string]$Vm.State -ne 'Off') {
        Stop-VM -VM $Vm -TurnOff -Force
    }
}
"""

# How is 'ask', 'force', or 'look'.
STOP: Final = compose(
    "stop the VM",
    ("VmId", "How", "TimeoutSeconds"),
    r"""
    $Vm = Get-VM -Id ([guid]$VmId)
    $Why = ''
    if (([string]$Vm.State -ne 'Off') -and ($How -ne 'look')) {
        if ($How -eq 'force') {
            Stop-GodwitMachine $Vm
        } else {
            $Job = Stop-VM -VM $Vm -Force -AsJob
            $null = Wait-Job -Job $Job -Timeout ([int]$TimeoutSeconds)
            try { $null = Receive-Job -Job $Job } catch { $Why = [string]$_.Exception.Message }
        }
    }
    Write-Godwit @{ state = [string](Get-VM -Id ([guid]$VmId)).State; why = $Why }
""",
    TURN_OFF_FUNCTION,
)

ALL: Final = (DESCRIBE, SURVEY, TAKE, NEWEST, CHANGES, CONVERT, DISCARD, FORGET, COMPACT, MEASURE, READ, STOP)
