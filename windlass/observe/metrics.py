"""Records a run: `metrics.jsonl`, `events.jsonl`, and wandb where it is wanted. Torch-free.

Every line is one `write` of a whole line to a file opened for appending, so a kill can tear the last line but
never mix two. A torn last line is cut off when the file is next opened, and readers pass over it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Self

import psutil

from windlass.errors import ConfigError, RunFolderError
from windlass.files import atomic_file, open_growing, real_path, refuse_links
from windlass.observe.config import MetricsConfig, WandbMode
from windlass.observe.metrics_reader import (
    EVENTS_FILE,
    METRICS_FILE,
    NONFINITE,
    Replay,
    read_events,
    read_metrics,
    replayed,
)
from windlass.untrusted import read_bytes

__all__ = ["JsonLines", "Metrics", "Replay", "append_event", "read_events", "read_metrics", "redact", "replayed"]

WANDB_ID_FILE = "wandb_run_id"

SUMMED = frozenset({"checkpoint/stall_s", "offload/stall_s", "offload/read_bytes", "offload/write_bytes", "comm/bytes"})
"""Extra keys that are added up over a line's steps; of `memory/*` the largest is kept, of others the last."""

CHECKPOINT_KINDS = frozenset({"persisted", "snapshot_committed"})

_TAIL_BYTES = 1 << 16
_SECRET_WORDS = {"token", "secret", "password", "passwd", "credential", "credentials", "apikey"}
_SECRET_PAIRS = {("api", "key"), ("access", "key"), ("private", "key")}
_REDACTED = "(redacted)"


