"""Makes the folder of an export or an import, which appears whole or not at all. Torch-free."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from windlass.errors import RunFolderError
from windlass.files import sync_folder
from windlass.os_errors import remedy, said

Report = Callable[[int], None]
"""Is told how many bytes are done, in all."""
UNFINISHED_SUFFIX = ".writing"


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write into, which gets the name `output` when the body ends well, with its names on the disk.

    It is written beside `output` under a name of its own that ends in `.writing`; a kill leaves only that. The body
    syncs the files that it writes.

    Raises:
        RunFolderError: `output` holds something, before anything is written; or the disk is full or refuses.
    """
    try:
        _refuse_filled(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        writing = output.with_name(f"{output.name}.{uuid.uuid4().hex[:8]}{UNFINISHED_SUFFIX}")
        writing.mkdir()
    except OSError as error:
        raise _unwritable(output, error) from error
    try:
        yield writing
        sync_folder(writing)
        _refuse_filled(output)
        writing.rename(output)  # over an empty folder, if there is one
        sync_folder(output.parent)
    except OSError as error:
        shutil.rmtree(writing, ignore_errors=True)
        raise _unwritable(output, error) from error
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise


def not_given(path: Path, error: OSError) -> RunFolderError:
    """A file of a folder that is imported is there, and the system does not give it: that is no damage."""
    return RunFolderError("path", path, f"cannot be read: {said(error)}", remedy(error, "mend that and start again"))


def require_room(output: Path, num_bytes: int) -> None:
    """Before anything is written: raises RunFolderError if `output` is to have more bytes than its disk has left."""
    folder = next(parent for parent in (output.absolute(), *output.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        rule = f"needs {num_bytes:,} bytes, and {free:,} are free there"
        raise RunFolderError("--output", output, rule, "make room, or name a folder on another disk")


def _refuse_filled(output: Path) -> None:
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        what = "holds files" if output.is_dir() else "is not a folder"
        raise RunFolderError("--output", output, f"{what}, and nothing is overwritten", "name a new or an empty folder")


def _unwritable(output: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        "--output",
        output,
        f"cannot be written: {said(error)}",
        remedy(error, "make room or mend its permissions, or name another folder"),
    )
