"""The tier on disk or in an object store: content-hashed chunks, manifests, and readers of them."""
