"""The objectives: what training makes small."""
