"""`config.yaml`: what was saved reads back equal."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from windlass.conf.compose import compose
from windlass.conf.schema import Config
from windlass.conf.store import load_config, save_config, to_plain, to_yaml
from windlass.data.config import TextDataConfig
from windlass.errors import ConfigError


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


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
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
        "${",
        "${oc.env:HOME}",
        "\\${x}",
        "???",
        "\x1b[31m\r",
        "\u2028",
        "\x85",
    ]
)


@pytest.fixture(scope="module")
def text_config() -> Config:
    return compose(["data=text", "data.path=corpus"])


@pytest.mark.slow
@given(values=st.lists(texts | odd_texts, min_size=7, max_size=7))
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


def bomb() -> str:
    rows = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)]
    return "a0: &a0 [x, x]\n" + "".join(rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text + "_target_: os.system\n", "`_target_` is not known"),
        (lambda text: text + "1: 2\n", "a key that is not text"),
        (lambda text: text.replace("seed: 0", "seed: !!python/object/apply:os.getcwd []"), "it is not YAML"),
        (lambda text: text.replace("seed: 0", "seed: zero"), "`train.seed` is 'zero', not an integer"),
        (lambda text: text.replace("seed: 0", "seed: " + "9" * 4000), "beyond 64 bits"),
        (lambda text: text.replace("seed: 0", "seed: [0]"), "not an integer"),
        (lambda text: text.replace("dtype: float32", "dtype: float64"), "not one of float32, bfloat16"),
        (lambda text: text.replace("run_dir: runs/tiny\n", ""), "`run_dir` is missing"),
        (lambda text: text.replace("name: stdlib", "name: text"), "`data.path` is missing"),
        (lambda text: text.replace("name: adamw", "name: nothing"), "`optim.name` is 'nothing', not one of adamw"),
        (lambda text: text.replace("name: adamw", "name: {a: 1}"), "`optim.name` is"),
        (lambda text: text + bomb(), "alias"),
        (lambda text: text + "a: " + "[" * 5000, "nests more than"),
        (lambda text: text[:300], "is missing|it is not YAML|is None"),
        (lambda text: "x" * (17 << 20), "bytes, and at most"),
    ],
)
def test_what_a_stranger_wrote_is_one_message(change: Callable[[str], str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(change(to_yaml(compose())))
    with pytest.raises(ConfigError, match=r"is not a readable windlass configuration") as raised:
        load_config(path)
    assert re.search(message, raised.value.rule), raised.value.rule
    assert len(raised.value.rule) < 500


def test_no_variable_of_the_environment_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "ENVSECRET")
    path = tmp_path / "config.yaml"
    text = to_yaml(compose())
    path.write_text(text.replace("wandb_project: windlass", "wandb_project: ${oc.env:SECRET}"))
    config = load_config(path)
    assert config.metrics.wandb_project == "${oc.env:SECRET}"
    save_config(config, path)
    assert "ENVSECRET" not in path.read_text()


def test_numbers_that_a_user_edits_are_read_as_meant(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    text = to_yaml(compose(["train.max_norm=inf"]))
    path.write_text(text)
    assert load_config(path).train.max_norm == float("inf")
    path.write_text(re.sub(r"\n  lr: .*", "\n  lr: 1e-3", text))
    assert load_config(path).optim.lr == 1e-3


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
