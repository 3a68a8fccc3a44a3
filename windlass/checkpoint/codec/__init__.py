"""Erasure codes and checksums, through ISA-L where it is installed."""
