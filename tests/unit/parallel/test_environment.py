"""Which rank a process is, by variables that others have set, or left behind."""

from __future__ import annotations

import os

import pytest

from windlass.errors import ConfigError
from windlass.launch import main as launch_main
from windlass.parallel.environment import VARIABLES, RankEnvironment

PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def read(monkeypatch: pytest.MonkeyPatch, **variables: str) -> RankEnvironment:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return RankEnvironment.read()


@pytest.mark.parametrize(
    "variables",
    [{}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "", "RANK": ""}, {"WORLD_SIZE": "1", "RANK": "0"}, {"LOCAL_RANK": "3"}],
)
def test_one_rank(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, **variables) == RankEnvironment(0, 1, 0, 1)


def test_one_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = read(monkeypatch, RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4", **PLACE)
    assert mine == RankEnvironment(5, 8, 1, 4)
    assert mine.describe() == "8 ranks to meet at 127.0.0.1:29500"
    assert read(monkeypatch, RANK="1", WORLD_SIZE="2", **PLACE) == RankEnvironment(1, 2, 0, 2)


@pytest.mark.parametrize(
    ("variables", "key"),
    [
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"WORLD_SIZE": "2", "RANK": ""}, "RANK"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE"),
        ({"RANK": "3"}, "RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", **PLACE}, "RANK"),
        ({"RANK": "1.5", "WORLD_SIZE": "2", **PLACE}, "RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here"}, "MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "65536"}, "MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4", **PLACE}, "LOCAL_WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "1", **PLACE}, "LOCAL_RANK"),
    ],
)
def test_what_does_not_fit_is_named(variables: dict[str, str], key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as raised:
        read(monkeypatch, **variables)
    assert raised.value.key == key
    assert "unset RANK and WORLD_SIZE" in str(raised.value)


def test_a_local_run_is_one_rank_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the ranks of another launcher would train the same, in the same folder."""
    read(monkeypatch, LOCAL_RANK="3", TORCHELASTIC_RESTART_COUNT="7", WORLD_SIZE="")
    launch_main._be_alone()
    assert not set(VARIABLES) & os.environ.keys()
    read(monkeypatch, RANK="0", WORLD_SIZE="2", **PLACE)
    with pytest.raises(ConfigError, match="launch=local trains on one rank"):
        launch_main._be_alone()
