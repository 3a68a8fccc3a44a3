"""One attempt of a run: from the folder and the data to the loop, and what is said before and after."""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

import windlass
from windlass.checkpoint.config import CheckpointKind
from windlass.checkpoint.durable.manifest import Manifest, committed_steps, step_folder
from windlass.checkpoint.durable.storage import Location, name_of
from windlass.checkpoint.kept_files import keep
from windlass.checkpoint.manager import Restored
from windlass.conf.schema import Config
from windlass.conf.store import load_config, save_config, to_plain
from windlass.data.config import ChatDataConfig
from windlass.data.kept_tokenizer import tokenizer_of
from windlass.data.samples import PackedDocuments, Samples, build_samples
from windlass.data.shards import TokenDataset
from windlass.errors import EXIT_FAILURE, CorruptCheckpoint, RunFolderError, WindlassError
from windlass.files import make_folder, open_growing, refuse_links
from windlass.models.spec import count_parameters
from windlass.observe.console import open_console
from windlass.observe.metrics import Metrics
from windlass.observe.report import write_report
from windlass.observe.watchdog import stacks_on_signal, watch_for_hangs
from windlass.offload.config import OffloadKind
from windlass.optim.scheduler import build_scheduler
from windlass.parallel.mesh import Mesh
from windlass.streams import goes_on_in
from windlass.text import command, override, printable
from windlass.train.activation_choice import Decision, decide, decision_before
from windlass.train.agreement import Ending
from windlass.train.build import (
    Run,
    StepParts,
    TrainState,
    build_checkpointer,
    build_loader,
    build_parts,
    build_tiers,
    check_vocabulary,
    checkpoint_dir,
    num_parity_shards,
    resolve_vocabulary,
    restore,
    total_peak_flops,
)
from windlass.train.carried_files import carried_files
from windlass.train.config import ActivationCheckpoint
from windlass.train.loop import train
from windlass.train.mock_step import mock_step
from windlass.train.rates import change_of_rate, check_steps, how_to_go_on
from windlass.train.run_folder import (
    CONFIG_FILE,
    RunFolder,
    changed_keys,
    lock_folder,
    refuse_another_run,
    unusable,
)
from windlass.train.signals import StopRequest
from windlass.train.skipped_steps import warning_at_the_end

logger = logging.getLogger(__name__)

CHECKPOINTS_PATIENCE_S = 1.0
"""For the lock of the checkpoints: whoever held it for this run held the run folder, too, and has let go of both."""
ENDINGS = {
    Ending.stopped: "stopped {}",
    Ending.left: "left the job {}: it goes on with other nodes",
    Ending.restarting: "interrupted {}, to go on with other nodes",
}


def run_session(config: Config, mesh: Mesh, tokens: Path, stop: StopRequest) -> int:
    """Trains until the last step or until `stop`. Collective.

    Args:
        tokens: the prepared data.

    Returns:
        `EXIT_DONE`, `EXIT_STOPPED`, `EXIT_RESTART`, or `EXIT_FAILURE` for a run that was stopped and keeps nothing.
    """
    restart_count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    datasets = mesh.agree(lambda: (TokenDataset(tokens, "train"), TokenDataset(tokens, "validation")))
    resolve_vocabulary(config, datasets[0].vocab_size)
    mesh.agree(lambda: check_vocabulary(config, datasets[0]))
    with ExitStack() as stack:
        is_auto = config.train.activation_checkpoint == ActivationCheckpoint.auto
        changes, kept = mesh.agree(lambda: _open_folder(config, mesh, stack, is_restart=restart_count > 0))
        decision = mesh.decide(lambda: kept) if is_auto else None
        if decision is not None:
            decision.write_to(config)
        log_file = Path(config.run_dir) / "logs" / f"rank{mesh.rank}.log"
        log = mesh.agree(lambda: stack.enter_context(_logging_to(log_file)))
        stack.enter_context(goes_on_in(log_file))
        stack.enter_context(stacks_on_signal(log))
        parts = _build_parts(config, mesh, stack)
        decision = _decide_activations(parts) or decision
        run, restored = _build_run(parts, datasets, stack, is_restart=restart_count > 0)
        # Only now: a run that was refused leaves the folder's configuration as it is.
        mesh.agree(lambda: _record_config(config, mesh))
        watching = watch_for_hangs(Path(config.run_dir), mesh, log, config.launch.hang_timeout_s)
        with run.console:
            run.console.start()
            _say_start(run, datasets[0], restored, restart_count, changes, decision)
            with watching as heartbeat:
                ending = train(run, stop, heartbeat)
        # A job that goes on keeps its snapshot agents; a node that leaves it has its own ended by its launcher.
        if run.checkpoint is not None and ending in (Ending.done, Ending.stopped):
            run.checkpoint.close()
        if mesh.rank == 0:
            _say_end(run, datasets[0], stop, ending)
        return exit_code_of(ending, is_saved=run.checkpoint is not None)


