"""Keeps the working directory out of where this process looks for modules. For programs, which import it first.

`python -m` looks there before all other places, so that a corpus of source code, or a folder of a stranger's, with a
`random.py` would run. What PYTHONPATH names stays. Children have PYTHONSAFEPATH, which does the same for them.
"""

from __future__ import annotations

import os
import sys

os.environ["PYTHONSAFEPATH"] = "1"
_first = sys.path[0] if sys.path else None
if not sys.flags.safe_path and _first is not None:
    try:
        _is_working_directory = _first == "" or _first == os.getcwd()  # noqa: PTH109
    except FileNotFoundError:  # it is gone
        _is_working_directory = False
    if _is_working_directory:
        del sys.path[0]
        _checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
        if os.path.realpath(_first) == os.path.realpath(_checkout) and _checkout not in sys.path:
            # windlass itself lies there, and is not installed: last, so that nothing there stands in for a module.
            sys.path.append(_checkout)
            _given = os.environ.get("PYTHONPATH")
            os.environ["PYTHONPATH"] = f"{_given}{os.pathsep}{_checkout}" if _given else _checkout
