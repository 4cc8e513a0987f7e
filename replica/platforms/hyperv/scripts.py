r"""The PowerShell that makes, starts, looks at and removes recovery machines on a Hyper-V host.

Constants, as in ``replica.hyperv.scripts``: what differs comes in as text, in parameters. A machine comes in as a JSON
document (``replica.platforms.hyperv.description``), and is made by ``FUNCTIONS``, which are also what the script that
``replica.platforms.hyperv.starting`` writes beside hydrated files is made of.

What is called, and where it is documented (learn.microsoft.com/powershell/module/hyper-v unless said):

- New-VM makes an IDE DVD drive at 1:0 in Generation 1, a network adapter in both, and neither takes notes nor several
  disks. ``-Path`` is the folder below which a folder of the machine's name is made.
- Set-VM has -AutomaticCheckpointsEnabled from Windows Server 2019 on: it is looked for.
- Remove-VM leaves disk files where they are, and merges what checkpoints left once it has returned.
- Copy-VMFile needs the guest service interface, which is off in a new VM, and has another name in each language: it is
  known by its identifier.
- Invoke-Command -VMId is PowerShell Direct (learn.microsoft.com/virtualization/hyper-v-on-windows/user-guide/
  powershell-direct): guests from Windows 10 and Windows Server 2016 on, with an account of the guest.
- ``Msvm_VirtualSystemManagementService.GetVirtualSystemThumbnailImage``: raw RGB 565
  (learn.microsoft.com/windows/win32/hyperv_v2).
"""

from __future__ import annotations

from typing import Final

from replica.hyperv.scripts import TURN_OFF_FUNCTION, Script, compose

MOST_OUTPUT_BYTES: Final = 16 << 20  # of a program in a guest, for each of its two streams

FUNCTIONS: Final = r"""
function Find-GodwitMachines([string]$Marker, [string]$Name, [string]$Folder) {
    # Ours by its notes; or, where making it was cut off before it had any, by the folder that it lies in.
    Get-VM | Where-Object {
        (Test-GodwitStart ([string]$_.Notes) $Marker) -or
        (($_.Name -eq $Name) -and (Test-GodwitStart ([string]$_.Path) ($Folder + '\')))
    }
}

function Test-GodwitStart([string]$Text, [string]$Start) {
    $Text.StartsWith($Start, [System.StringComparison]::OrdinalIgnoreCase)
}

function Confirm-GodwitName([string]$Name) {
    if (@(Get-VM | Where-Object { $_.Name -eq $Name }).Count -gt 0) {
        Stop-Godwit 'Taken' ('there is a virtual machine ' + $Name + ' already, and it is none of ours') 0
    }
}

function Confirm-GodwitSwitch([string]$Name) {
    if (@(Get-VMSwitch | Where-Object { $_.Name -eq $Name }).Count -eq 0) {
        $There = ''
        foreach ($Found in @(Get-VMSwitch)) { $There = $There + ' [' + [string]$Found.Name + ']' }
        Stop-Godwit 'NotFound' ('there is no switch ' + $Name + '; there are:' + $There) 0
    }
}

function New-GodwitMachine($Machine) {
    foreach ($Disk in @($Machine.disks)) {
        if (-not (Test-Path -LiteralPath $Disk.path -PathType Leaf)) {
            Stop-Godwit 'NotFound' ('there is no file ' + $Disk.path) 0
        }
    }
    $Vm = New-VM -Name $Machine.name -Generation ([int]$Machine.generation) `
        -MemoryStartupBytes ([long]$Machine.memory) -NoVHD -Path $Machine.folder
    Set-VMMemory -VM $Vm -DynamicMemoryEnabled $false
    Set-VMProcessor -VM $Vm -Count ([int]$Machine.cpus)

    # No checkpoints by themselves: they would change the files that are replicated. Recovery checkpoints stay possible.
    $Settings = @{ VM = $Vm; CheckpointType = 'Production' }
    if ((Get-Command -Name Set-VM).Parameters.ContainsKey('AutomaticCheckpointsEnabled')) {
        $Settings['AutomaticCheckpointsEnabled'] = $false
    }
    if ($Machine.isolated) { $Settings['AutomaticStartAction'] = 'Nothing' }
    Set-VM @Settings

    Get-VMNetworkAdapter -VM $Vm | Remove-VMNetworkAdapter
    foreach ($Adapter in @($Machine.adapters)) {
        $Wanted = @{ VM = $Vm; Name = $Adapter.name }
        if ($Machine.switch) { $Wanted['SwitchName'] = $Machine.switch }
        if ($Adapter.switch) { $Wanted['SwitchName'] = $Adapter.switch }
        if ($Adapter.mac) { $Wanted['StaticMacAddress'] = $Adapter.mac }
        Add-VMNetworkAdapter @Wanted
    }

    foreach ($Disk in @($Machine.disks)) {
        if ($Disk.controller -eq 'SCSI') {
            while (@(Get-VMScsiController -VM $Vm).Count -le [int]$Disk.number) { Add-VMScsiController -VM $Vm }
        }
        Add-VMHardDiskDrive -VM $Vm -ControllerType $Disk.controller -ControllerNumber ([int]$Disk.number) `
            -ControllerLocation ([int]$Disk.location) -Path $Disk.path
    }

    if ([int]$Machine.generation -eq 2) {
        $Firmware = @{ VM = $Vm; EnableSecureBoot = 'Off' }
        if ($Machine.secureBoot) {
            $Firmware['EnableSecureBoot'] = 'On'
            $Firmware['SecureBootTemplate'] = $Machine.template
        }
        $First = @(Get-VMHardDiskDrive -VM $Vm | Where-Object {
            ($_.ControllerNumber -eq 0) -and ($_.ControllerLocation -eq 0)
        })
        if ($First.Count -eq 1) { $Firmware['FirstBootDevice'] = $First[0] }
        Set-VMFirmware @Firmware
    }

    # The notes come last: a machine that has them is whole.
    Set-VM -VM $Vm -Notes $Machine.notes
    $Vm
}
"""

