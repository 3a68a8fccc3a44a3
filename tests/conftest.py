"""What all tests share: the lanes, the folder of a session, and the limit of a unit test.

Which tests a lane runs is told by markers alone; docs/design/tests.md says what each is for.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: several ranks share few cores
sys.path.insert(0, str(Path(__file__).parent))  # so that tests import `support`

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell has what it starts in the background ignore Ctrl-C, and so would the programs that the tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

UNIT_LIMIT_S = 1.0
NUM_SLOWEST = 10
SHARED = "WINDLASS_TEST_SHARED"
RUN_QUEUE = Path("/proc/thread-self/schedstat")
seconds = pytest.StashKey[float]()


def is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    if not is_worker(config):
        os.environ[SHARED] = tempfile.mkdtemp(prefix="windlass-test-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not is_worker(config):
        shutil.rmtree(os.environ.pop(SHARED), ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    begin = time.monotonic() - waited_for_core_s()
    yield
    item.stash[seconds] = time.monotonic() - waited_for_core_s() - begin


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    report = yield
    taken = item.stash.get(seconds, 0.0)
    is_unit = "unit" in item.path.parts
    if (
        call.when == "call"
        and report.passed
        and is_unit
        and taken > UNIT_LIMIT_S
        and not item.get_closest_marker("slow")
    ):
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} took {taken:.2f} s, without what it waited for a core, and a unit test may take "
            f"{UNIT_LIMIT_S:g} s: make it smaller, or mark it `slow`"
        )
    return report


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
