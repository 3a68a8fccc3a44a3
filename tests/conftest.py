"""What all tests share: the lanes, the folder of a session, and the limit of a unit test.

Which tests a lane runs is told by markers alone; docs/design/tests.md says what each is for.
"""

from __future__ import annotations

import gc
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, process_time  # what tests replace in the module is not what they are timed with
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: several ranks share few cores
os.environ.setdefault("WINDLASS_SECRET", "of the tests of windlass")  # else launchers make one in the user's home
sys.path.insert(0, str(Path(__file__).parent))  # so that tests import `support`

# What a shell starts in the background ignores Ctrl-C, and what nohup starts the end of its terminal; so would the
# programs that the tests send these to.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

UNIT_CPU_LIMIT_S, UNIT_LIMIT_S = 1.0, 10.0
"""Of this process's processor time, and in all: other work on the machine makes a test long, not busy."""
NUM_SLOWEST = 10
SHARED = "WINDLASS_TEST_SHARED"
RUN_QUEUE = Path("/proc/thread-self/schedstat")
Taken = tuple[float, float]
"""Seconds of processor time, and of all time but what was waited for a core."""
SHARED_CORE = 2.0
"""Two threads on one core, or neighbours on its caches, take so many times as long."""
LOOP_S = 0.04
"""See `slowness_now`."""
taken_key = pytest.StashKey[Taken]()


def is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    if not is_worker(config):
        os.environ[SHARED] = tempfile.mkdtemp(prefix="windlass-test-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not is_worker(config):
        shutil.rmtree(os.environ.pop(SHARED), ignore_errors=True)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Does what takes seconds once, so that it counts as no test's time: starts the server that ranks are forked from,
    and has the collector pass over what is there for good."""
    if session.config.option.collectonly:
        return
    if "support.ranks" in sys.modules:
        sys.modules["support.ranks"].start_ranks(2)
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    cpu_s, wall_s = clocks()
    yield
    cpu_after_s, wall_after_s = clocks()
    item.stash[taken_key] = (cpu_after_s - cpu_s, wall_after_s - wall_s)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    report = yield
    cpu_s, wall_s = item.stash.get(taken_key, (0.0, 0.0))
    is_limited = "unit" in item.path.parts and not item.get_closest_marker("slow")
    is_over = cpu_s > UNIT_CPU_LIMIT_S or wall_s > UNIT_LIMIT_S
    if call.when == "call" and report.passed and is_limited and is_over:
        # On a core of one's own: beside others, or on a slower one, the same work takes more processor time, too.
        slowness = max(SHARED_CORE, slowness_now())
        is_over = cpu_s > slowness * UNIT_CPU_LIMIT_S or wall_s > slowness * UNIT_LIMIT_S
    if call.when == "call" and report.passed and is_limited and is_over:
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} took {cpu_s:.2f} s of processor time and {wall_s:.2f} s in all, and a unit test may take "
            f"{UNIT_CPU_LIMIT_S:g} and {UNIT_LIMIT_S:g}: make it smaller, or mark it `slow`"
        )
    return report


def slowness_now() -> float:
    """The processor time of a fixed loop, as a multiple of what it took where the limits were set."""
    begin, total = process_time(), 0
    for number in range(1_000_000):
        total += number * number
    return (process_time() - begin) / LOOP_S


def clocks() -> Taken:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime, monotonic() - waited_for_core_s()


def waited_for_core_s() -> float:
    """How long this thread was ready to run and did not, as others had the cores; 0 where the system does not say."""
    try:
        return int(RUN_QUEUE.read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The slowest tests, with what they set up."""
    totals: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                totals[report.nodeid] = totals.get(report.nodeid, 0.0) + report.duration
    slowest = sorted(totals.items(), key=lambda pair: -pair[1])[:NUM_SLOWEST]
    terminalreporter.section(f"slowest {len(slowest)} of {len(totals)} tests")
    for nodeid, total in slowest:
        terminalreporter.write_line(f"{total:7.2f} s  {nodeid}")
