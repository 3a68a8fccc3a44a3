"""What needs a GPU. Skipped where there is none."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from support import runs

from windlass.errors import EXIT_DONE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_undisturbed_one_to_the_bit(tmp_path: Path, dtype: str) -> None:
    overrides = ("train.device=cuda", "train.deterministic=true", f"train.dtype={dtype}", "model.dropout=0.1")
    calm = runs.undisturbed(1, *overrides)
    broken = runs.run_config(tmp_path, "broken", *overrides)
    attempt = runs.start(broken, 1)
    while attempt.is_alive() and not runs.is_committed(broken, 6):
        time.sleep(0.005)
    attempt.kill()
    attempt.join()
    assert runs.run(broken, 1) == [EXIT_DONE], runs.output(broken)
    runs.assert_same_training(broken, calm)
