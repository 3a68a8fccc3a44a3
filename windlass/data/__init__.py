"""Text in, token batches out: sources, tokenizers, preparation to Arrow shards, the resumable loader."""
