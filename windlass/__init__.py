"""windlass trains models too big for the machine at hand, and loses nothing when a process or a disk dies."""

__version__ = "0.1.0"
