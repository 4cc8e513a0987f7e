"""Drills: test failovers that are checked, cleaned up, and told in evidence that is signed."""