_LOOKING: Final = r"""
function Format-GodwitMachine($Vm) {
    @{
        id = [string]$Vm.Id
        name = [string]$Vm.Name
        state = [string]$Vm.State
        notes = [string]$Vm.Notes
        drives = @($Vm.HardDrives | Where-Object { $null -ne $_ } | ForEach-Object { Format-GodwitDrive $_ })
    }
}

function Get-GodwitSettings([string]$VmId) {
    $Found = @(Get-CimAssociatedInstance -InputObject (Get-GodwitSystem $VmId) `
        -ResultClassName Msvm_VirtualSystemSettingData -Association Msvm_SettingsDefineState)
    if ($Found.Count -ne 1) { Stop-Godwit 'NotFound' 'the virtual machine has no settings' 0 }
    $Found[0]
}
"""

_GUEST: Final = r"""
function New-GodwitCredential([string]$User, [string]$Password) {
    # Letter by letter: what is bound to parameters of cmdlets may be written to the host's event log.
    $Secure = New-Object -TypeName System.Security.SecureString
    foreach ($Letter in $Password.ToCharArray()) { $Secure.AppendChar($Letter) }
    New-Object -TypeName System.Management.Automation.PSCredential -ArgumentList $User, $Secure
}
"""

CHECK: Final = compose(
    "make recovery machines",
    ("Folder", "Switch", "TestSwitch", "Others"),
    r"""
    $null = Get-VMHost
    $null = [System.IO.Directory]::CreateDirectory($Folder)
    if ($Switch) { Confirm-GodwitSwitch $Switch }
    foreach ($Name in @((ConvertFrom-Json -InputObject $Others).switches)) { Confirm-GodwitSwitch $Name }
    foreach ($Found in @(Get-VMSwitch | Where-Object { $TestSwitch -and ($_.Name -eq $TestSwitch) })) {
        if ([string]$Found.SwitchType -ne 'Private') {
            Stop-Godwit 'Refused' ('the switch ' + $TestSwitch + ' for tests is not a private one') 0
        }
    }
    Write-Godwit @{ }
""",
    FUNCTIONS,
)

FIND: Final = compose(
    "find the machine",
    ("Marker", "Name", "Folder"),
    r"""
    $Machines = @(Find-GodwitMachines $Marker $Name $Folder | ForEach-Object { Format-GodwitMachine $_ })
    Write-Godwit @{ machines = $Machines; files = [bool](Test-Path -LiteralPath $Folder) }
""",
    FUNCTIONS + _LOOKING,
)