def exit_code_of(ending: Ending, is_saved: bool) -> int:
    """75 promises that the same command goes on. Where nothing is saved it would begin again."""
    return EXIT_FAILURE if ending == Ending.stopped and not is_saved else ending.exit_code


def _open_folder(
    config: Config, mesh: Mesh, stack: ExitStack, is_restart: bool
) -> tuple[dict[str, tuple[Any, Any]], Decision | None]:
    """Locks the run folder and looks at what it holds. On rank 0.

    Returns:
        What differs from the attempt before, and what that has decided for this one.
    """
    if mesh.rank != 0:
        return {}, None
    folder = stack.enter_context(RunFolder(Path(config.run_dir)))
    _refuse_links(config)
    checkpoints = checkpoint_dir(config)
    if config.checkpoint.name != CheckpointKind.none and isinstance(checkpoints, Path):
        try:
            checkpoints.mkdir(parents=True, exist_ok=True)
            if not checkpoints.samefile(folder.path):  # which is locked
                stack.enter_context(lock_folder(checkpoints, "checkpoint.dir", CHECKPOINTS_PATIENCE_S))
        except OSError as error:
            raise unusable(checkpoints, error) from error
    config_file = folder.path / CONFIG_FILE
    steps = committed_steps(checkpoints)
    if (config_file.exists() or steps) and config.resume == "never" and not is_restart:
        raise RunFolderError(
            "run_dir",
            folder.path,
            "holds a run, and resume=never begins a new one",
            "choose another run_dir, or leave resume=auto to go on with this one",
        )
    if config_file.exists():
        before, holder = to_plain(load_config(config_file)), folder.path
    elif steps:  # a checkpoint.dir that another run has used
        before, holder = _config_of(checkpoints, steps), checkpoints
    else:
        return {}, None
    if not before:
        return {}, None
    kept = decision_before(config, before)
    if kept is not None:
        kept.write_to(config)
    now = to_plain(config)
    if config.resume == "auto":
        refuse_another_run(holder, before, now)
    return changed_keys(before, now), kept


def _refuse_links(config: Config) -> None:
    """Whoever gave the user this folder may have made them, and files are written and deleted there."""
    run_dir = Path(config.run_dir)
    used = {
        "checkpoint.dir": config.checkpoint.dir is None and config.checkpoint.name != CheckpointKind.none,
        "offload.dir": config.offload.dir is None and config.offload.name == OffloadKind.ssd,
    }
    for key, name in (("checkpoint.dir", "checkpoints"), ("offload.dir", "offload")):
        link = run_dir / name
        try:
            if used[key]:
                refuse_links(link, run_dir)
        except OSError as error:
            fix = f"set {override(key, os.path.realpath(link))} if that is where they belong, or remove the link"
            raise RunFolderError("run_dir", run_dir, str(error.strerror), fix) from error


def _config_of(checkpoints: Location, steps: list[int]) -> dict[str, Any]:
    """Reads the configuration in the newest checkpoint that can be read; nothing where it has none."""
    for step in reversed(steps):
        with suppress(CorruptCheckpoint):  # it is set aside when it is its turn to be restored
            info = Manifest.read(step_folder(checkpoints, step)).objects.get("info")
            config = info.get("config") if isinstance(info, dict) else None
            return config if isinstance(config, dict) else {}
    return {}


def _record_config(config: Config, mesh: Mesh) -> None:
    if mesh.rank != 0:
        return
    try:
        save_config(config, Path(config.run_dir) / CONFIG_FILE)
    except OSError as error:
        raise unusable(Path(config.run_dir), error) from error


def _build_parts(config: Config, mesh: Mesh, stack: ExitStack) -> StepParts:
    train_config = config.train
    torch.manual_seed(train_config.seed * 1_000_003 + mesh.data_rank)  # dropout differs between samples
    torch.use_deterministic_algorithms(train_config.deterministic)
    tiers = mesh.agree(lambda: build_tiers(config, mesh))
    if tiers is not None:
        stack.callback(tiers.close)
    return build_parts(config, mesh, tiers)


def _decide_activations(parts: StepParts) -> Decision | None:
    """Resolves `train.activation_checkpoint=auto` on all ranks. None: the user has decided. Collective."""
    if parts.config.train.activation_checkpoint != ActivationCheckpoint.auto:
        return None
    decision = decide(parts, _say_at_once)
    decision.write_to(parts.config)
    decision.apply_to(parts)
    return decision


def _say_at_once(text: str) -> None:
    """For the time before there is a console."""
    sys.stdout.write(f"{printable(text)}\n")
    sys.stdout.flush()


