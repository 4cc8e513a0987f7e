"""Windows: its registry hives, its boot store, what tells whether it can start from a BIOS, and the edits for that."""
