"""Writes a batch script for Slurm, which runs `launch=torchrun` on every node of its allocation.

Told of its time limit, or preempted, the job saves and is queued again: its launchers end with 75, and nothing else
queues it again. The launcher of the first node keeps the store where all meet, so the job ends as that one does; it
has a job step of its own, for its exit code not to mix with those of nodes that were lost or taken back before. Slurm
gives a job no other node in place of a lost one, so little is waited for them.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from windlass.errors import EXIT_STOPPED, require
from windlass.launch.script import Job, require_match

MAX_GRACE_S = 65535
"""The longest time that `sbatch --signal` takes."""
JOIN_TIMEOUT_S, WAIT_FOR_NODES_S = 300, 15
"""All nodes of an allocation start at once, and none comes later."""

_STORE = """\
# All nodes meet at the first one, at a port that other jobs there are unlikely to have.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address="${hosts[0]}:$((20000 + SLURM_JOB_ID % 10000))"
# They know each other by a secret, of this start of the job: in its environment, which no other user can read.
export WINDLASS_SECRET="${WINDLASS_SECRET:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')}"
"""

_RUN = """\
# The launchers are told by Slurm: srun would kill them if it were told itself.
told=
trap 'told=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

# The exit code of a process of this shell, also when a signal interrupts the wait.
await() {
  local code
  while :; do
    told=
    wait "$1"
    code=$?
    [ -n "$told" ] || return "$code"
  done
}

# The job ends as its first node does, whatever came of the others.
"${step[@]}" --relative=0 --nodes=1 --ntasks=1 "${train[@]}" &
first_step=$!
others=$((SLURM_JOB_NUM_NODES - 1))
if [ "$others" -gt 0 ]; then
  "${step[@]}" --relative=1 --nodes="$others" --ntasks="$others" "${train[@]}" &
  other_steps=$!
fi
await "$first_step"
code=$?
if [ "$others" -gt 0 ]; then
  await "$other_steps"
fi
"""

_END = f"""\
# {EXIT_STOPPED}: it was told to end, and has saved; the same command goes on. After `scancel` it is not RUNNING.
if [ "$code" -eq {EXIT_STOPPED} ] && [ "$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID")" = RUNNING ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


@dataclass(frozen=True)
class SlurmOptions:
    """Args:
    setup: lines of shell that prepare each start, such as `module load cuda`.
    sbatch: further options of it.
    """

    time: str | None = None
    partition: str | None = None
    account: str | None = None
    setup: tuple[str, ...] = ()
    sbatch: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for flag, value in (("--time", self.time), ("--partition", self.partition), ("--account", self.account)):
            _require_word(flag, value)
        for option in self.sbatch:
            rule, fix = "must be an option of sbatch", "write --sbatch=--constraint=ib"
            require_match(r"-[^\n]+", "--sbatch", option, rule, fix)


def slurm_script(job: Job, options: SlurmOptions) -> str:
    """Returns the script, for `sbatch`.

    Raises:
        ConfigError: a value that sbatch would read as something else.
    """
    _require_word("--name", job.name)
    _require_word("--memory", job.memory)
    require(
        job.grace_s <= MAX_GRACE_S, "--grace-s", job.grace_s, f"must be at most {MAX_GRACE_S}", "write --grace-s 600"
    )
    head = [
        "#!/bin/bash",
        "# Written by `windlass script slurm`: every node of the job runs `windlass train`.",
        *(f"#SBATCH {option}" for option in _sbatch_options(job, options)),
        *(f"#SBATCH {option}" for option in options.sbatch),
        "",
    ]
    setup = [*options.setup, ""] if options.setup else []
    return "\n".join([*head, *setup, _STORE + _commands(job), _RUN, _END])


def _sbatch_options(job: Job, options: SlurmOptions) -> Iterator[str]:
    yield f"--job-name={job.name}"
    # Not with --ntasks-per-node, for which Slurm gives the fewest nodes that were asked for; job steps have it.
    yield f"--nodes={f'{job.min_nodes}-{job.max_nodes}' if job.is_elastic else job.max_nodes}"
    for option, value in (
        ("gpus-per-node", job.num_gpus),
        ("cpus-per-task", job.num_cpus),
        ("mem", job.memory),
        ("time", options.time),
        ("partition", options.partition),
        ("account", options.account),
    ):
        if value is not None:
            yield f"--{option}={value}"
    yield f"--signal=B:TERM@{job.grace_s}"
    yield "--requeue"
    yield "--open-mode=append"
    if job.is_elastic:
        yield "--no-kill"


def _commands(job: Job) -> str:
    """Writes the arrays `train`, which each node runs, and `step`, which has nodes run it.

    A step ends no task because another has ended: all save, some before others. In an elastic job it outlives nodes.
    """
    nnodes = f"launch.nnodes={job.nnodes}"
    defaults = {"launch.join_timeout_s": JOIN_TIMEOUT_S}
    if job.is_elastic:
        nnodes = f'"launch.nnodes={job.min_nodes}:$SLURM_JOB_NUM_NODES"'  # as many as there were
        defaults["launch.wait_for_nodes_s"] = WAIT_FOR_NODES_S
    words = job.command(nnodes, '"launch.address=$address"', defaults, shlex.quote)
    step = ["srun", "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=0", "--wait=0"]
    if job.num_cpus is not None:  # which srun does not take from the job in all versions
        step.append(f"--cpus-per-task={job.num_cpus}")
    if job.is_elastic:
        step.append("--no-kill")
    lines = ["train=(", " ".join(words[:2]), *words[2:]]
    return "\n  ".join(lines) + f"\n)\nstep=({' '.join(step)})\n"


def _require_word(flag: str, value: str | None) -> None:
    require_match(r"[^\s\"'#\\]+", flag, value, "must be one word without quotes", "write it as sbatch takes it")