def _build_run(
    parts: StepParts, datasets: tuple[TokenDataset, TokenDataset], stack: ExitStack, is_restart: bool
) -> tuple[Run, Restored | None]:
    config, mesh, engine = parts.config, parts.mesh, parts.engine
    scheduler = build_scheduler(config.optim, engine.optimizer, config.train.steps)
    state = TrainState()
    data = mesh.agree(lambda: build_loader(config, datasets[0], mesh, parts.objective))
    stack.callback(data.close)
    validation_samples = mesh.agree(lambda: _packed(config, datasets[1]))
    plain_config = to_plain(config)
    tokenizer, content = mesh.agree(lambda: tokenizer_of(datasets[0]))
    files = mesh.agree(lambda: carried_files(config, parts.model, tokenizer, content) if mesh.rank == 0 else None)
    named = mesh.decide(lambda: {} if files is None else files.to_info())
    checkpoint = build_checkpointer(config, plain_config, mesh, engine, scheduler, data, state, tokenizer, named)
    if checkpoint is not None:
        mesh.agree(lambda: checkpoint.store.open_for_writing() if mesh.rank == 0 else None)
        mesh.agree(lambda: None if files is None else keep(checkpoint.store.storage, files.contents))
        if engine.in_backward is not None:
            engine.in_backward.before_update = checkpoint.wait_staged
    peak_flops = total_peak_flops(config, mesh)
    metrics = mesh.agree(lambda: _open_metrics(parts, plain_config, peak_flops))
    stack.enter_context(metrics)
    console = open_console(
        config.metrics.console, rank=mesh.rank, total_steps=config.train.steps, title=str(config.run_dir)
    )
    run = Run(
        config=config,
        mesh=mesh,
        model=parts.model,
        objective=parts.objective,
        engine=engine,
        tiers=parts.tiers,
        scheduler=scheduler,
        data=data,
        validation=datasets[1],
        validation_samples=validation_samples,
        state=state,
        checkpoint=checkpoint,
        metrics=metrics,
        console=console,
    )
    state_bytes = mock_step(run).optimizer_bytes if config.train.mock_step else 0
    begin = time.perf_counter()
    restored = restore(config, checkpoint, is_restart)
    mesh.agree(lambda: check_steps(run))
    if checkpoint is not None:
        checkpoint.reserve(state_bytes if restored is None else 0)
    metrics.load_state_dict(state.state_dict())
    if restored is not None:
        metrics.event(
            "recovered",
            restored.step,
            source=restored.source,
            lost_nodes=restored.lost_nodes,
            seconds=time.perf_counter() - begin,
            decode_s=restored.decode_s,
            checkpoint=name_of(restored.origin),
            set_aside=[name_of(path) for path in restored.set_aside],
        )
    return run, restored


def _packed(config: Config, dataset: TokenDataset) -> Samples | None:
    """The plan of whole documents, made once; None for windows of the stream, which need none."""
    if not isinstance(config.data, ChatDataConfig):
        return None
    return build_samples(config.data, dataset, config.train.seq_len, lookahead=1)


def _open_metrics(parts: StepParts, plain_config: dict[str, Any], peak_flops: float) -> Metrics:
    config = parts.config
    return Metrics(
        Path(config.run_dir),
        config.metrics,
        rank=parts.mesh.rank,
        total_steps=config.train.steps,
        log_every=config.train.log_every,
        flops_per_token=parts.model.flops_per_token(config.train.seq_len),
        peak_flops=peak_flops,
        run_config=plain_config,
    )


