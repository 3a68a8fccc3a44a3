from __future__ import annotations

import pickle

import pytest

from windlass import errors
from windlass.errors import ConfigError, RunFolderError, WindlassError, require


def test_a_message_says_key_value_rule_and_fix() -> None:
    error = ConfigError("train.steps", 0, "must be at least 1", "set train.steps=300")
    assert str(error) == "train.steps=0: must be at least 1. Fix: set train.steps=300."


@pytest.mark.parametrize(
    "kind",
    [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, WindlassError)],
)
def test_errors_travel_between_processes(kind: type[WindlassError]) -> None:
    error = kind("key", 3, "rule", "fix")
    copy = pickle.loads(pickle.dumps(error))  # our own bytes
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert (copy.key, copy.value, copy.rule, copy.fix) == ("key", 3, "rule", "fix")


def test_require_raises_only_where_the_condition_fails() -> None:
    require(True, "key", 1, "rule", "fix")
    with pytest.raises(ConfigError, match="key=1: rule. Fix: fix."):  # noqa: RUF043
        require(False, "key", 1, "rule", "fix")


def test_exit_codes_are_those_that_scripts_rely_on() -> None:
    codes = (errors.EXIT_DONE, errors.EXIT_FAILURE, errors.EXIT_USER_ERROR, errors.EXIT_STOPPED)
    assert codes == (0, 1, 2, 75)


def test_kinds_are_not_mixed_up() -> None:
    assert not issubclass(RunFolderError, ConfigError)
    assert not issubclass(WindlassError, ValueError)
