"""The snapshot agent: the process a node that keeps snapshots in shared memory, and what it is made of. Torch-free."""
