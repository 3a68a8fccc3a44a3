from __future__ import annotations

import pytest

from windlass.data.config import DataConfig, StdlibDataConfig, TextDataConfig
from windlass.errors import ConfigError
from windlass.models.config import LlamaConfig
from windlass.train.config import ActivationCheckpoint, TrainConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, r"train\.steps=0: must be at least 1"),
        ({"batch_size": 0}, r"train\.batch_size=0: must be at least 1"),
        ({"seq_len": -1}, r"train\.seq_len=-1: must be at least 1"),
        ({"grad_accum_steps": 0}, r"train\.grad_accum_steps=0"),
        ({"eval_samples": 0}, r"train\.eval_samples=0"),
        ({"log_every": 0}, r"train\.log_every=0"),
        ({"seed": -1}, r"train\.seed=-1: must not be negative"),
        ({"eval_every": -1}, r"train\.eval_every=-1: must not be negative"),
        ({"max_norm": 0.0}, r"train\.max_norm=0\.0: must be above 0.*set train\.max_norm=null"),
        (
            {"activation_fraction": 0.5},
            r"train\.activation_fraction=0\.5: is a setting of train\.activation_checkpoint=fraction, not of none",
        ),
        (
            {"activation_checkpoint": ActivationCheckpoint.auto, "activation_fraction": 0.5},
            r"train\.activation_fraction=0\.5: .*, not of auto",
        ),
        (
            {"activation_checkpoint": ActivationCheckpoint.fraction},
            r"train\.activation_fraction=None: must be between 0 and 1.*set train\.activation_fraction=0\.5",
        ),
        (
            {"activation_checkpoint": ActivationCheckpoint.fraction, "activation_fraction": 1.5},
            r"train\.activation_fraction=1\.5: must be between 0 and 1",
        ),
        (
            {"activation_checkpoint": ActivationCheckpoint.fraction, "activation_fraction": 0.5, "compile": True},
            r"train\.compile=True: cannot be combined with train\.activation_checkpoint=fraction",
        ),
        (
            {"activation_checkpoint": ActivationCheckpoint.auto, "compile": True},
            r"train\.compile=True: cannot be combined with train\.activation_checkpoint=auto.*to none or full",
        ),
    ],
)
def test_training_settings_that_make_no_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)


def test_the_least_that_makes_sense_is_accepted() -> None:
    TrainConfig(steps=1, batch_size=1, seq_len=1, eval_every=0, seed=0, max_norm=None)
    for fraction in (0.0, 1.0):
        TrainConfig(activation_checkpoint=ActivationCheckpoint.fraction, activation_fraction=fraction)
    TrainConfig(activation_checkpoint=ActivationCheckpoint.full, compile=True)
    LlamaConfig(vocab_size=1, hidden_size=2, intermediate_size=1, num_layers=1, num_heads=1, num_kv_heads=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 0}, r"model\.num_layers=0: must be at least 1"),
        ({"num_heads": 0}, r"model\.num_heads=0: must be at least 1"),
        ({"num_kv_heads": 0}, r"model\.num_kv_heads=0: must be at least 1"),
        (
            {"hidden_size": 100, "num_heads": 6},
            r"model\.hidden_size=100: must be a multiple of 2 \* model.num_heads=12",
        ),
        ({"hidden_size": 18, "num_heads": 6}, r"so that a head has an even width"),
        ({"num_heads": 6, "num_kv_heads": 4}, r"model\.num_kv_heads=4: must divide model\.num_heads=6"),
        ({"dropout": 1.0}, r"model\.dropout=1\.0: must be in \[0, 1\)"),
        ({"dropout": -0.1}, r"model\.dropout=-0\.1"),
        ({"vocab_size": 0}, r"model\.vocab_size=0: must be at least 1"),
    ],
)
def test_models_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LlamaConfig(**settings)


def test_a_heads_width_divides_the_models() -> None:
    assert LlamaConfig(hidden_size=192, num_heads=6).head_dim == 32


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (DataConfig, {"prefetch": 0}, r"data\.prefetch=0: must be at least 1"),
        (StdlibDataConfig, {"prefetch": 0}, r"data\.prefetch=0"),
        (StdlibDataConfig, {"validation_fraction": 0.0}, r"data\.validation_fraction=0\.0: must be between 0 and 1"),
        (StdlibDataConfig, {"validation_fraction": 1.0}, r"data\.validation_fraction=1\.0"),
        (StdlibDataConfig, {"num_workers": 0}, r"data\.num_workers=0: must be at least 1"),
        (TextDataConfig, {"separator": ""}, r"data\.separator='': must not be empty"),
    ],
)
def test_data_settings_that_make_no_sense_are_refused(kind: type, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**settings)