def _say_start(
    run: Run,
    dataset: TokenDataset,
    restored: Restored | None,
    restart_count: int,
    changes: dict[str, tuple[Any, Any]],
    decision: Decision | None,
) -> None:
    config, mesh, say = run.config, run.mesh, run.console.message
    num_parameters = count_parameters(run.model)
    if restart_count:
        run.metrics.event("restart", run.state.step, count=restart_count)
        say(f"restart {restart_count}: all workers were started again")
    run.metrics.event(
        "start",
        run.state.step,
        world_size=mesh.world_size,
        parallel=config.parallel.name.value,
        device=str(mesh.device),
        num_parameters=num_parameters,
        unigram_entropy_nats=dataset.unigram_entropy_nats,
        data_fingerprint=dataset.fingerprint,
        activations=None if decision is None else asdict(decision),
        versions={
            "windlass": windlass.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )
    ranks = f"{mesh.world_size} ranks, {config.parallel.name}" if mesh.world_size > 1 else "1 rank"
    say(
        f"model   {config.model.name}, {num_parameters:,} parameters, {config.train.dtype}, {ranks}, {mesh.device.type}"
    )
    say(
        f"data    {config.data.name}, {dataset.num_tokens:,} tokens of {dataset.num_documents:,} documents, "
        f"unigram entropy {dataset.unigram_entropy_nats:.4f} nats/token"
    )
    if isinstance(run.data.samples, PackedDocuments):
        say(f"packed  {_packing_of(run.data.samples, dataset)}")
    for number, reason in enumerate(() if decision is None else decision.reasons):
        say(f"{'' if number else 'saved':<8}{reason}")
    say(f"run     {config.run_dir}")
    _say_parity(run)
    for key, (before, now) in changes.items():
        say(f"changed {key}: {before} -> {now}")
    if restored is not None:
        for path in restored.set_aside:
            say(f"warning: {name_of(path)}: a newer checkpoint that is damaged or superseded was moved there")
        say(f"resumed at step {restored.step} from {restored.origin}")
        for line in change_of_rate(run, restored.origin):
            say(line)


def _say_parity(run: Run) -> None:
    """Tells that the job has shrunk below what its parity needs."""
    wanted, kept = run.config.checkpoint.num_parity_shards, num_parity_shards(run.config, run.mesh)
    if run.config.checkpoint.name == CheckpointKind.erasure and kept < wanted:
        run.metrics.event("parity_reduced", run.state.step, num_parity_shards=kept, wanted=wanted)
        run.console.message(
            f"warning: of {run.mesh.num_nodes} nodes, snapshots keep {kept} parity shards and not {wanted}"
        )


def _packing_of(samples: PackedDocuments, dataset: TokenDataset) -> str:
    figures = samples.figures
    learned = (dataset.num_targets or 0) / max(1, dataset.num_tokens)
    return (
        f"{figures.num_documents:,} conversations in {samples.num_samples:,} samples, {figures.fill_fraction:.1%} "
        f"full, {figures.num_truncated:,} truncated, {figures.num_dropped:,} left out; {learned:.1%} of tokens learned"
    )


def _say_end(run: Run, dataset: TokenDataset, stop: StopRequest, ending: Ending) -> None:
    config = run.config
    lines = []
    saved = run.checkpoint is not None
    if ending == Ending.done:
        assert run.last_evaluation is not None
        lines += [
            f"done    step {run.state.step}, {run.state.tokens:,} tokens",
            f"validation loss {run.last_evaluation.loss:.4f} nats/token; "
            f"unigram entropy {dataset.unigram_entropy_nats:.4f} nats/token (a model that knows only frequencies)",
        ]
        lines += warning_at_the_end(run)
        lines.append(f"report  {_report(config)}")
        if saved:
            lines += how_to_go_on(run)
    else:
        by = f"at step {run.state.step} by {stop.signal_name or 'a signal to another rank'}"
        lines.append(f"{ENDINGS[ending].format(by)}; {_what_is_saved(config, ending)}")
    sys.stdout.write("\n".join(map(printable, lines)) + "\n")
    sys.stdout.flush()


def _what_is_saved(config: Config, ending: Ending) -> str:
    if config.checkpoint.name == CheckpointKind.none:
        return "checkpoint=none, so nothing was saved"
    text = "its checkpoint is written"
    if ending == Ending.stopped:
        text += ", and the same command resumes"
        if config.resume != "auto":
            text += " (without resume=PATH, which would begin from there again)"
    return text


def _report(config: Config) -> str:
    """The path of the report, or the command that makes it."""
    if importlib.util.find_spec("matplotlib") is None:
        return f"{_report_command(config.run_dir)} (needs `pip install 'windlass[report]'`)"
    return _report_or_reason(Path(config.run_dir)) if config.metrics.report else _report_command(config.run_dir)


def _report_command(run_dir: str | Path) -> str:
    return command("windlass", "report", run_dir)


def _report_or_reason(run_dir: Path) -> str:
    """The report's path. The run is done and saved by now: a plot that fails must not make it a failure."""
    try:
        return str(write_report(run_dir))
    except Exception as error:
        logger.exception("the report could not be written")
        return f"could not be written ({error}); `{_report_command(run_dir)}` tries again"


@contextmanager
def _logging_to(path: Path) -> Iterator[TextIO]:
    """Adds this process's log records, warnings and the error that ends it to a file of the run folder; gives that."""
    try:
        make_folder(path.parent, path.parent.parent)
        stream = os.fdopen(open_growing(path), "a", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise unusable(path.parent.parent, error) from error
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    # A disk that is full is told of by what it ends, not by what was to be logged of it.
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    root = logging.getLogger()
    others = root.handlers
    root.handlers = [handler]  # and none of Hydra's, which would print errors a second time
    logging.captureWarnings(True)
    try:
        yield stream
    except WindlassError as error:
        logger.error("%s", error)
        raise
    except Exception:
        logger.exception("this rank failed")
        raise
    finally:
        logging.captureWarnings(False)
        root.handlers = others
        with suppress(OSError):
            handler.close()
            stream.close()
