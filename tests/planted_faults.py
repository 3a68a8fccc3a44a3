"""Plants faults in a copy of the tree, one at a time, and sees whether the tests notice.

    python tests/planted_faults.py              # all faults of tests/planted_faults_list.py
    python tests/planted_faults.py NAME ...     # some of them
    python tests/planted_faults.py --list       # what they are, as a table in Markdown

Each fault is a small change of one file that breaks a promise of the README or the documentation in silence. It is
found if a test that it names fails; an error, no test at all or a timeout finds nothing. The tree itself is only read.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from planted_faults_list import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 300.0
TESTS_PASSED, TESTS_FAILED = 0, 1
"""What pytest exits with."""
NO_LIMIT = '\nUNIT_CPU_LIMIT_S = UNIT_LIMIT_S = float("inf")\n'
"""Added to conftest.py: a fault is found by what a test asserts, and not by how long it takes."""


class BadFault(Exception):
    """A fault that cannot be planted as it is written."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="the faults to plant; all if none is named")
    parser.add_argument("--list", action="store_true", help="print the faults as a Markdown table, and plant none")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(f"there are no faults {', '.join(sorted(unknown))}; --list names all")
    faults = [fault for fault in FAULTS if fault.name in options.names or not options.names]
    if options.list:
        print(table(faults))
        return 0
    try:
        return run(faults)
    except BadFault as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def table(faults: Sequence[Fault]) -> str:
    rows = [f"| {fault.name} | {fault.promise} | {'<br>'.join(f'`{t}`' for t in fault.tests)} |" for fault in faults]
    return "\n".join(["| fault | promise that it breaks | found by |", "| --- | --- | --- |", *rows])


def run(faults: Sequence[Fault]) -> int:
    """Plants each fault; returns 0 if every one is found."""
    for fault in faults:
        planted(fault, ROOT)  # before minutes are spent on the first ones
    with tree() as copy:
        tests = list(dict.fromkeys(test for fault in faults for test in fault.tests))
        begin = time.monotonic()
        exit_code, output = run_tests(copy, tests, timeout_s=TIMEOUT_S * max(1, len(tests)))
        if exit_code != TESTS_PASSED:
            print(f"{output}\nthe tests do not pass without any fault: nothing is planted", file=sys.stderr)
            return 1
        print(f"{len(tests)} tests pass without any fault ({time.monotonic() - begin:.0f} s)", flush=True)
        num_found = sum([is_found(fault, copy) for fault in faults])
    print(f"{num_found} of {len(faults)} planted faults found")
    return 0 if num_found == len(faults) else 1


def is_found(fault: Fault, copy: Path) -> bool:
    """Plants the fault in the copy, runs its tests, and takes it out again; prints a line of what came of it."""
    path = copy / fault.file
    sound, begin = path.read_text(encoding="utf-8"), time.monotonic()
    path.write_text(planted(fault, copy), encoding="utf-8")
    try:
        exit_code, output = run_tests(copy, fault.tests, timeout_s=TIMEOUT_S)
    finally:
        path.write_text(sound, encoding="utf-8")
    found = exit_code == TESTS_FAILED
    word = "found    " if found else "NOT FOUND"
    print(f"{word}  {time.monotonic() - begin:5.1f} s  {fault.name}: {fault.promise}", flush=True)
    if exit_code not in (TESTS_PASSED, TESTS_FAILED):
        what = "the tests took too long" if exit_code is None else f"pytest exited with {exit_code}"
        print(f"{what}:\n{output}", file=sys.stderr)
    return found


def planted(fault: Fault, root: Path) -> str:
    """The text of the fault's file with the fault in it.

    Raises:
        BadFault: the text that it replaces does not occur exactly once.
    """
    text = (root / fault.file).read_text(encoding="utf-8")
    count = text.count(fault.old)
    if count != 1:
        raise BadFault(f"{fault.name}: {fault.file} has the text that it replaces {count} times, and not once")
    return text.replace(fault.old, fault.new)


@contextmanager
def tree() -> Iterator[Path]:
    """A copy of the files that git tracks, as they are now, which is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="planted-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)  # some tests give up their privileges, and must still find the tree
        copy = Path(folder) / "tree"
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copy / name)
        (copy.parent / "tmp").mkdir()
        with (copy / "tests" / "conftest.py").open("a", encoding="utf-8") as file:
            file.write(NO_LIMIT)
        yield copy


def run_tests(copy: Path, tests: Sequence[str], timeout_s: float) -> tuple[int | None, str]:
    """pytest's exit code, None if it took longer than `timeout_s`, and what it printed."""
    # Not pytest's own timeout: that exits as if a test had failed.
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--timeout=0", *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy), "TMPDIR": str(copy.parent / "tmp")}
    process = subprocess.Popen(
        command,
        cwd=copy,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
