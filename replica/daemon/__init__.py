"""The agent: replicates the VMs of a host at their intervals, and looks after what it made (docs/daemon.md)."""
