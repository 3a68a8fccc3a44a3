"""What `offload=` takes, and what it says to what it does not take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from windlass.conf.compose import compose
from windlass.errors import ConfigError, OffloadError
from windlass.offload.config import BUFFER_BYTES, MIB, OffloadConfig, OffloadKind, WeightsPlace
from windlass.offload.tiers import Tiers

RULES = {
    "offload=cpu offload.max_host_bytes=5": r"offload\.max_host_bytes=5: is a setting of offload=ssd",
    "offload=ssd offload.max_host_bytes=-1": r"offload\.max_host_bytes=-1: must not be negative\. Fix: ",
    "offload=ssd offload.max_device_bytes=-1": r"offload\.max_device_bytes=-1: must not be negative\. Fix: set it to 0",
    "offload=ssd offload.max_activation_bytes=-5": r"offload\.max_activation_bytes=-5: must not be negative\. Fix: ",
    "offload=cpu offload.dir=/nvme": r"offload\.dir=/nvme: is a setting of offload=ssd, not of offload=cpu\. Fix: ",
    "offload=none offload.dir=/nvme": r"offload\.dir=/nvme: is a setting of offload=ssd, not of offload=none\. Fix: ",
    "offload=cpu offload.max_activation_bytes=0": r"offload\.max_activation_bytes=0: is a setting of offload=ssd, not",
    "offload=none offload.weights=streamed": r"offload\.weights=streamed: needs a tier .* Fix: choose offload=ssd or",
    "offload=ssd offload.buffer_bytes=1048575": r"offload\.buffer_bytes=1048575: must be at least 1048576\. Fix: set ",
    "offload=ssd offload.num_threads=0": r"offload\.num_threads=0: must be at least 1\. Fix: ",
    "offload=disk": "offload",
    "offload=ssd offload.weights=gone": r"offload\.weights",
}


@pytest.mark.parametrize("overrides", RULES)
def test_each_rule_names_key_value_and_fix(overrides: str) -> None:
    with pytest.raises(ConfigError, match=RULES[overrides]):
        compose(overrides.split())


def test_settings_are_found_in_the_configuration() -> None:
    assert compose([]).offload == OffloadConfig()
    found = compose(
        ["offload=ssd", "offload.dir=/nvme", "offload.max_host_bytes=5", "offload.weights=streamed"],
    ).offload
    expected = OffloadConfig(OffloadKind.ssd, "/nvme", max_host_bytes=5, weights=WeightsPlace.streamed)
    assert found == expected and found.buffer_bytes == BUFFER_BYTES
    assert compose(["offload=cpu"]).offload == OffloadConfig(OffloadKind.cpu)


def test_files_go_below_the_run_folder_unless_told(tmp_path: Path) -> None:
    assert OffloadConfig(OffloadKind.ssd).folder(tmp_path) == tmp_path / "offload"
    assert OffloadConfig(OffloadKind.ssd, "/nvme").folder(tmp_path) == Path("/nvme")
    assert OffloadConfig(OffloadKind.cpu).folder(tmp_path) is None
    assert OffloadConfig().folder(tmp_path) is None


def build(config: OffloadConfig, run_dir: Path) -> Tiers | None:
    return config.build(run_dir, 3, torch.device("cpu"), computes_in_bfloat16=True, is_checkpointed=False)


def test_the_tiers_of_a_rank(tmp_path: Path) -> None:
    assert build(OffloadConfig(), tmp_path) is None
    in_memory = build(OffloadConfig(OffloadKind.cpu), tmp_path)
    assert in_memory is not None and in_memory.folder is None
    in_memory.close()
    assert list(tmp_path.iterdir()) == [], "nothing is made where nothing goes to a disk"
    tiers = build(OffloadConfig(OffloadKind.ssd, buffer_bytes=MIB, num_threads=3), tmp_path)
    assert tiers is not None and tiers.folder is not None
    (folder,) = (tmp_path / "offload").iterdir()
    assert folder == tiers.folder.path and folder.name.startswith("rank3.")
    tiers.close()
    assert list((tmp_path / "offload").iterdir()) == []


def test_weights_are_not_streamed_from_host_memory_to_the_host(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"offload\.weights=streamed: with offload=cpu on a CPU .* Fix: choose"):
        build(OffloadConfig(OffloadKind.cpu, weights=WeightsPlace.streamed), tmp_path)


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "offload").write_text("in the way")
    with pytest.raises(OffloadError, match=r"offload\.dir=.*/offload: cannot be used: File exists\. Fix: "):
        build(OffloadConfig(OffloadKind.ssd), tmp_path)


def test_the_settings_import_no_framework() -> None:
    code = "import sys, windlass.offload.config, windlass.offload; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
