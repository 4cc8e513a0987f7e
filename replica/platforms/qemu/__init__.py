"""The platform that every host has: recovery machines under plain QEMU."""

from replica.platforms.qemu.platform import QemuPlatform

__all__ = ["QemuPlatform"]