DEFINE: Final = compose(
    "make the machine",
    ("Marker", "Name", "Folder", "Machine", "TestSwitch", "SwitchNotes"),
    r"""
    $Wanted = ConvertFrom-Json -InputObject $Machine
    $Made = $null
    foreach ($Vm in @(Find-GodwitMachines $Marker $Name $Folder)) {
        if ([string]$Vm.Notes -eq $Wanted.notes) {
            $Made = $Vm
        } elseif (Test-GodwitStart ([string]$Vm.Notes) $Marker) {
            Stop-Godwit 'Taken' ('the machine ' + $Name + ' is there, and was made as another') 0
        } elseif ([string]$Vm.State -ne 'Off') {
            Stop-Godwit 'Taken' ('the machine ' + $Name + ' was made halfway, and runs') 0
        } else {
            Remove-VM -VM $Vm -Force
        }
    }
    if ($null -eq $Made) {
        Confirm-GodwitName $Name
        if ($TestSwitch) {
            if (@(Get-VMSwitch | Where-Object { $_.Name -eq $TestSwitch }).Count -eq 0) {
                $null = New-VMSwitch -Name $TestSwitch -SwitchType Private -Notes $SwitchNotes
            }
        }
        $Made = New-GodwitMachine $Wanted
    }
    Write-Godwit @{ id = [string]$Made.Id }
""",
    FUNCTIONS,
)

START: Final = compose(
    "start the machine",
    ("VmId",),
    r"""
    $Vm = Get-VM -Id ([guid]$VmId)
    if ([string]$Vm.State -eq 'Paused') {
        Resume-VM -VM $Vm
    } elseif ([string]$Vm.State -ne 'Running') {
        Start-VM -VM $Vm
    }
    Write-Godwit @{ state = [string](Get-VM -Id ([guid]$VmId)).State }
""",
)

REMOVE: Final = compose(
    "remove the machine",
    ("Marker", "Name", "Folder", "TestSwitch", "SwitchNotes", "TimeoutSeconds"),
    r"""
    foreach ($Vm in @(Find-GodwitMachines $Marker $Name $Folder)) {
        Stop-GodwitMachine $Vm
        Remove-VM -VM $Vm -Force
    }
    # What checkpoints left is merged after the machine is gone, and Hyper-V has the files open until then.
    $Deadline = [DateTime]::UtcNow.AddSeconds([int]$TimeoutSeconds)
    while (Test-Path -LiteralPath $Folder) {
        if ([DateTime]::UtcNow -gt $Deadline) { Stop-Godwit 'Timeout' ('files are in use in ' + $Folder) 0 }
        try { Remove-Item -LiteralPath $Folder -Recurse -Force } catch { Start-Sleep -Milliseconds 500 }
    }
    if ($TestSwitch) {
        $Ours = @(Get-VMSwitch | Where-Object {
            ($_.Name -eq $TestSwitch) -and ([string]$_.Notes -eq $SwitchNotes)
        })
        $Users = @(Get-VMNetworkAdapter -All | Where-Object { $_.SwitchName -eq $TestSwitch })
        if (($Ours.Count -eq 1) -and ($Users.Count -eq 0)) { Remove-VMSwitch -VMSwitch $Ours[0] -Force }
    }
    Write-Godwit @{ left = @(Find-GodwitMachines $Marker $Name $Folder).Count }
""",
    FUNCTIONS + TURN_OFF_FUNCTION,
)

IDENTIFY: Final = compose(
    "tell what the machine is known by",
    ("VmId",),
    r"""
    $Vm = Get-VM -Id ([guid]$VmId)
    $Macs = @(Get-VMNetworkAdapter -VM $Vm | Where-Object { $null -ne $_ } | ForEach-Object { [string]$_.MacAddress })
    Write-Godwit @{ bios = [string](Get-GodwitSettings $VmId).BIOSGUID; macs = $Macs }
""",
    _LOOKING,
)

PICTURE: Final = compose(
    "take a picture of the screen",
    ("VmId", "Width", "Height"),
    r"""
    $Result = Invoke-CimMethod -InputObject (Get-GodwitService 'Msvm_VirtualSystemManagementService') `
        -MethodName GetVirtualSystemThumbnailImage -Arguments @{
            TargetSystem = Get-GodwitSettings $VmId
            WidthPixels = [uint16]$Width
            HeightPixels = [uint16]$Height
        }
    if ($Result.ReturnValue -ne 0) { Stop-Godwit 'Refused' 'there is no picture' $Result.ReturnValue }
    Write-Godwit @{ picture = [Convert]::ToBase64String([byte[]]$Result.ImageData) }
""",
    _LOOKING,
)

PROBE: Final = compose(
    "ask the guest whether it is up",
    ("VmId", "User", "Password"),
    r"""
    $Beat = [string](Get-VM -Id ([guid]$VmId)).Heartbeat
    $Answers = $Beat.StartsWith('Ok')
    if ($Answers -and $User) {
        $Given = New-GodwitCredential $User $Password
        try {
            $Answers = ([int](Invoke-Command -VMId ([guid]$VmId) -Credential $Given -ScriptBlock { 1 }) -eq 1)
        } catch {
            $Answers = $false
        }
    }
    Write-Godwit @{ answers = [bool]$Answers }
""",
    _GUEST,
)