class JsonLines:
    """A file of one JSON object a line that only grows. Opening it cuts off a last line that a kill tore.

    Raises:
        RunFolderError: the file cannot be opened or written (read-only, full, over a quota).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = open_growing(path)
            _cut_torn_line(self._fd)
        except OSError as error:
            raise _unwritable(path, error) from error

    def append(self, record: Mapping[str, Any]) -> None:
        """Write `record` as one line. A line that the disk takes only a part of is taken back."""
        line = (json.dumps(_jsonable(record), allow_nan=False) + "\n").encode()
        written = 0
        try:
            written = os.write(self._fd, line)
            if written < len(line):  # the disk is filling up: the rest either fits or says why not
                written += os.write(self._fd, line[written:])
        except OSError as error:
            if written:
                os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
            raise _unwritable(self.path, error) from error

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _cut_torn_line(fd: int) -> None:
    """Truncate the file behind `fd` to the end of its last whole line."""
    end = size = os.fstat(fd).st_size
    while end > 0:
        start = max(0, end - _TAIL_BYTES)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(fd, end)


def _unwritable(path: Path, error: OSError) -> RunFolderError:
    rule = f"cannot be written ({error.strerror})"
    fix = "remove that link" if error.errno == errno.ELOOP else "free space or allow writing there"
    return RunFolderError("run_dir", path.parent, rule, f"{fix} ({path.name}), then resume")


def _jsonable(record: Mapping[str, Any]) -> dict[str, Any]:
    """`record` with plain numbers, and with NaN and infinities as null plus a `..._nonfinite` key."""
    plain: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Real) and not isinstance(value, bool | Integral):
            number = float(value)
            plain[key] = number if math.isfinite(number) else None
            if plain[key] is None:
                plain[key + NONFINITE] = str(number)
        else:
            plain[key] = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value
    return plain


def append_event(run_dir: Path, kind: str, step: int | None, **fields: Any) -> None:
    """Add one line to `events.jsonl` from outside the loop, e.g. `restart` from a launcher between two attempts.

    Raises:
        RunFolderError: the file cannot be written.
    """
    file = JsonLines(run_dir / EVENTS_FILE)
    try:
        file.append({"time": time.time(), "kind": kind, "step": step, **fields})
    finally:
        file.close()


@dataclass
class _Window:
    """The steps since the last line."""

    begin: float | None = None
    num_steps: int = 0
    num_tokens: int = 0
    step_s: float = 0.0
    eval_s: float = 0.0
    extra: dict[str, float | int] = field(default_factory=dict)

    def add_extra(self, key: str, value: float | int) -> None:
        if key in SUMMED:
            value = self.extra.get(key, 0) + value
        elif key.startswith("memory/"):
            value = max(self.extra.get(key, value), value)
        self.extra[key] = value


class Metrics:
    """The figures of a run. Every rank has one and counts alike; rank 0 alone writes.

    Args:
        run_dir: the run's folder; made if it is missing.
        config: whether wandb is told, and under which project.
        rank: this process's rank in the world.
        total_steps: the step at which the run ends.
        log_every: steps a line.
        flops_per_token: forward and backward FLOPs a token, see `windlass.machine.peak_flops.model_flops_per_token`.
        peak_flops: FLOP/s of all devices together; None leaves `throughput/mfu` null.
        run_config: the resolved configuration, for wandb, which does not get its secrets (see `redact`).
        resumed_at: the step of the checkpoint that this attempt goes on from; 0 for a fresh run.
        clock: seconds, monotonic; for tests.

    Raises:
        RunFolderError: `run_dir` cannot be written.
        ConfigError: wandb is wanted but is not installed, or has no account to go online with.
    """

    def __init__(
        self,
        run_dir: Path,
        config: MetricsConfig,
        *,
        rank: int,
        total_steps: int,
        log_every: int,
        flops_per_token: float,
        peak_flops: float | None,
        run_config: dict[str, Any],
        resumed_at: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.total_steps, self.log_every = total_steps, log_every
        self.tokens = 0
        """Tokens trained on so far, over all ranks and attempts."""
        self.skipped_steps = 0
        """Steps whose gradients were not finite, over all attempts."""
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._step = resumed_at
        self._clock = clock
        self._window = _Window()
        self._process = psutil.Process()
        self._checkpoint_step: int | None = resumed_at or None
        self._metrics = self._events = self._wandb = None
        if rank == 0:
            self._metrics = JsonLines(run_dir / METRICS_FILE)
            self._events = JsonLines(run_dir / EVENTS_FILE)
            if config.wandb is not WandbMode.disabled:
                self._wandb = _start_wandb(run_dir, config, run_config)

    def due(self, step: int) -> bool:
        """True if `step` gets a line: only then must the loop fetch the loss and the norm from the device."""
        return step % self.log_every == 0 or step == self.total_steps

    def step(
        self,
        step: int,
        *,
        loss: float | None,
        grad_norm: float | None,
        lr: float,
        num_tokens: int,
        step_s: float,
        **extra: float | int | None,
    ) -> dict[str, Any] | None:
        """Count a finished step; write a line and return it if the step is `due`, else return None.

        "The window" is the steps since the line before, or since this attempt began.

        Args:
            step: the step's number, from 1; one above the last one's.
            loss: this step's mean cross-entropy over all ranks' tokens, nats a token; None if not `due`.
            grad_norm: this step's global gradient norm before clipping; None if not `due`.
            lr: the learning rate that this step used.
            num_tokens: label tokens of this step, over all ranks.
            step_s: seconds of this step on this rank; the line has the mean over the window.
            extra: more keys of the line, as `**{"comm/bytes": n}`. Keys in `SUMMED` are added up over the
                window, of `memory/*` the largest is kept, of others the last; None is left out. Unless it is
                given here, `memory/host_rss_bytes` is this process's resident set when the line is written.

        `throughput/tokens_per_s` is the window's tokens over its wall time, which includes waiting for data
        and for checkpoints and excludes evaluation; `throughput/mfu` is that rate times `flops_per_token`
        over `peak_flops`. An attempt's first window begins `step_s` before its first step is counted, so
        building the model is not in it.
        """
        if step <= self._step:
            raise ValueError(f"step {step} after step {self._step}: steps must rise")
        now, window = self._clock(), self._window
        if window.begin is None:
            window.begin = now - step_s
        self._step = step
        self.tokens += num_tokens
        window.num_steps += 1
        window.num_tokens += num_tokens
        window.step_s += step_s
        for key, value in extra.items():
            if value is not None:
                window.add_extra(key, value)
        if not self.due(step):
            return None
        wall_s = now - window.begin - window.eval_s
        tokens_per_s = window.num_tokens / wall_s if wall_s > 0 else None
        record: dict[str, Any] = {
            "step": step,
            "tokens": self.tokens,
            "time": time.time(),
            "train/loss": loss,
            "optim/grad_norm": grad_norm,
            "optim/lr": lr,
            "optim/skipped_steps": self.skipped_steps,
            "throughput/tokens_per_s": tokens_per_s,
            "throughput/step_s": window.step_s / window.num_steps,
            "throughput/mfu": self._mfu(tokens_per_s),
            "checkpoint/stall_s": None,
            "checkpoint/last_step": self._checkpoint_step,
            "comm/bytes": None,
            "memory/host_rss_bytes": self._process.memory_info().rss,
            "memory/device_peak_bytes": None,
        }
        record.update(window.extra)
        self._window = _Window(begin=now)
        self._write(record)
        return record

    def _mfu(self, tokens_per_s: float | None) -> float | None:
        if tokens_per_s is None or not self._peak_flops:
            return None
        return tokens_per_s * self._flops_per_token / self._peak_flops

    def evaluated(self, step: int, means: Mapping[str, float], seconds: float, num_tokens: int) -> dict[str, Any]:
        """Write the line, and the event `eval`, of an evaluation after `step`; return the line.

        Args:
            means: over the validation tokens of all ranks, by what the objective calls them; `loss` in nats a token.
            seconds: what the evaluation took; taken out of the window's wall time.
            num_tokens: validation tokens, over all ranks.
        """
        if self._window.begin is not None:
            self._window.eval_s += seconds
        record: dict[str, Any] = {
            "step": step,
            "tokens": self.tokens,
            "time": time.time(),
            **{f"val/{name}": value for name, value in means.items()},
            "eval/seconds": seconds,
            "eval/tokens": num_tokens,
        }
        self._write(record)
        self.event("eval", step, **{"val/loss": means["loss"], "seconds": seconds})
        return record

    def count_skipped_step(self, step: int, **fields: Any) -> None:
        """Count a step whose gradients were not finite, and write the event `skipped_step`."""
        self.skipped_steps += 1
        self.event("skipped_step", step, **fields)

    def event(self, kind: str, step: int, **fields: Any) -> None:
        """Write a line of `events.jsonl`: `{"time": unix seconds, "kind": kind, "step": step, **fields}`.

        May be called from any thread.
        """
        if kind in CHECKPOINT_KINDS:
            self._checkpoint_step = max(step, self._checkpoint_step or 0)
        if self._events is not None:
            self._events.append({"time": time.time(), "kind": kind, "step": step, **fields})

    def _write(self, record: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.append(record)
        if self._wandb is not None:
            self._wandb.log({key: value for key, value in record.items() if value is not None})

    def state_dict(self) -> dict[str, int]:
        """Returns what a checkpoint carries: `step`, the last one counted; the totals `tokens`, `skipped_steps`."""
        return {"step": self._step, "tokens": self.tokens, "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on, or back, to where `state` was taken, and begin a new window."""
        self._step, self.tokens, self.skipped_steps = (state[key] for key in ("step", "tokens", "skipped_steps"))
        self._checkpoint_step = self._step or None  # states are loaded from checkpoints
        self._window = _Window()

    def close(self, exit_code: int = 0) -> None:
        """Close the files and end the wandb run, as failed unless `exit_code` is 0. May be called twice."""
        for file in (self._metrics, self._events):
            if file is not None:
                file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=exit_code)
        self._metrics = self._events = self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(exit_code=0 if kind is None else 1)


