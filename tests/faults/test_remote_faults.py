"""Servers and caches that fail: what passes leaves no trace, what lasts is one clear error, soon."""

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from psla_fast.pack import PackConfig, WorkConfig, pack_splits
from psla_fast.sampling import SamplingConfig
from psla_fast.shards import ShardError, Shards, exists_split, open_shards
from psla_fast.sources import read_fsd50k
from psla_fast.stream import BatchPlan, DrawPlan, PlanConfig, StreamConfig
from psla_fast.stream.slabs import SlabStream
from psla_fast.stream.webdataset import BlockSource
from tests.servers import FolderServer, serve

ROOT = Path(__file__).resolve().parents[2]
CONFIG = StreamConfig(kind="webdataset", lanes=2, shuffle_clips=20)
PASSING = ["500", "503", "429", "drop", "short", "flip", "reset", "hang", "moved"]
LASTING = {
    "500": "500 Internal Server Error",
    "503": "503 Service Unavailable",
    "drop": "bytes came",
    "short": "bytes offered",
    "flip": "crc32 differs",
    "reset": "reset by peer",
    "hang": "timed out",
    "moved": "more than 5 redirects",
    "404": "404 Not Found",
    "403": "403 Forbidden",
    "416": "shorter than its index says",
}


@pytest.fixture(scope="module")
def many_shards(synthetic_fsd50k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic FSD50K in shards of a few clips. Read only."""
    out = tmp_path_factory.mktemp("many") / "shards"
    pack_splits(*read_fsd50k(synthetic_fsd50k), out, PackConfig(shard_mb=0.2), WorkConfig(workers=1))
    return out


@pytest.fixture
def server(many_shards: Path) -> Iterator[FolderServer]:
    with serve(many_shards) as server:
        yield server


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psla_fast.shards.remote.BACKOFF_SECONDS", 0.02)
    monkeypatch.setattr("psla_fast.shards.transports.TIMEOUT_SECONDS", 0.3)


def check_epoch(many_shards: Path, shards: Shards, epoch: int, config: StreamConfig = CONFIG) -> None:
    """Read an epoch, and compare every row with the local shards."""
    plan = DrawPlan(shards, PlanConfig(SamplingConfig(), config, 0, 8, 120))
    stream = SlabStream(shards, config, plan.shapes, torch.device("cpu"), BlockSource(shards, config))
    try:
        with open_shards(many_shards / "train") as truth:
            for batch, wanted in zip(stream.batches(plan.batches(epoch)), plan.batches(epoch), strict=True):
                assert not batch.skipped
                check_rows(truth, batch.fbank, wanted)
    finally:
        stream.close()


def check_rows(truth: Shards, fbank: torch.Tensor, wanted: BatchPlan) -> None:
    for row, clip_id in enumerate(wanted.row_ids.tolist()):
        expected = truth.fbank(clip_id)[: wanted.shape.num_frames]
        assert np.array_equal(fbank[row, : len(expected)].float().numpy(), expected)


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("psla-stream")]


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_leaves_the_epoch_complete_and_exact(
    many_shards: Path, server: FolderServer, fault: str
):
    spared = "SHA256SUMS" if fault == "flip" else "?"  # nothing says what the sums should be
    server.fault = lambda path, count: fault if count == 0 and spared not in path else ""
    with open_shards(f"{server.url}/train") as shards:
        check_epoch(many_shards, shards, 0)
    assert len(server.tars()) > len({path for path, _ in server.tars()})


@pytest.mark.parametrize("ranges", [True, False])
def test_an_epoch_over_a_server_of_many_faults_is_exact(many_shards: Path, tmp_path: Path, ranges: bool):
    rng = random.Random(0)
    with serve(many_shards, ranges) as server, open_shards(f"{server.url}/train", str(tmp_path)) as shards:
        server.fault = lambda *_: rng.choice(PASSING[:-2]) if rng.random() < 0.3 else ""
        for cache in ("", str(tmp_path)):
            check_epoch(many_shards, shards, 1, replace(CONFIG, cache=cache))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("fault", LASTING)
def test_a_lasting_fault_of_a_shard_is_one_error_that_names_shard_and_offset(
    many_shards: Path, server: FolderServer, tmp_path: Path, fault: str, cached: bool
):
    cache = str(tmp_path) if cached else ""
    with open_shards(f"{server.url}/train", cache) as shards:
        server.fault = lambda path, _: fault if path.startswith("/train/00001.tar") else ""
        began = time.monotonic()
        with pytest.raises(ShardError) as caught:
            check_epoch(many_shards, shards, 0, replace(CONFIG, cache=cache))
        assert time.monotonic() - began < 8
    text = str(caught.value)
    if not (cached and fault == "flip"):
        assert LASTING[fault] in text
    assert f"{server.url}/train/00001.tar" in text
    assert "offset" in text
    assert "\n" not in text
    assert not own_threads()


def test_a_server_that_goes_away_is_one_error_soon_even_where_clips_may_be_skipped(many_shards: Path):
    with serve(many_shards) as server:
        shards = open_shards(f"{server.url}/train")
    for on_error in ("raise", "skip"):
        began = time.monotonic()
        with pytest.raises(
            ShardError, match=rf"{server.url}/train/\d{{5}}\.tar, key .*, offset \d+: .*refused"
        ):
            check_epoch(many_shards, shards, 0, replace(CONFIG, on_error=on_error))
        assert time.monotonic() - began < 8
    shards.close()


def test_a_shard_that_is_gone_is_skipped_by_choice(many_shards: Path, server: FolderServer):
    with open_shards(f"{server.url}/train") as shards:
        config = replace(CONFIG, on_error="skip")
        server.fault = lambda path, _: "404" if path.startswith("/train/00001.tar") else ""
        plan = DrawPlan(shards, PlanConfig(SamplingConfig(), config, 0, 8, 120))
        source = BlockSource(shards, config)
        stream = SlabStream(shards, config, plan.shapes, torch.device("cpu"), source)
        gone = np.flatnonzero(shards.index.shard == 1)
        wanted = [int(np.isin(batch.row_ids, gone).sum()) for batch in plan.batches(0)]
        skipped = [
            (len(batch.skipped), np.isin(batch.clip_ids, gone).any())
            for batch in stream.batches(plan.batches(0))
        ]
        stream.close()
        assert sum(wanted) > 0
        for want, (num_skipped, has_gone) in zip(wanted, skipped, strict=True):
            assert num_skipped == want
            assert not has_gone
        assert source.held_bytes == 0


@pytest.mark.parametrize("cached", [False, True])
def test_closing_takes_under_two_seconds_while_requests_hang(
    many_shards: Path, server: FolderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
):
    monkeypatch.setattr("psla_fast.shards.transports.TIMEOUT_SECONDS", 60)
    cache = str(tmp_path) if cached else ""
    config = replace(CONFIG, cache=cache)
    with open_shards(f"{server.url}/train", cache) as shards:
        server.fault = lambda *_: "hang"
        plan = DrawPlan(shards, PlanConfig(SamplingConfig(), config, 0, 8, 120))
        stream = SlabStream(shards, config, plan.shapes, torch.device("cpu"), BlockSource(shards, config))
        consumer = threading.Thread(target=consume, args=(stream, plan), daemon=True)
        consumer.start()
        while not server.tars():
            time.sleep(0.01)
        time.sleep(0.2)  # till all threads wait
        began = time.monotonic()
        stream.close()
        assert time.monotonic() - began < 2
        consumer.join(2)
        assert not consumer.is_alive()
        assert not own_threads()
    assert not list(tmp_path.rglob("*.tmp"))


def consume(stream: SlabStream, plan: DrawPlan) -> None:
    with pytest.raises((InterruptedError, ShardError)):
        list(stream.batches(plan.batches(0)))


def test_a_split_that_is_not_there_or_is_none_is_one_clear_error(many_shards: Path, server: FolderServer):
    with pytest.raises(ShardError, match="404 Not Found. Pass the URL of a packed split"):
        open_shards(f"{server.url}/nosuch")
    server.fault = lambda *_: "403"
    with pytest.raises(ShardError, match="403 Forbidden"):
        exists_split(f"{server.url}/eval")
    server.fault = lambda *_: "503"
    with pytest.raises(ShardError, match=r"SHA256SUMS: 503 .*\(5 attempts\)"):
        exists_split(f"{server.url}/eval")


@pytest.mark.parametrize("name", ["train/index.h5", "classes.csv"])
def test_a_changed_index_or_class_list_is_one_clear_error(
    many_shards: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = Path(shutil.copytree(many_shards, tmp_path / "shards"))
    (folder / name).write_bytes((folder / name).read_bytes() + b"x")
    with serve(folder) as server, pytest.raises(ShardError, match=rf"{name}: the file differs from its sum"):
        open_shards(f"{server.url}/train")
    assert os.listdir(tmp_path) == ["shards"]


def test_a_cached_epoch_makes_no_request_and_leftovers_of_a_kill_are_harmless(
    many_shards: Path, server: FolderServer, tmp_path: Path
):
    config = replace(CONFIG, cache=str(tmp_path))
    with open_shards(f"{server.url}/train", config.cache) as shards:
        for name in ("00000.tar", "00001.tar"):
            (shards.folder / f"{name}.tmp").write_bytes(b"half of a shard" * 100_000)
        check_epoch(many_shards, shards, 0, config)
        assert len(server.tars()) == len({path for path, _ in server.tars()})
        check_epoch(many_shards, shards, 1, config)
        num_requests = len(server.requests)
        check_epoch(many_shards, shards, 1, config)
        assert len(server.requests) == num_requests
    with open_shards(f"{server.url}/train", config.cache) as shards:
        check_epoch(many_shards, shards, 0, config)
    assert len(server.requests) == num_requests + 1  # SHA256SUMS
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_file_of_the_cache_is_noticed_and_fetched_again(
    many_shards: Path, server: FolderServer, tmp_path: Path, damage: str
):
    config = replace(CONFIG, cache=str(tmp_path))
    with open_shards(f"{server.url}/train", config.cache) as shards:
        check_epoch(many_shards, shards, 0, config)
        for tar in shards.folder.glob("*.tar"):
            content = bytearray(tar.read_bytes())
            for offset in shards.index.offset[shards.index.shard == int(tar.stem)]:
                content[offset] ^= 1
            tar.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
            if damage == "gone":
                tar.unlink()
        check_epoch(many_shards, shards, 0, config)
        assert shards.fbank(0).shape[1] == 128
    index = next(tmp_path.rglob("index.h5"))
    index.write_bytes(index.read_bytes()[:-1])
    with open_shards(f"{server.url}/train", config.cache) as shards:
        check_epoch(many_shards, shards, 0, config)


CHILD = """
import sys
from pathlib import Path
from psla_fast.shards import open_shards
from tests.faults.test_remote_faults import CONFIG, check_epoch, replace
many_shards, url, cache = sys.argv[1:]
with open_shards(url, cache) as shards:
    for epoch in (0, 1):
        check_epoch(Path(many_shards), shards, epoch, replace(CONFIG, cache=cache))
"""


def test_two_processes_share_a_cache_and_fetch_each_shard_once(
    many_shards: Path, server: FolderServer, tmp_path: Path
):
    command = [sys.executable, "-c", CHILD, many_shards, f"{server.url}/train", tmp_path]
    children = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) for _ in range(2)]
    for child in children:
        _, said = child.communicate(timeout=120)
        assert child.returncode == 0, said.decode()
    paths = [path for path, _ in server.tars()]
    assert len(paths) == len(set(paths)) > 8
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_cache_that_cannot_be_written_is_one_clear_error(many_shards: Path, server: FolderServer):
    with pytest.raises((ShardError, OSError), match="/proc"):
        open_shards(f"{server.url}/train", "/proc/nosuch")
