"""Runs one rank, forked by a launcher, or as `python -m windlass.launch.worker CONFIG.yaml`."""

from __future__ import annotations

if __name__ == "__main__":
    import windlass.safe_path  # noqa: F401  # before all else

import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.distributed import Store

from windlass import process
from windlass.conf.schema import Config
from windlass.conf.store import load_config
from windlass.data.outputs import refuse_outputs
from windlass.data.prepare import prepared_folder
from windlass.errors import EXIT_FAILURE, EXIT_RESTART, EXIT_STOPPED, EXIT_USER_ERROR, WindlassError
from windlass.files import make_folder, open_growing
from windlass.launch.fork_server import hear_signals
from windlass.launch.torch_store import take_store_variables
from windlass.os_errors import limits_named
from windlass.outcome import OUTCOME_FILE, report_outcome, stop_requested
from windlass.parallel.environment import RankEnvironment
from windlass.parallel.mesh import Mesh, end_groups
from windlass.streams import make_lasting
from windlass.train.build import checkpoint_dir, choose_device, require_compiler
from windlass.train.session import run_session
from windlass.train.signals import StopRequest, late_requests_pass

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15


def run_worker(config: Config) -> int:
    """Trains as one rank of the run that torchrun's environment describes; alone without one.

    Returns:
        The exit code. Errors that a user can mend are printed here, by the first rank of a host or by the only
        one that met them.
    """
    code = _train(config)
    if multiprocessing.parent_process() is None:  # a fork ends without its interpreter
        end_groups()  # here, where nothing of the run is left
    return code


def _train(config: Config) -> int:
    connect = take_store_variables()
    local_rank, mesh = 0, None
    try:
        with limits_named(), StopRequest() as stop:
            hear_signals()
            local_rank = RankEnvironment.read().local_rank
            if config.train.deterministic:
                # cuBLAS has no deterministic mode without it, and reads it when it is first used.
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            device = choose_device(config.train.device)
            if config.train.compile:
                require_compiler(device)
            refuse_outputs(config.data, output_folders(config))
            # Before the ranks meet: preparing much text takes longer than any collective may wait.
            with stop.at_once("the text to be prepared"):
                tokens = prepared_folder(config.data, progress=local_rank == 0)
            mesh = _meet(config, device, stop, connect)
            exit_code = run_session(config, mesh, tokens, stop)
            stop.awaits = "all ranks to end"
            mesh.stop()
        return exit_code
    except WindlassError as error:
        is_alone = mesh is not None and not error.on_all_ranks
        if local_rank == 0 or is_alone:
            sys.stderr.write(f"windlass: error: {error}\n")
        report_outcome(EXIT_USER_ERROR, str(error))
        if is_alone and mesh.world_size > 1:
            # The others wait for this rank in a collective: an exit code that the agent sees ends them at once.
            sys.stderr.flush()
            os._exit(EXIT_USER_ERROR)
        return EXIT_USER_ERROR


def _meet(config: Config, device: torch.device, stop: StopRequest, connect: Callable[[float], Store] | None) -> Mesh:
    environment = RankEnvironment.read()
    if environment.world_size == 1 or OUTCOME_FILE in os.environ:  # its launcher ends it, and knows of the others
        return config.parallel.build(device, connect)
    with stop.at_once(environment.describe()):
        return config.parallel.build(device, connect)


def output_folders(config: Config) -> dict[str, Path | None]:
    """Folders of this machine that a run writes into, by the keys that name them."""
    run_dir, checkpoints = Path(config.run_dir), checkpoint_dir(config)
    return {
        "run_dir": run_dir,
        "checkpoint.dir": checkpoints if isinstance(checkpoints, Path) else None,
        "offload.dir": config.offload.folder(run_dir),
    }


def forked(config_file: str, environment: Mapping[str, str]) -> None:
    """Runs `main` in a child of the fork server, in the environment that its launcher has for it."""
    os.environ.update(environment)
    make_lasting()
    # Its launcher's, too late when it has ended its training. (Not SIG_IGN, which would stay: `signals.handle`.)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    sys.argv = ["windlass.launch.worker", config_file]
    _set_name(f"windlass-{os.environ.get('RANK', '0')}")
    _end_with_launcher()
    try:
        with late_requests_pass():
            code = main()
    except Exception as error:  # as the interpreter would end; multiprocessing adds words of its own
        sys.excepthook(type(error), error, error.__traceback__)
        code = EXIT_FAILURE
    sys.exit(code)


def main() -> int:
    """Runs the process that a launcher started, and leaves an outcome for it: see `windlass.outcome`.

    Returns:
        The code to exit with: where a launcher listens it is 0, or `EXIT_RESTART` to be started again.
    """
    faulthandler.enable()
    _end_with_parent()
    if stop_requested():
        return report_outcome(EXIT_STOPPED, has_begun=False)
    try:
        config = load_config(Path(sys.argv[1]))
    except WindlassError as error:
        sys.stderr.write(f"windlass: error: {error}\n")
        return report_outcome(EXIT_USER_ERROR, str(error))
    if int(os.environ.get("RANK", "0")) != 0:
        _redirect_output(Path(config.run_dir) / "logs" / f"rank{os.environ['RANK']}.log")
    try:
        code = run_worker(config)
        return code if code == EXIT_RESTART else report_outcome(code)
    except KeyboardInterrupt:  # the second Ctrl-C: no restart either
        return report_outcome(EXIT_FAILURE, "interrupted")


def _end_with_parent() -> None:
    """Has the kernel send SIGTERM when the parent dies, so that no rank trains on unseen. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _end_with_launcher() -> None:
    """Has this worker end with its launcher: its parent, the fork server, lives on as long as its children."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None

    def watch() -> None:
        launcher.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def _set_name(name: str) -> None:
    """Sets the name that `ps` and `top` show: all children of a fork server have its command line."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode())


def _redirect_output(path: Path) -> None:
    """Sends stdout and stderr of a rank that is not shown to its log, tracebacks of crashes included."""
    try:
        make_folder(path.parent, path.parent.parent)
        file = open_growing(path)
    except OSError:
        return  # the session finds the same folder unusable and says so
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
    os.close(file)


if __name__ == "__main__":
    process.run(main)
