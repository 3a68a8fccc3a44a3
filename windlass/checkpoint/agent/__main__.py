"""The agent's process: see `windlass.checkpoint.agent.process`."""

from __future__ import annotations

if __name__ == "__main__":
    import windlass.safe_path  # noqa: F401  # before all else

import os
import sys

from windlass.checkpoint.agent.process import main

if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # without waiting for threads that serve connections
