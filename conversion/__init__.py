"""Partition tables and boot: what system is on a disk and how its firmware starts it, on any block device."""
