"""Authenticated, framed connections between agents, and from trainers to theirs. Torch-free."""