EXECUTE: Final = compose(
    "run a program in the guest",
    ("VmId", "User", "Password", "Program", "Arguments", "Most", "TimeoutSeconds"),
    r"""
    $Given = New-GodwitCredential $User $Password
    $Ended = Invoke-Command -VMId ([guid]$VmId) -Credential $Given `
        -ArgumentList $Program, $Arguments, $Most, $TimeoutSeconds -ScriptBlock {
        param([string]$Program, [string]$Arguments, [string]$Most, [string]$Seconds)
        $ErrorActionPreference = 'Stop'
        $About = New-Object -TypeName System.Diagnostics.ProcessStartInfo -ArgumentList $Program, $Arguments
        $About.UseShellExecute = $false
        $About.CreateNoWindow = $true
        $About.RedirectStandardInput = $true
        $About.RedirectStandardOutput = $true
        $About.RedirectStandardError = $true
        $Process = [System.Diagnostics.Process]::Start($About)
        $Process.StandardInput.Close()
        $Output = New-Object -TypeName System.IO.MemoryStream
        $Errors = New-Object -TypeName System.IO.MemoryStream
        $Reading = $Process.StandardOutput.BaseStream.CopyToAsync($Output)
        $ReadingErrors = $Process.StandardError.BaseStream.CopyToAsync($Errors)
        if (-not $Process.WaitForExit([int]$Seconds * 1000)) {
            return @{ state = 'running' }
        }
        # What it has started in turn may hold its streams open for ever.
        $null = $Reading.Wait(5000)
        $null = $ReadingErrors.Wait(5000)
        if (($Output.Length -gt [long]$Most) -or ($Errors.Length -gt [long]$Most)) {
            return @{ state = 'long' }
        }
        @{
            state = 'ended'
            status = [string]$Process.ExitCode
            output = [Convert]::ToBase64String($Output.ToArray())
            errors = [Convert]::ToBase64String($Errors.ToArray())
        }
    }
    Write-Godwit @{
        state = [string]$Ended.state
        status = [string]$Ended.status
        output = [string]$Ended.output
        errors = [string]$Ended.errors
    }
""",
    _GUEST,
)

FETCH: Final = compose(
    "read a file of the guest",
    ("VmId", "User", "Password", "Path", "Offset", "Length"),
    r"""
    $Given = New-GodwitCredential $User $Password
    $Read = Invoke-Command -VMId ([guid]$VmId) -Credential $Given -ArgumentList $Path, $Offset, $Length -ScriptBlock {
        param([string]$Path, [string]$Offset, [string]$Length)
        $ErrorActionPreference = 'Stop'
        $File = [System.IO.File]::Open($Path, 'Open', 'Read', 'ReadWrite, Delete')
        try {
            $null = $File.Seek([long]$Offset, 'Begin')
            $Bytes = New-Object -TypeName byte[] -ArgumentList ([int]$Length)
            $Done = 0
            while ($Done -lt $Bytes.Length) {
                $More = $File.Read($Bytes, $Done, $Bytes.Length - $Done)
                if ($More -eq 0) { break }
                $Done += $More
            }
            @{ size = [string]$File.Length; data = [Convert]::ToBase64String($Bytes, 0, $Done) }
        } finally { $File.Dispose() }
    }
    Write-Godwit @{ size = [string]$Read.size; data = [string]$Read.data }
""",
    _GUEST,
)

COPY: Final = compose(
    "copy a file into the guest",
    ("VmId", "Source", "Target"),
    r"""
    $Vm = Get-VM -Id ([guid]$VmId)
    $Service = @(Get-VMIntegrationService -VM $Vm | Where-Object {
        [string]$_.Id -like '*6C09BB55-D683-4DA0-8931-C9BF705F6480'
    })
    if ($Service.Count -ne 1) { Stop-Godwit 'NotFound' 'the machine has no guest service interface' 0 }
    if (-not $Service[0].Enabled) { Enable-VMIntegrationService -VMIntegrationService $Service[0] }
    Copy-VMFile -VM $Vm -SourcePath $Source -DestinationPath $Target -FileSource Host -CreateFullPath -Force
    Write-Godwit @{ }
""",
)

ALL: Final[tuple[Script, ...]] = (
    CHECK,
    FIND,
    DEFINE,
    START,
    REMOVE,
    IDENTIFY,
    PICTURE,
    PROBE,
    EXECUTE,
    FETCH,
    COPY,
)
