"""The script for Slurm, run as by sbatch, with programs in the place of Slurm's that start local processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support import nodes, runs
from support.launched import newest_step, wait_for_step

from windlass.cli import main
from windlass.errors import EXIT_DONE, EXIT_STOPPED
from windlass.launch.config import parse_nodes
from windlass.launch.script import own_overrides

Captured = pytest.CaptureFixture[str]

SRUN = """\
# Starts a process a node, each with memory of its own, and ends with the largest exit code. As Slurm's, it takes
# SIGTERM for an order to kill.
import os, signal, subprocess, sys
from pathlib import Path
root = Path(os.environ["SLURM_STUB"])
options = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[1:] if word.startswith("--"))
command = [word for word in sys.argv[1:] if not word.startswith("--")]
first, count = int(options["relative"]), int(options["nodes"])
assert options["ntasks"] == options["nodes"] and options["ntasks-per-node"] == "1"
tasks = []
signal.signal(signal.SIGTERM, lambda *_: [task.kill() for task in tasks])
for number in range(first, first + count):
    shm = root / f"node{number}"
    shm.mkdir(exist_ok=True)
    own = {"SLURM_NODEID": str(number - first), "NODE": str(number), "WINDLASS_SHM_DIR": str(shm)}
    tasks.append(subprocess.Popen(command, env=os.environ | own))
    (root / "tasks" / str(tasks[-1].pid)).touch()
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
SCONTROL = """\
import os, sys
from pathlib import Path
if sys.argv[1:3] == ["show", "hostnames"]:
    print("\\n".join(sys.argv[3].split(",")))
else:
    assert sys.argv[1] == "requeue"
    with (Path(os.environ["SLURM_STUB"]) / "requeued").open("a") as file:
        file.write(sys.argv[2] + "\\n")
"""
SCANCEL = """\
import os, signal, sys
from contextlib import suppress
from pathlib import Path
assert sys.argv[1:] == ["--signal=TERM", os.environ["SLURM_JOB_ID"]]
for task in (Path(os.environ["SLURM_STUB"]) / "tasks").iterdir():
    with suppress(ProcessLookupError):
        os.kill(int(task.name), signal.SIGTERM)
"""
SQUEUE = """\
import os
from pathlib import Path
print((Path(os.environ["SLURM_STUB"]) / "state").read_text())
"""
WINDLASS = "import os, sys; os.execv(sys.executable, [sys.executable, '-m', 'windlass.cli', *sys.argv[1:]])"
SAY = "import json, sys; sys.stdout.write(json.dumps(sys.argv[1:]) + '\\n')"


class Slurm:
    """An allocation on this machine, and what has become of its job."""

    def __init__(self, root: Path, num_nodes: int, state: str = "RUNNING") -> None:
        self.root, self.num_nodes = root, num_nodes
        (root / "bin").mkdir()
        (root / "tasks").mkdir()
        (root / "state").write_text(state)
        self.job_id = str(40000 + _free_port() - 20000)
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL), ("squeue", SQUEUE)):
            self.install(name, text)
        self.install("windlass", WINDLASS)

    def install(self, name: str, text: str) -> None:
        path = self.root / "bin" / name
        path.write_text(f"#!{sys.executable}\n{text}")
        path.chmod(0o755)

    def start(self, script: str) -> subprocess.Popen[str]:
        """The batch shell on the first node, in a session of its own."""
        path = self.root / "job.sh"
        path.write_text(script)
        for task in (self.root / "tasks").iterdir():
            task.unlink()
        environment = {
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}",
            "SLURM_STUB": str(self.root),
            "SLURM_JOB_ID": self.job_id,
            "SLURM_JOB_NUM_NODES": str(self.num_nodes),
            "SLURM_JOB_NODELIST": ",".join(["localhost"] * self.num_nodes),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.Popen(
            ["bash", str(path)],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str) -> tuple[int, str]:
        """The exit code of the batch shell, and what the job has printed."""
        return self.end(self.start(script))

    def end(self, shell: subprocess.Popen[str]) -> tuple[int, str]:
        try:
            printed, _ = shell.communicate(timeout=150)
        except subprocess.TimeoutExpired:
            os.killpg(shell.pid, signal.SIGKILL)
            raise AssertionError(f"the job is still running: {shell.communicate()[0]}") from None
        return shell.returncode, printed

    @property
    def requeued(self) -> list[str]:
        path = self.root / "requeued"
        return path.read_text().split() if path.exists() else []


