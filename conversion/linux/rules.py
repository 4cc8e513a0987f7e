"""The rules by which a Linux system is refused or warned of, but those of the partition table's names."""

from __future__ import annotations

from collections.abc import Sequence

from conversion.filesystems.filesystem import FileSystem
from conversion.finding import Finding, Severity
from conversion.linux.files import names_in, text_of
from conversion.linux.system import Architecture, GrubStub, Volume
from conversion.linux.volumes import Found


def of_encryption(found: Found, *, has_root: bool, has_boot: bool) -> list[Finding]:
    """LUKS: refused where a TPM opens it or where nothing else could be read, else warned of."""
    findings = []
    for volume, header in found.encrypted:
        evidence = f"LUKS{header.version} {header.uuid}, tokens: {', '.join(header.tokens) or 'none'}"
        if header.needs_tpm:
            findings.append(
                Finding(
                    "luks-tpm",
                    Severity.REFUSAL if not has_root else Severity.WARNING,
                    volume.subject,
                    "This encrypted volume is opened by a TPM, which a Generation 1 machine has not.",
                    evidence,
                    "Add a passphrase or a key server in the guest, and take the TPM away: systemd-cryptenroll "
                    "--wipe-slot=tpm2, or clevis luks unbind.",
                )
            )
        elif has_root:
            findings.append(
                Finding("luks", Severity.NOTE, volume.subject, "This volume is encrypted and is left so.", evidence, "")
            )
        else:
            findings.append(
                Finding(
                    "luks-root",
                    Severity.WARNING,
                    volume.subject,
                    "The root is encrypted: what in it names partitions by their table cannot be seen.",
                    evidence,
                    "Make sure that its /etc/fstab and /etc/crypttab use UUID= only. The passphrase is asked for on "
                    "the console.",
                )
            )
    if found.encrypted and not has_boot:
        findings.append(
            Finding(
                "encrypted-boot",
                Severity.REFUSAL,
                found.encrypted[0][0].subject,
                "The boot configuration is inside of an encrypted volume.",
                "no boot configuration outside of the encrypted volumes",
                "Move /boot to a partition of its own that is not encrypted.",
            )
        )
    return findings


def of_architecture(architecture: Architecture) -> list[Finding]:
    """Only machines of the PC's kind have a BIOS."""
    if architecture in {"x86_64", "i386", "unknown"}:
        return []
    rule, name = ("arm64", "ARM64") if architecture == "aarch64" else ("architecture", "another machine than a PC")
    return [
        Finding(
            rule,
            Severity.REFUSAL,
            "the system",
            f"The system is for {name}; Generation 1 machines are PCs with a BIOS.",
            f"its programs or kernels are for {name}",
            "Recover it as Generation 2 on a host of its kind.",
        )
    ]


def unreadable_root(troubled: Sequence[Volume]) -> Finding:
    """No root file system was found."""
    evidence = "; ".join(f"{volume.subject}: {volume.trouble}" for volume in troubled[:4])
    return Finding(
        "unreadable-root",
        Severity.REFUSAL,
        "the system",
        "No root file system can be read.",
        evidence or "no readable file system holds /etc/os-release or /etc/fstab",
        "Check the file systems in the guest; ext2 to ext4, XFS and btrfs can be read, on partitions, LVM and mirrors.",
    )


def no_boot_configuration(stubs: Sequence[GrubStub]) -> Finding:
    """Nothing says how the system is started."""
    leads = "; ".join(f"{stub.path} leads to {stub.file_system_uuid} {stub.prefix}" for stub in stubs[:4])
    return Finding(
        "no-boot-configuration",
        Severity.REFUSAL,
        "the system",
        "There is no grub.cfg, no Boot Loader Specification entry and no unified kernel image.",
        leads or "none at the usual places of any readable file system",
        "Run update-grub, grub2-mkconfig or bootctl install in the guest.",
    )


def no_kernel() -> Finding:
    """Nothing to start."""
    return Finding(
        "no-kernel",
        Severity.REFUSAL,
        "the system",
        "There is no kernel.",
        "no vmlinuz in /boot or at the top of a boot partition, no unified kernel image",
        "Install a kernel in the guest.",
    )


def of_secure_boot(esps: Sequence[Volume]) -> list[Finding]:
    """A shim says that the machine may have been started with Secure Boot, which a BIOS has not."""
    for volume in esps:
        if volume.file_system is None:
            continue
        for folder in names_in(volume.file_system, "/EFI")[:64]:
            names = {item.name.lower() for item in names_in(volume.file_system, f"/EFI/{folder.name}")}
            if folder.kind == "folder" and "shimx64.efi" in names:
                return [
                    Finding(
                        "secure-boot",
                        Severity.WARNING,
                        volume.subject,
                        "The machine may use Secure Boot; as Generation 1 it starts without.",
                        f"/EFI/{folder.name}/shimx64.efi",
                        "",
                    )
                ]
    return []


def of_initrds(root: FileSystem) -> list[Finding]:
    """An initial RAM disk made for one machine's hardware alone may lack another's drivers."""
    places = ["/etc/initramfs-tools/initramfs.conf", "/etc/initramfs-tools/conf.d/driver-policy"]
    for path in places:
        lines = [line.strip().replace(" ", "") for line in (text_of(root, path) or "").splitlines()]
        if "MODULES=dep" in lines:
            return [_host_only(path, "MODULES=dep")]
    folders = ("/etc/dracut.conf.d", "/usr/lib/dracut/dracut.conf.d")
    configured = [f"{folder}/{item.name}" for folder in folders for item in names_in(root, folder)[:100]]
    for path in [*configured, "/etc/dracut.conf"]:
        lines = [line.strip() for line in (text_of(root, path) or "").splitlines()]
        if any(line.startswith("hostonly=") and "yes" in line for line in lines):
            return [_host_only(path, 'hostonly="yes"')]
    return []


def _host_only(path: str, evidence: str) -> Finding:
    return Finding(
        "initrd-drivers",
        Severity.NOTE,
        path,
        "The initial RAM disk holds drivers of the machine it was made on only: enough for Hyper-V and Azure, which "
        "offer the same disk to both generations, but perhaps not for other hypervisors.",
        evidence,
        "For QEMU and others, build it with all drivers (MODULES=most, hostonly=no).",
    )
