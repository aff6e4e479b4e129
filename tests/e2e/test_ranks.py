"""Several ranks, on one machine and on two, give what one gives, and outlive each other's deaths."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from psla_fast.shards import open_shards
from tests.tiny import step_rows
from tests.training_worker import (
    ROOT,
    Kill,
    Nursery,
    assert_same_run,
    command,
    environment,
    free_port,
    scores_of,
    weights_of,
)

PLAIN = ("--model.drop-connect", "0")  # each rank draws dropout's zeros for itself


@pytest.fixture(scope="module")
def whole(nursery: Nursery, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two ranks."""
    run = tmp_path_factory.mktemp("whole") / "run"
    nursery.finish(command(shards, run), ranks=2)
    return run


def assert_close_runs(run: Path, other: Path) -> None:
    """The runs differ by rounding alone."""
    rows, others = step_rows(run), step_rows(other)
    assert [(row["epoch"], row["step"]) for row in rows] == [(row["epoch"], row["step"]) for row in others]
    for key in ("loss", "lr"):
        assert np.allclose([row[key] for row in rows], [row[key] for row in others], rtol=1e-5, atol=0), key
    one, two = (np.loadtxt(folder / "result.csv", delimiter=",") for folder in (run, other))
    assert np.allclose(one, two, rtol=1e-4, atol=0)
    for name in ("best.pt", "wa.pt", "last.pt"):
        first, second = (weights_of(folder / "checkpoints" / name) for folder in (run, other))
        assert all(np.allclose(first[key], second[key], atol=1e-5) for key in first)


@pytest.mark.parametrize(
    "flags",
    [
        ("--optim.accumulate", "3"),  # the last update of an epoch has one batch only
        ("--stream.buckets", "30", "100", "--stream.bucket-by", "clips"),
    ],
)
def test_one_two_and_four_ranks_give_the_same_losses_and_scores(
    nursery: Nursery, shards: Path, tmp_path: Path, flags: tuple[str, ...]
):
    for ranks in (1, 2, 4):
        run = tmp_path / str(ranks)
        ends = nursery.train(command(shards, run, *PLAIN, *flags), ranks=ranks)
        assert [end.status for end in ends] == [0] * ranks, ends
        assert_close_runs(run, tmp_path / "1")
        for split, clips in (("val", 13), ("eval", 11)):
            one, other = (scores_of(tmp_path / name / "scores" / f"{split}.h5") for name in ("1", str(ranks)))
            assert len(set(other["key"])) == clips
            for name in one.keys() - {"key"}:
                assert np.allclose(one[name], other[name], atol=1e-5), name
            with open_shards(shards / split) as opened:
                assert [key.decode() for key in other["key"]] == opened.keys


def test_only_the_first_rank_prints_and_writes(nursery: Nursery, shards: Path, tmp_path: Path):
    run = tmp_path / "run"
    flags = command(shards, run)
    ends = nursery.train(flags, Kill("write", str(run), rank=1), ranks=2)
    assert [end.status for end in ends] == [0, 0], ends[1]
    lines = ends[0].output.splitlines()
    assert len(lines) == len(set(lines)) == 1 + 3 * (7 + 1) + 4
    assert ends[1].output == ""
    nursery.kill(command(shards, tmp_path / "run2"), Kill("write", str(tmp_path / "run2")), ranks=2)


@pytest.mark.parametrize(
    ("dies", "event", "nth"), [(1, "update", 10), (0, "update", 10), (1, "score", 3), (0, "score", 3)]
)
def test_when_a_rank_is_killed_the_other_ends_within_a_minute_and_the_run_goes_on(
    nursery: Nursery, shards: Path, whole: Path, tmp_path: Path, dies: int, event: str, nth: int
):
    flags = command(shards, tmp_path / "run")
    ends = nursery.kill(flags, Kill(event, nth=nth, rank=dies), ranks=2)
    survivor = ends[1 - dies]
    assert survivor.status == 2
    assert re.fullmatch(
        r"psla_fast.train: error: lost another rank \(.+\)\. It says .+",
        survivor.output.splitlines()[-1].replace(" [rank 1]", ""),
    )
    assert "Traceback" not in survivor.output
    assert survivor.at - ends[dies].at < 60
    nursery.finish(flags, ranks=2)
    assert_same_run(tmp_path / "run", whole)


def test_a_signal_to_any_rank_stops_all_at_the_same_step(
    nursery: Nursery, shards: Path, whole: Path, tmp_path: Path
):
    flags = command(shards, tmp_path / "run")
    ends = nursery.train(flags, Kill("update", nth=10, rank=1, signal=signal.SIGTERM), ranks=2)
    assert [end.status for end in ends] == [3, 3]
    assert ends[0].output.count("stopped by SIGTERM") == 1
    assert ends[1].output == ""
    assert "going on at epoch 2, step 4" in nursery.finish(flags, ranks=2)
    assert_same_run(tmp_path / "run", whole)


def test_a_run_goes_on_with_another_number_of_ranks(nursery: Nursery, shards: Path, tmp_path: Path):
    nursery.finish(command(shards, tmp_path / "one", *PLAIN))
    flags = command(shards, tmp_path / "run", *PLAIN, "--checkpoint-minutes", "0")
    nursery.kill(flags, Kill("update", nth=5))
    nursery.kill(flags, Kill("update", nth=6, rank=1), ranks=2)
    nursery.kill(flags, Kill("update", nth=4, rank=2), ranks=4)
    assert "going on at epoch 2, step 6" in nursery.finish(flags)
    assert_close_runs(tmp_path / "run", tmp_path / "one")