def _free_port() -> int:
    """One of those that the script makes of job ids."""
    for port in range(20000 + os.getpid() % 5000, 30000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise AssertionError("all ports are taken")


def script_of(capsys: Captured, *arguments: str) -> str:
    assert main(["script", "slurm", *arguments]) == EXIT_DONE
    return capsys.readouterr().out


def run_arguments(tmp_path: Path, *overrides: str) -> tuple[runs.Config, list[str]]:
    """A small run, and the overrides that make it."""
    config = runs.run_config(tmp_path, "run", *overrides)
    own = [
        *runs.TINY_MODEL,
        "data=text",
        f"data.path={runs.write_corpus(tmp_path / 'corpus')}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.num_workers=1",
        "train.batch_size=1",
        "train.seq_len=32",
        "train.log_every=1",
        "train.eval_every=0",
        "train.device=cpu",
        "metrics.console=plain",
        "metrics.peak_flops=1e12",
        "launch.nproc_per_node=1",
        f"run_dir={config.run_dir}",
    ]
    return config, [*own, *overrides]


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("num_nodes", ["2", "1:2"])
def test_a_job_trains_to_its_end_on_all_its_nodes(num_nodes: str, tmp_path: Path, capsys: Captured) -> None:
    config, overrides = run_arguments(tmp_path, "train.steps=6", "checkpoint=erasure", "checkpoint.snapshot_every=2")
    with nodes.shared_memory() as root:
        slurm = Slurm(root, 2)
        code, printed = slurm.run(script_of(capsys, "--nodes", num_nodes, *overrides))
        assert code == EXIT_DONE, printed
        assert slurm.requeued == []
        assert runs.events(config, "start")[0]["world_size"] == 2
        assert max(runs.losses(config)) == 6
        assert [list((root / f"node{number}").iterdir()) for number in range(2)] == [[], []], "agents have left"


@pytest.mark.slow
@pytest.mark.full
def test_a_job_that_is_told_to_end_saves_is_queued_again_and_goes_on(tmp_path: Path, capsys: Captured) -> None:
    config, overrides = run_arguments(tmp_path, "train.steps=300", "checkpoint.persist_every=100000")
    with nodes.shared_memory() as root:
        slurm = Slurm(root, 2)
        script = script_of(capsys, "--nodes", "2", *overrides)
        shell = slurm.start(script)
        wait_for_step(config, 3)
        shell.send_signal(signal.SIGTERM)  # to the batch shell alone, as of --signal=B:TERM
        code, printed = slurm.end(shell)
        assert code == EXIT_STOPPED, printed
        assert slurm.requeued == [slurm.job_id]
        (stopped,) = runs.events(config, "preempted")
        assert runs.is_committed(config, stopped["step"])
        assert newest_step(config) == stopped["step"] < 300

        code, printed = slurm.run(script)
        assert code == EXIT_DONE, printed
        assert slurm.requeued == [slurm.job_id]
        assert [event["step"] for event in runs.events(config, "recovered")] == [stopped["step"]]
        assert sorted(runs.losses(config)) == list(range(1, 301))
        assert all(len(values) == 1 for values in runs.losses(config).values()), "no step was trained twice"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("state", "first", "other", "ends_with", "is_requeued"),
    [
        ("RUNNING", 75, 75, 75, True),
        ("RUNNING", 75, 137, 75, True),
        ("COMPLETING", 75, 75, 75, False),
        ("RUNNING", 0, 0, 0, False),
        ("RUNNING", 0, 75, 0, False),
        ("RUNNING", 1, 75, 1, False),
        ("RUNNING", 2, 2, 2, False),
        ("RUNNING", 137, 75, 137, False),
    ],
)
def test_the_first_node_decides_and_only_75_is_queued_again(
    state: str, first: int, other: int, ends_with: int, is_requeued: bool, tmp_path: Path, capsys: Captured
) -> None:
    slurm = Slurm(tmp_path, 3, state)
    slurm.install("windlass", f"import os, sys; sys.exit({first} if os.environ['NODE'] == '0' else {other})")
    assert slurm.run(script_of(capsys, "--nodes", "2:3"))[0] == ends_with
    assert slurm.requeued == ([slurm.job_id] if is_requeued else [])


def test_a_node_alone_has_one_step(tmp_path: Path, capsys: Captured) -> None:
    slurm = Slurm(tmp_path, 1)
    slurm.install("windlass", SAY)
    code, printed = slurm.run(script_of(capsys))
    assert code == EXIT_DONE
    assert len(printed.splitlines()) == 1