def redact(config: Any) -> Any:
    """`config` (nested dicts and lists) without secrets: values under keys such as `hf_token` or `api_key`,
    and the `user:password@` of URLs. `tokenizer` and `num_tokens` are no secrets.
    """
    if isinstance(config, Mapping):
        return {
            key: _REDACTED if _is_secret(str(key)) and value is not None else redact(value)
            for key, value in config.items()
        }
    if isinstance(config, list | tuple):
        return [redact(value) for value in config]
    if isinstance(config, str):
        return re.sub(r"(\w+://)[^/\s]+@", rf"\g<1>{_REDACTED}@", config)
    return config


def _is_secret(key: str) -> bool:
    words = re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower())
    return bool(_SECRET_WORDS.intersection(words) or _SECRET_PAIRS.intersection(pairwise(words)))


def _start_wandb(run_dir: Path, config: MetricsConfig, run_config: dict[str, Any]) -> Any:
    """The wandb run of this run folder: a resumed run goes on under the id kept in `run_dir/wandb_run_id`."""
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "metrics.wandb", config.wandb, "needs the package wandb", 'pip install "windlass[wandb]"'
        ) from error
    run_id = _wandb_id(run_dir)
    offline = config.wandb is WandbMode.offline
    try:
        run = wandb.init(
            project=config.wandb_project,
            id=run_id,
            # Offline there is no server to ask for the earlier attempt; `wandb sync` joins the two later.
            resume=None if offline else "allow",
            mode="offline" if offline else "online",
            dir=run_dir,
            name=real_path(run_dir).name,
            config=redact(run_config),
            # Its capture of stdout would fight the live view.
            settings=wandb.Settings(console="off", silent=True),
        )
    except wandb.errors.Error as error:
        fix = "run `wandb login`, or set metrics.wandb=offline and sync later"
        raise ConfigError("metrics.wandb", config.wandb, f"wandb did not start ({error})", fix) from error
    # Steps trained again after a recovery come twice, and wandb's own step axis drops what goes back.
    run.define_metric("*", step_metric="step")
    return run


def _wandb_id(run_dir: Path) -> str:
    """The id of this run folder, kept in its file."""
    file = run_dir / WANDB_ID_FILE
    try:
        for path in (file, run_dir / "wandb"):
            refuse_links(path, run_dir)
        if not file.exists():
            with atomic_file(file) as stream:
                stream.write(uuid.uuid4().hex[:8].encode() + b"\n")
        found = read_bytes(file, _TAIL_BYTES).decode(errors="replace").strip()
    except OSError as error:
        raise _unwritable(file, error) from error
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", found):  # it is sent away
        raise RunFolderError("run_dir", file, "holds no id of a wandb run", "delete that file for a new id")
    return found