def test_ranks_that_do_not_share_the_run_folder_end_instead_of_going_on_from_different_places(
    nursery: Nursery, shards: Path, tmp_path: Path
):
    nursery.kill(command(shards, tmp_path / "run0"), Kill("update", nth=10), ranks=2)
    ends = nursery.train(command(shards, tmp_path / "run{rank}"), ranks=2)
    assert [end.status for end in ends] == [2, 2]
    for end in ends:
        assert "error: rank 1 would go on at epoch 1, step 1, rank 0 elsewhere. Pass a --run on" in end.output


def start_torchrun(
    options: list[str],
    flags: list[str],
    kill: Kill | None = None,
    prefix: tuple[str, ...] = (),
    **settings: str,
) -> subprocess.Popen[str]:
    """Start torchrun's agent of one machine; a `kill` is for its rank of that number."""
    told = json.dumps(kill and asdict(kill))
    torchrun = [sys.executable, str(Path(sys.executable).parent / "torchrun"), *options]
    return subprocess.Popen(
        [*prefix, *torchrun, "-m", "--", "tests.training_worker", *flags],
        cwd=ROOT,
        env=environment(TRAINING_KILL=told, **settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end_all(agents: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Wait for the agents; give their exit status and output. Nothing of them stays behind."""
    deadline = time.monotonic() + 400
    try:
        outputs = [agent.communicate(timeout=deadline - time.monotonic())[0] for agent in agents]
        return [(agent.returncode, output) for agent, output in zip(agents, outputs, strict=True)]
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGTERM)  # torchrun ends its ranks
                try:
                    agent.wait(60)
                except subprocess.TimeoutExpired:
                    os.killpg(agent.pid, signal.SIGKILL)


def machine(endpoint: str, *more: str) -> list[str]:
    """Options of torchrun on one of two machines with a rank each."""
    return ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test"] + [
        "--rdzv-endpoint",
        endpoint,
        *more,
    ]


def test_torchrun_restarts_killed_ranks_and_the_run_ends_as_if_nothing_had_happened(
    shards: Path, whole: Path, tmp_path: Path
):
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    flags = command(shards, tmp_path / "run")
    [(status, output)] = end_all([start_torchrun(options, flags, Kill("update", nth=10, rank=1))])
    assert status == 0, output
    assert output.count("going on at epoch 2, step 1") == 1
    assert_same_run(tmp_path / "run", whole)


def test_a_sigterm_to_torchrun_saves_the_step_and_the_run_goes_on(
    nursery: Nursery, shards: Path, whole: Path, tmp_path: Path
):
    flags = command(shards, tmp_path / "run")
    kill = Kill("update", nth=10, signal=signal.SIGTERM, by_agent=True)
    [(status, output)] = end_all([start_torchrun(["--standalone", "--nproc-per-node", "2"], flags, kill)])
    assert status
    assert output.count("stopped by SIGTERM") == 1
    assert "going on at epoch 2, step" in nursery.finish(flags, ranks=2)
    assert_same_run(tmp_path / "run", whole)


def test_two_machines_on_loopback_end_when_a_rank_is_killed_and_go_on_to_the_results_of_one_machine(
    shards: Path, whole: Path, tmp_path: Path
):
    flags = command(shards, tmp_path / "run")
    for kill in (Kill("update", nth=10, rank=1), None):
        options = machine(f"127.0.0.1:{free_port()}")
        agents = [start_torchrun(options, flags, kill) for _ in range(2)]
        deadline = time.monotonic() + 400
        while all(agent.poll() is None for agent in agents) and time.monotonic() < deadline:
            time.sleep(0.1)
        first_ended = time.monotonic()
        ends = end_all(agents)
        output = "".join(text for _, text in ends)
        if kill:
            assert time.monotonic() - first_ended < 60
            assert all(status for status, _ in ends), output
            assert output.count("error: lost another rank") == 1
        else:
            assert [status for status, _ in ends] == [0, 0], output
            assert output.count("going on at epoch 2, step 1") == 1
    assert_same_run(tmp_path / "run", whole)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces with an address each, 10.77.0.1 and 10.77.0.2, on either end of a cable."""
    names = [f"psla{os.getpid()}{end}" for end in "ab"]
    commands = [["netns", "add", name] for name in names]
    commands.append(
        ["link", "add", "rank0", "netns", names[0], "type", "veth", "peer", "rank0", "netns", names[1]]
    )
    for number, name in enumerate(names, start=1):
        commands.append(["-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "rank0"])
        commands += [["-n", name, "link", "set", device, "up"] for device in ("lo", "rank0")]
    try:
        for words in commands:
            if not shutil.which("ip") or subprocess.run(["ip", *words], capture_output=True).returncode:
                pytest.skip("may not make network namespaces here")
        yield names
    finally:
        for name in names:
            if shutil.which("ip"):
                subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_two_hosts_of_a_network_give_the_results_of_one_machine(
    hosts: list[str], shards: Path, whole: Path, tmp_path: Path
):
    flags = command(shards, tmp_path / "run")
    agents = []
    for number, host in enumerate(hosts, start=1):
        options = machine("10.77.0.1:29400", "--local-addr", f"10.77.0.{number}")
        options += ["--rdzv-conf", f"is_host={int(number == 1)}"]  # there are no names to tell it by
        prefix = ("ip", "netns", "exec", host)
        agents.append(start_torchrun(options, flags, prefix=prefix, GLOO_SOCKET_IFNAME="rank0"))
    ends = end_all(agents)
    assert [status for status, _ in ends] == [0, 0], ends
    assert_same_run(tmp_path / "run", whole)