def test_launchers_get_the_overrides_letter_for_letter(tmp_path: Path, capsys: Captured) -> None:
    nasty = ['run_dir="it\'s $(touch x) `y` ${model.name} \\\\ *"', "data=text", 'data.path="a\nb;c&d|e"']
    slurm = Slurm(tmp_path, 2)
    slurm.install("windlass", SAY)
    code, printed = slurm.run(script_of(capsys, "--nodes", "2", *nasty))
    assert code == EXIT_DONE, printed
    port = 20000 + int(slurm.job_id) % 10000
    own = ["launch.nnodes=2", f"launch.address=localhost:{port}", "launch.join_timeout_s=300"]
    assert [json.loads(line) for line in printed.splitlines()] == 2 * [["train", "launch=torchrun", *own, *nasty]]


def test_an_elastic_job_counts_the_nodes_that_it_got(tmp_path: Path, capsys: Captured) -> None:
    slurm = Slurm(tmp_path, 3)
    slurm.install("windlass", SAY)
    script = script_of(capsys, "--nodes", "2:4", "launch.wait_for_nodes_s=7")
    code, printed = slurm.run(script)
    assert code == EXIT_DONE, printed
    for line in printed.splitlines():
        assert "launch.nnodes=2:3" in json.loads(line)
        assert [word for word in json.loads(line) if "wait_for_nodes_s" in word] == ["launch.wait_for_nodes_s=7"]
    assert "#SBATCH --nodes=2-4\n" in script and "#SBATCH --no-kill\n" in script
    assert "--kill-on-bad-exit=0" in script and "--no-kill)" in script


def test_what_sbatch_is_asked_for(capsys: Captured) -> None:
    script = script_of(
        capsys,
        *("--nodes=4", "--name=mine", "--gpus=8", "--cpus=64", "--memory=500G", "--time=1-12:00:00"),
        *("--partition=big", "--account=us", "--grace-s=120", "--sbatch=--constraint=ib", "--setup=module load cuda"),
    )
    options = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    assert options == [
        "--job-name=mine",
        "--nodes=4",
        "--gpus-per-node=8",
        "--cpus-per-task=64",
        "--mem=500G",
        "--time=1-12:00:00",
        "--partition=big",
        "--account=us",
        "--signal=B:TERM@120",
        "--requeue",
        "--open-mode=append",
        "--constraint=ib",
    ]
    lines = script.splitlines()
    assert lines.index("module load cuda") < lines.index("train=(")
    assert "--cpus-per-task=64" in next(line for line in lines if line.startswith("step=("))


@pytest.mark.parametrize("arguments", [[], ["--nodes=2:4", "--cpus=8", "run_dir='a b'"]])
def test_shells_and_their_linter_have_nothing_to_say(arguments: list[str], tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "job.sh"
    path.write_text(script_of(capsys, *arguments))
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck") is not None:
        linted = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True, check=False)
        assert linted.returncode == 0, linted.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.step=5"], "train.step=5: is no key"),
        (["launch.nnodes=2"], "launch.nnodes=2: is what the script sets"),
        (["launch=ray"], "launch=ray: is what the script sets"),
        (["++launch.address=a:1"], "launch.address=a:1: is what the script sets"),
        (["--nodes=0"], "--nodes=0: must be a number of nodes"),
        (["--nodes=4:2"], "--nodes=4:2: must be a number of nodes"),
        (["--nodes=2", "parallel=none"], "parallel=none: trains on one rank, and 2 were started"),
        (["--gpus=8", "parallel=none"], "parallel=none: trains on one rank, and 8 were started"),
        (["--gpus=0"], "--gpus=0: must be at least 1"),
        (["--grace-s=70000"], "--grace-s=70000: must be at most 65535"),
        (["--partition=a b"], "--partition=a b: must be one word"),
        (["--sbatch=constraint"], "--sbatch=constraint: must be an option of sbatch"),
        (["--sbatch=--a\nrm x"], "must be an option of sbatch"),
    ],
)
def test_a_mistake_is_one_message_and_no_script(arguments: list[str], message: str, capsys: Captured) -> None:
    assert main(["script", "slurm", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("windlass: error: ") and message in captured.err


def test_the_launcher_that_the_script_chooses_may_be_said_twice() -> None:
    assert own_overrides(["launch=torchrun", "train.steps=5"]) == ("train.steps=5",)
    assert (parse_nodes("3"), parse_nodes("2:4")) == ((3, 3), (2, 4))
