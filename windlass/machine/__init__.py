"""The means of this machine, and their speeds."""
