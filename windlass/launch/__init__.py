"""Starting workers, one a rank, and the entry that each of them runs."""
