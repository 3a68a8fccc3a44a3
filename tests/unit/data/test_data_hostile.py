"""Files of strangers, changed at random: a reader returns or refuses with one message, in bounded time and memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from support import hostile
from support.hostile_data import READERS, check

EXAMPLES_A_READER = 1000


@pytest.mark.slow  # the first draws of a strategy take most of it
@pytest.mark.parametrize("name", READERS)
def test_reader(name: str, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    reader = READERS[name]
    (tmp_path / "good").mkdir()

    @hostile.QUICK
    @given(document=reader.documents(tmp_path / "good"))
    def run(document: bytes) -> None:
        check(reader, tmp_path, document)

    with hostile.limited_memory():
        run()


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_readers_of_data_at_length(tmp_path: Path) -> None:
    """Of each reader a thousand; nothing is written outside the folder."""
    pytest.importorskip("tokenizers")
    code = (
        "import sys; from pathlib import Path; from support.hostile_data import campaign; "
        "campaign(Path(sys.argv[1]), int(sys.argv[2]))"
    )
    printed = hostile.run_limited(code, tmp_path, EXAMPLES_A_READER, timeout_s=3000)
    print(printed)
    total = int(printed.rpartition("total: ")[2])
    assert total > 0.9 * EXAMPLES_A_READER * len(READERS)
