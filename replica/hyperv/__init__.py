"""Virtual machines on Hyper-V hosts: asked through PowerShell, tracked by Hyper-V's own record of changes."""
