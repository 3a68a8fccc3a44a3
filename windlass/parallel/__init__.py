"""The ranks along named axes, tensors sharded over them, and the collectives that keep the shards in step."""
