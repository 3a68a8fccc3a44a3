from __future__ import annotations

from pathlib import Path

import pytest

from windlass.conf.compose import compose
from windlass.data.config import ParquetDataConfig, StdlibDataConfig, TextDataConfig
from windlass.data.outputs import refuse_outputs
from windlass.errors import ConfigError
from windlass.launch.worker import output_folders


@pytest.mark.parametrize("key", ["run_dir", "checkpoint.dir", "offload.dir"])
def test_no_folder_of_a_run_is_inside_its_text(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By relative and absolute paths, and by links."""
    (tmp_path / "text").mkdir()
    (tmp_path / "link").symlink_to("text")
    monkeypatch.chdir(tmp_path / "text")
    for path, folder in ((".", "runs/x"), ("../link", tmp_path / "text" / "x"), (tmp_path / "text", "../link/x/y")):
        options = {"run_dir": tmp_path / "run", "offload": "ssd", "data": "text", "data.path": path, key: folder}
        config = compose([f"{name}={value}" for name, value in options.items()])
        with pytest.raises(ConfigError, match=rf"{key}=.*: must not lie inside data\.path="):
            refuse_outputs(config.data, output_folders(config))


def test_folders_that_are_no_text_are_let_be(tmp_path: Path) -> None:
    inside = {"run_dir": tmp_path / "runs" / "x"}
    refuse_outputs(StdlibDataConfig(), inside)
    refuse_outputs(TextDataConfig(path=str(tmp_path), glob="*.txt"), inside)
    refuse_outputs(TextDataConfig(path=str(tmp_path), glob="*/*.txt"), inside)
    refuse_outputs(TextDataConfig(path=str(tmp_path)), {"run_dir": tmp_path / ".runs" / "x", "offload.dir": None})
    refuse_outputs(TextDataConfig(path=str(tmp_path / "text")), inside)
    for data in (TextDataConfig(path=str(tmp_path), glob="*/*/*"), ParquetDataConfig(path=str(tmp_path))):
        with pytest.raises(ConfigError, match="run_dir"):
            refuse_outputs(data, inside)
