"""Passwords in URLs, which are refused where a URL is given: command lines, files and messages show them to others."""

from __future__ import annotations

import re

HOW_INSTEAD = (
    "leave user and password out of the URL and give them to fsspec by variables such as FSSPEC_FTP_USERNAME and "
    "FSSPEC_FTP_PASSWORD, or by a file in ~/.config/fsspec that only you can read"
)

_PASSWORD = re.compile(r"(\w[\w+.-]*://)[^/?#\s]*:[^/?#\s]*@")


def has_password(text: str) -> bool:
    return _PASSWORD.search(text) is not None


def hide_passwords(text: str) -> str:
    """`text` with `(hidden)` in place of the user and the password of each URL that has both."""
    return _PASSWORD.sub(r"\g<1>(hidden)@", text)
