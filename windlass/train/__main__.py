"""`torchrun --nproc-per-node N -m windlass.train [overrides]`: the same loop under the user's own launcher.

Every rank composes the configuration; none writes anything for Hydra.
"""

from __future__ import annotations

import windlass.safe_path  # noqa: F401  # isort: skip  # before all else

import os
import sys

from windlass import process
from windlass.conf.compose import run_hydra
from windlass.errors import EXIT_USER_ERROR, WindlassError
from windlass.launch.worker import run_worker
from windlass.train.signals import late_requests_pass


def main() -> int:
    try:
        with late_requests_pass():
            return run_hydra(run_worker, "python -m windlass.train", sys.argv[1:])
    except WindlassError as error:
        if (os.environ.get("RANK") or "0") == "0":
            sys.stderr.write(f"windlass: error: {error}\n")
        return EXIT_USER_ERROR


if __name__ == "__main__":
    process.run(main)
