"""Export to and import from other formats: Hugging Face folders and torch.distributed.checkpoint."""
