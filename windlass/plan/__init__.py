"""What a run will need, before it begins; and what the machine lacks for it."""
