"""The platform of Hyper-V hosts: recovery machines made of whole VHDX files by PowerShell. Never run against a host."""

from replica.platforms.hyperv.platform import HypervPlatform

__all__ = ["HypervPlatform"]
