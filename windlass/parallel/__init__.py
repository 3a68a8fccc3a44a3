"""How tensors are cut over ranks, and the collectives that keep the cuts in step."""
