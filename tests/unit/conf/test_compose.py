"""Composing configurations, and what is said about overrides that cannot be used."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

import windlass.conf
from windlass.checkpoint.config import CheckpointKind
from windlass.conf.compose import compose, run_hydra
from windlass.conf.schema import GROUPS, PATH_KEYS, Config, text_keys
from windlass.conf.store import to_plain
from windlass.conf.text_values import taken_as_text
from windlass.data.config import StdlibDataConfig, TextDataConfig
from windlass.errors import ConfigError
from windlass.launch.config import LaunchKind
from windlass.optim.config import AdamWConfig, Schedule
from windlass.parallel.config import Sharding
from windlass.train.config import DType

CONF = Path(str(resources.files(windlass.conf)))
PRESETS = sorted(f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml") if path.parent.name in GROUPS)
EXPERIMENTS = sorted(path.stem for path in CONF.glob("experiment/*.yaml"))
MANDATORY = {
    "model=hf": ["model.path=m"],
    "finetune": ["model.path=m", "data.path=chats"],
    "data=text": ["data.path=corpus"],
    "data=parquet": ["data.path=rows"],
    "data=chat": ["data.path=rows"],
    "data=tokens": ["data.path=shards"],
}


def test_the_defaults_compose_into_dataclasses() -> None:
    config = compose()
    assert type(config) is Config
    assert type(config.data) is StdlibDataConfig
    assert type(config.optim) is AdamWConfig
    assert config.model.name == "tiny"
    assert config.parallel.name is Sharding.zero3
    assert config.checkpoint.name is CheckpointKind.durable
    assert config.launch.name is LaunchKind.local
    assert (config.run_dir, config.resume) == ("runs/tiny", "auto")
    assert config.optim.betas == (0.9, 0.95)  # type: ignore[attr-defined]


def test_presets_were_found() -> None:
    assert len(PRESETS) >= 19
    assert {preset.partition("=")[0] for preset in PRESETS} == set(GROUPS)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_composes_under_its_own_name(preset: str) -> None:
    group, _, name = preset.partition("=")
    config = compose([preset, *MANDATORY.get(preset, [])])
    assert getattr(config, group).name == name


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes(experiment: str) -> None:
    assert type(compose([f"+experiment={experiment}", *MANDATORY.get(experiment, [])])) is Config


def test_overrides_reach_their_keys() -> None:
    config = compose(
        [
            "train.steps=7",
            "train.dtype=bfloat16",
            "train.max_norm=null",
            "optim.lr=1e-3",
            "optim.schedule=wsd",
            "optim.betas=[0.5,0.6]",
            "data=text",
            "data.path=/a b/c",
            'data.separator="<|endoftext|>"',
            "run_dir=here",
        ]
    )
    assert config.train.steps == 7
    assert config.train.dtype is DType.bfloat16
    assert config.train.max_norm is None
    assert config.optim.lr == 1e-3
    assert config.optim.schedule is Schedule.wsd
    assert config.optim.betas == (0.5, 0.6)  # type: ignore[attr-defined]
    assert isinstance(config.data, TextDataConfig)
    assert (config.data.path, config.data.separator) == ("/a b/c", "<|endoftext|>")
    assert config.run_dir == "here"


def test_the_run_folder_follows_the_model() -> None:
    assert compose(["model=llama_60m"]).run_dir == "runs/llama_60m"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        (["train.step=5"], "train.step", r"train\.step=5: is no key.*did you mean train\.steps\?"),
        (["stps=5"], "stps", r"did you mean train\.steps\?"),
        (["steps=5"], "steps", r"did you mean train\.steps\?"),
        (["optim.learning=5"], "optim.learning", r"is no key of this configuration"),
        (["optimizer.lr=5"], "optimizer", r"is no key of this configuration"),
        (["train.steps.more=5"], "train.steps", r"train\.steps"),
        (["data.path=corpus"], "data.path", r"is no key of this configuration"),  # stdlib has none
        (["zzzzzzzz=5"], "zzzzzzzz", r"`windlass train --cfg job` prints every key"),
        (["+train.foo=3"], "train.foo", r"train\.foo=3: is no key of this configuration. Fix: leave the override out"),
        (["+foo=3"], "foo", r"is no key of this configuration. Fix: leave the override out"),
        (["++data.foo=3"], "data.foo", r"is no key of this configuration"),
        (["model=tinny"], "model", r"model=tinny: must be one of hf, llama_130m,.* tiny\. Fix: did you mean tiny\?"),
        (["parallel=zero"], "parallel", r"must be one of ddp, hsdp, none, zero1, zero2, zero3\."),
        (["modle=tiny"], "modle", r"did you mean model\?"),
        (["+experiment=nothing_of_that_name"], "experiment", r"experiment=nothing_of_that_name"),
        (["train.steps=many"], "train.steps", r"train\.steps=many: .*could not be converted to Integer.* of that type"),
        (["train.steps=1.5"], "train.steps", r"could not be converted to Integer"),
        (["train.steps=null"], "train.steps", r"train\.steps=null"),
        (["optim.lr=fast"], "optim.lr", r"optim\.lr=fast: .*could not be converted to Float"),
        (["train.deterministic=maybe"], "train.deterministic", r"not a valid bool"),
        (["optim.betas=0.9"], "optim.betas", r"optim\.betas=0\.9"),
        (["optim.betas=[0.9]"], "optim.betas", r"must be two numbers"),
        (["optim.betas=[a,b]"], "optim.betas[0]", r"could not be converted to Float"),
        (["train=fast"], "train", r"train=fast"),
        (["train.dtype=float16"], "train.dtype", r"expected one of \[float32, bfloat16\]"),
        (["data=text"], "data.path", r"data\.path=\?\?\?: must be given. Fix: add data\.path=VALUE"),
        (["data=tokens"], "data.path", r"must be given"),
        (["~model"], "model", r"must be given"),
        (["~train.steps"], "train.steps", r"does not support deletion"),
        (["train.steps"], "override", r"override=train\.steps: is not of the form key=value"),
        (["=3"], "override", r"override==3: is not of the form key=value"),
        (
            ["train.steps=[1"],
            "train.steps",
            r"train\.steps=\[1: is no value.*`windlass train --cfg job` prints every key",
        ),
        (["train.steps=<1"], "train.steps", r"train\.steps=<1: is no value"),
        (["run_dir=null"], "run_dir", r"""null is none\. Fix: leave it out .*run_dir='"null"'"""),
        (
            ["run_dir=~nobody-of-that-name/x"],
            "run_dir",
            r"""no such user's .*or run_dir='"\./~nobody-of-that-name/x"'""",
        ),
        (["run_dir=a\udcff"], "run_dir", r"run_dir=a\\udcff: has bytes that are not UTF-8"),
        (["run_dir=${"], "run_dir", r"the characters \$\{ are \\\$\{\."),
        (["train.steps=1,2"], "config", r"--multirun"),
        (["run_dir=${nothing}"], "run_dir", r"Interpolation key 'nothing' not found"),
        (["train.steps=0"], "train.steps", r"train\.steps=0: must be at least 1"),
        (["model.hidden_size=7"], "model.hidden_size", r"must be a multiple of"),
        (["launch.nproc_per_node=2"], "launch.nproc_per_node", r"choose launch=torchrun"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_override_is_one_message_that_names_its_key(overrides: list[str], key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        compose(overrides)
    assert raised.value.key == key
    assert "\n" not in str(raised.value)
    assert raised.value.fix


def test_keys_of_text_take_text_as_it_is_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    typed = {
        "run_dir": "1e3",
        "resume": "true",
        "data.path": "~/books",
        "data.cache_dir": "null",
        "data.glob": "**/[a-c]*.txt",
        "data.text_key": "0x10",
        "data.separator": "<|endoftext|>",
        "data.tokenizer": "runs/lr=0.1, größe (2) it's #5 50% a&b {x}",
        "checkpoint.dir": '"~/a b"',
        "metrics.wandb_project": "[x]",
        "launch.nnodes": "1",
    }
    config = to_plain(compose(["data=text", *(f"{key}={text}" for key, text in typed.items())]))
    found = {key: get(config, key) for key in typed}
    read = {"data.path": "/home/me/books", "data.cache_dir": None, "checkpoint.dir": "/home/me/a b"}
    assert found == typed | read


@pytest.mark.parametrize(
    ("argument", "taken"),
    [
        ("run_dir=runs/a\\,b", "run_dir=runs/a\\,b"),
        ("run_dir='a b'", "run_dir='a b'"),
        ("run_dir=a,b", 'run_dir="a,b"'),
        ("run_dir=choice(a,b)", 'run_dir="choice(a,b)"'),
        ("+run_dir=~/a", '+run_dir="/home/me/a"'),
        ("run_dir=~/${model.name}", 'run_dir="/home/me/${model.name}"'),
        ("run_dir='~/${model.name}'", 'run_dir="/home/me/${model.name}"'),
        ("run_dir=~", 'run_dir="/home/me"'),
        ("data.separator=~~", 'data.separator="~~"'),
        ('data.separator="', 'data.separator="\\""'),
        ("train.steps=[1", "train.steps=[1"),
        ("~train.steps", "~train.steps"),
        ("--cfg", "--cfg"),
    ],
)
def test_only_what_hydra_would_not_take_as_text_is_quoted(
    argument: str, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert taken_as_text(argument) == taken


@pytest.mark.parametrize(
    ("argument", "taken"),
    [
        ("data.path=~/a,~/b c", 'data.path="/home/me/a","/home/me/b c"'),
        ("data.path='x,y',<z>", "data.path='x,y',\"<z>\""),
        ("run_dir=a,b", "run_dir=a,b"),
        ("run_dir=choice(a,b)", "run_dir=choice(a,b)"),
        ("run_dir=runs/lr=1", 'run_dir="runs/lr=1"'),
    ],
)
def test_a_sweep_has_several_texts(argument: str, taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert taken_as_text(argument, is_sweep=True) == taken


def test_it_is_known_of_each_key_of_text_whether_it_is_a_path() -> None:
    others = {
        "data.glob",
        "data.name",
        "data.separator",
        "data.text_key",
        "checkpoint.agent_host",
        "launch.address",
        "launch.nnodes",
        "metrics.wandb_project",
        "model.name",
        "objective.name",
        "optim.name",
    }
    assert text_keys().keys() == others | set(PATH_KEYS)


def get(plain: dict[str, Any], key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        plain = plain[part]
    return plain


def test_a_longer_key_that_begins_alike_does_not_lend_its_value() -> None:
    with pytest.raises(ConfigError, match=r"^train\.step=5: "):
        compose(["train.step=5", "train.steps=7"])


@pytest.mark.slow
def test_composing_again_after_a_mistake_works() -> None:
    with pytest.raises(ConfigError):
        compose(["train.step=5"])
    assert compose(["train.steps=5"]).train.steps == 5


def collect(arguments: list[str], exit_codes: dict[int, int] | None = None) -> tuple[int, list[Config]]:
    """What `run_hydra` returns, and the configurations that it ran."""
    configs: list[Config] = []

    def task(config: Config) -> int:
        configs.append(config)
        return (exit_codes or {}).get(config.train.steps, 0)

    return run_hydra(task, "test", arguments), configs


@pytest.mark.slow
def test_run_hydra_runs_the_task_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    argv = sys.argv
    exit_code, configs = collect(["train.steps=3"], {3: 75})
    assert exit_code == 75
    assert configs == [compose(["train.steps=3"])]
    assert sys.argv is argv
    assert list(tmp_path.iterdir()) == [], "Hydra writes nothing"


@pytest.mark.slow
def test_a_sweep_numbers_its_run_folders(tmp_path: Path) -> None:
    exit_code, configs = collect(["-m", "train.steps=3,5", "optim.lr=1e-3,2e-3", f"run_dir={tmp_path}/sweep"], {5: 2})
    assert exit_code == 2, "the largest"
    assert [(c.train.steps, c.optim.lr) for c in configs] == [(3, 1e-3), (3, 2e-3), (5, 1e-3), (5, 2e-3)]
    assert [c.run_dir for c in configs] == [f"{tmp_path}/sweep/{job}" for job in range(4)]


@pytest.mark.slow
def test_a_mistake_in_a_sweep_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.step"):
        collect(["-m", "train.step=3,5", f"run_dir={tmp_path}/sweep"])


def test_errors_of_the_task_come_through_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mistake = ConfigError("a", 1, "is wrong", "mend it")

    def fail(_: Config) -> int:
        raise mistake

    with pytest.raises(ConfigError) as raised:
        run_hydra(fail, "test", [])
    assert raised.value is mistake


def test_cfg_job_prints_the_configuration_and_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    exit_code, configs = collect(["--cfg", "job", "train.steps=41"])
    printed = capsys.readouterr().out
    assert (exit_code, configs) == (0, [])
    assert "steps: 41" in printed
    assert "persist_every: 100" in printed


@pytest.mark.slow
def test_every_key_has_a_default_or_says_that_it_must_be_given() -> None:
    plain = to_plain(compose())
    for group in GROUPS:
        assert plain[group].keys() == {field.name for field in dataclasses.fields(getattr(compose(), group))}


@pytest.mark.slow
def test_composing_imports_no_torch() -> None:
    code = (
        "import sys; from windlass.conf.compose import compose; compose(['model=llama_7b']); "
        "assert not {'torch', 'pyarrow', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
