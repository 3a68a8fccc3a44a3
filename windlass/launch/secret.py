"""Finds the secret by which the launchers of a job on several machines know each other, in the environment or a file.

Never from the command line, which every user of a machine can read. Torch-free.
"""

from __future__ import annotations

import os
import secrets
import stat
import time
from contextlib import suppress
from pathlib import Path

from windlass.errors import ConfigError
from windlass.launch.config import LaunchConfig
from windlass.untrusted import Malformed, read_bytes

SECRET = "WINDLASS_SECRET"
MIN_BYTES = 16
OWN_FILE = Path("windlass", "secret")
"""Below the user's configuration folder."""
WRITE_S = 2.0
"""How long another launcher may take to write the file that it has made."""
_MAX_BYTES, _POLL_S = 4096, 0.05


def job_secret(launch: LaunchConfig) -> bytes:
    """Returns what `WINDLASS_SECRET` or else `launch.secret_file` holds, which is made if it is missing. A job of one
    machine that meets nobody has a new one each time.

    Raises:
        ConfigError: it is too short, or others can read it, or there is none and none can be made.
    """
    if launch.address == "auto":
        return secrets.token_bytes(32)
    given = os.environ.get(SECRET)
    if given is not None:
        return _checked(given.strip().encode("utf-8", "surrogateescape"), SECRET, "(hidden)")
    path = _secret_file(launch)
    try:
        return _read(path)
    except FileNotFoundError:
        pass
    try:
        _make(path)
        return _read(path)
    except OSError as error:
        raise _unusable(path, f"cannot be made: {error.strerror or error}") from error


def _secret_file(launch: LaunchConfig) -> Path:
    if launch.secret_file is not None:
        return Path(launch.secret_file).expanduser()
    folder = os.environ.get("XDG_CONFIG_HOME")
    if folder and Path(folder).is_absolute():
        return folder / OWN_FILE
    try:
        return Path.home() / ".config" / OWN_FILE
    except RuntimeError as error:
        raise _unusable("null", "names no file, and there is no home folder to have one in") from error


def _read(path: Path) -> bytes:
    """Raises FileNotFoundError and ConfigError."""
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise ConfigError(
                "launch.secret_file", path, "can be read or changed by other users", f"run `chmod 600 {path}`"
            )
        deadline = time.monotonic() + WRITE_S
        while len(secret := read_bytes(path, _MAX_BYTES).strip()) < MIN_BYTES and time.monotonic() < deadline:
            time.sleep(_POLL_S)  # the launcher of another node has just made it
        return _checked(secret, "launch.secret_file", path)
    except FileNotFoundError:
        raise
    except (OSError, Malformed) as error:
        raise _unusable(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _checked(secret: bytes, key: str, value: object) -> bytes:
    if len(secret) < MIN_BYTES:
        raise ConfigError(
            key,
            value,
            f"the job's secret has {len(secret)} bytes, and fewer than {MIN_BYTES} can be guessed",
            "use the output of `openssl rand -hex 32`",
        )
    return secret


def _make(path: Path) -> None:
    """Unless the launcher of another node has, just now."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_hex(32).encode() + b"\n")
            file.flush()
            os.fsync(descriptor)


def _unusable(path: object, rule: str) -> ConfigError:
    return ConfigError(
        "launch.secret_file",
        path,
        rule,
        f"set launch.secret_file to a file that all nodes have and nobody else can read, or the variable {SECRET}, "
        "to the same on all nodes",
    )
