"""The replication engine: stores, segments, maps, recovery points, cycles, restore and verification."""
