"""What a Linux system on a disk is and how it starts, found without running it."""

from conversion.linux.inspection import inspect_linux
from conversion.linux.system import LinuxSystem, Partition

__all__ = ["LinuxSystem", "Partition", "inspect_linux"]
