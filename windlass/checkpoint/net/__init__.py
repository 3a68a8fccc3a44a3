"""How agents reach each other, and trainers theirs: authenticated, framed connections. Torch-free."""
