"""`config.yaml`: what was saved reads back equal."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from windlass.conf.compose import compose
from windlass.conf.schema import Config
from windlass.conf.store import load_config, save_config, to_plain
from windlass.errors import ConfigError
from windlass.train.config import TextDataConfig


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model=llama_7b", "parallel=hsdp", "parallel.num_replicas=2", "launch=torchrun", "launch.nproc_per_node=4"],
        ["data=text", "data.path=corpus", "data.encoding_errors=replace", "data.borders=attention"],
        ["data=parquet", "data.path=/somewhere/rows"],
        ["data=tokens", "data.path=shards", "checkpoint=none", "train.max_norm=null", "metrics.peak_flops=1e12"],
        ["optim.betas=[0.123456789012345,0.5]", "optim.lr=3.3333333333333335e-05", "optim.schedule=wsd"],
    ],
    ids=" ".join,
)
def test_a_saved_configuration_reads_back_equal(overrides: list[str], tmp_path: Path) -> None:
    config = compose(overrides)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


# Not control characters and Unicode's own line ends, which no path has and YAML makes plain newlines of.
texts = st.text(st.characters(exclude_characters="$", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=12)
odd_texts = st.sampled_from(
    [
        "null",
        "~",
        "true",
        "no",
        "1",
        "1.5",
        "1e3",
        "0x10",
        "0o7",
        "1_000",
        "12:30",
        "2020-01-01",
        ".inf",
        "<|endoftext|>",
        "#",
        "'",
        '"',
        "\\n",
        "%",
        "@",
        "`",
        "!tag",
        "&a",
        "*a",
        "[]",
        "{}",
        "\n\n",
        "\t",
        " ",
        "a: b",
        "- a",
        "",
        "é✓",
    ]
)


@pytest.fixture(scope="module")
def text_config() -> Config:
    return compose(["data=text", "data.path=corpus"])


# "???" is OmegaConf's mark of a value that must be given, so no value of ours.
@pytest.mark.slow
@given(values=st.lists((texts | odd_texts).filter(lambda text: text != "???"), min_size=7, max_size=7))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_reads_back_equal(values: list[str], text_config: Config, tmp_path: Path) -> None:
    config = copy.deepcopy(text_config)
    assert isinstance(config.data, TextDataConfig)
    config.data.separator = values[0] or None
    config.data.path, config.data.glob, config.data.text_key = values[1:4]
    config.run_dir, config.resume, config.metrics.wandb_project = values[4:]
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.slow
def test_the_file_is_plain_yaml(tmp_path: Path) -> None:
    config = compose()
    save_config(config, tmp_path / "config.yaml")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == to_plain(config)
    assert to_plain(config)["train"]["dtype"] == "float32"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"3",
        b"[]",
        b"a: [",
        b"\xff\xfe\x00",
        b"model: tiny\n",
        b"model:\n",
        b"model: {name: tiny}\n",
        b"data: {name: of another version}\nmodel: {name: tiny}\n",
        b"\t- :",
    ],
)
def test_what_is_no_configuration_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"is not a readable windlass configuration"):
        load_config(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "config.yaml")


def test_a_key_of_another_version_is_refused(tmp_path: Path) -> None:
    save_config(compose(), tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text().replace("  steps: 300\n", "  steps: 300\n  stride: 2\n")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="stride"):
        load_config(tmp_path / "config.yaml")


def test_rules_hold_for_files_too(tmp_path: Path) -> None:
    save_config(compose(), tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text().replace("  steps: 300\n", "  steps: -1\n")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"train\.steps=-1: must be at least 1"):
        load_config(tmp_path / "config.yaml")
