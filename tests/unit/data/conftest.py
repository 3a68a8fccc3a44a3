from __future__ import annotations

from data_helpers import make_folder

__all__ = ["make_folder"]
