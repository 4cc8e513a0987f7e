"""Failover: a VM started elsewhere, settled for, taken back, replicated from there, and brought home."""
