"""Health: what a store tells of how each VM is protected, judged by rules, and shown as page, table and metrics."""
