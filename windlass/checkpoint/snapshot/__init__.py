"""Snapshots in memory as trainers see them: lazy copies, the coordinator of ranks and agents, and recovery."""
