"""The tier in memory as trainers see it: lazy copies, snapshots, and going on from them."""
