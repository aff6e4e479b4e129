"""Blocks of local and remote shards: exactly the clips of the plans, whatever serves them."""

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from psla_fast.pack import PackConfig, WorkConfig, pack_splits
from psla_fast.sampling import SamplingConfig
from psla_fast.shards import ShardError, Shards, exists_split, join, open_shards
from psla_fast.sources import read_fsd50k
from psla_fast.stream import Batch, BatchPlan, BatchShape, DrawPlan, PlanConfig, SequentialPlan, StreamConfig
from psla_fast.stream.slabs import SlabStream
from psla_fast.stream.webdataset import BLOCK_BYTES, BlockSource, make_schedule
from tests.servers import serve

FRAMES, BATCH = 120, 8
CONFIG = StreamConfig(kind="webdataset", lanes=2, shuffle_clips=20)
S3_KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def many_shards(synthetic_fsd50k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic FSD50K in shards of a few clips. Read only."""
    out = tmp_path_factory.mktemp("many") / "shards"
    pack_splits(*read_fsd50k(synthetic_fsd50k), out, PackConfig(shard_mb=0.2), WorkConfig(workers=1))
    return out


@pytest.fixture(params=["folder", "http", "http without ranges", "http, cached", "file://", "s3"])
def location(request: pytest.FixtureRequest, many_shards: Path, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Each place that shards may lie at, and the cache to be used with it."""
    kind = request.param
    if kind == "s3":
        yield request.getfixturevalue("bucket"), ""
    elif kind.startswith("http"):
        with serve(many_shards, ranges=kind != "http without ranges") as server:
            yield server.url, str(tmp_path / "cache") if kind == "http, cached" else ""
    else:
        yield str(many_shards) if kind == "folder" else many_shards.as_uri(), ""


@pytest.fixture(scope="module")
def bucket(many_shards: Path) -> Iterator[str]:
    """The shards in an S3 bucket on loopback."""
    pytest.importorskip("s3fs", reason="needs the extra remote")
    moto = pytest.importorskip("moto.server", reason="needs moto[server]")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**S3_KEYS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(name, value)
        import s3fs

        s3 = s3fs.S3FileSystem(skip_instance_cache=True)
        s3.mkdir("bucket")
        s3.put(str(many_shards), "bucket/shards", recursive=True)
        yield "s3://bucket/shards"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def plan_of(shards: Shards, config: StreamConfig = CONFIG, **sampling: object) -> DrawPlan:
    return DrawPlan(shards, PlanConfig(SamplingConfig(**sampling), config, 0, BATCH, FRAMES))


def stream_of(
    shards: Shards, shapes: list[BatchShape], config: StreamConfig = CONFIG
) -> tuple[SlabStream, BlockSource]:
    source = BlockSource(shards, config)
    return SlabStream(shards, config, shapes, torch.device("cpu"), source), source


def copy_of(batch: Batch) -> Batch:
    tensors = ("fbank", "num_frames", "targets", "partner_row", "lam")
    return replace(batch, **{name: getattr(batch, name).clone() for name in tensors})


def read_epoch(shards: Shards, epoch: int, config: StreamConfig = CONFIG, start: int = 0) -> list[Batch]:
    plan = plan_of(shards, config)
    stream, _ = stream_of(shards, plan.shapes, config)
    try:
        return [copy_of(batch) for batch in stream.batches(plan.batches(epoch, start))]
    finally:
        stream.close()


def check_batch(truth: Shards, batch: Batch, plan: BatchPlan) -> None:
    """A batch's rows hold exactly the clips and partners of its plan."""
    assert batch.clip_ids.tolist() == plan.clip_ids.tolist()
    assert not batch.skipped
    for row, clip_id in enumerate(plan.row_ids.tolist()):
        expected = truth.fbank(clip_id)[: plan.shape.num_frames]
        assert int(batch.num_frames[row]) == len(expected)
        assert np.array_equal(batch.fbank[row, : len(expected)].float().numpy(), expected)
        assert not batch.fbank[row, len(expected) :].any()
        assert np.flatnonzero(batch.targets[row]).tolist() == truth.labels(clip_id).tolist()
    mixed = np.flatnonzero(plan.partner_ids >= 0)
    assert batch.partner_row[mixed].tolist() == list(range(len(plan.clip_ids), len(plan.row_ids)))


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("psla-stream")]


def test_an_epoch_holds_each_clip_and_partner_exactly_as_often_as_the_draws_name_it(
    location: tuple[str, str], many_shards: Path
):
    url, cache = location
    config = replace(CONFIG, cache=cache)
    with open_shards(many_shards / "train") as truth, open_shards(join(url, "train"), cache) as shards:
        assert shards.location == join(url, "train")
        assert shards.remote == ("://" in url)
        assert len(shards.index.shard_bytes) > 8
        plan = plan_of(shards)
        stream, source = stream_of(shards, plan.shapes, config)
        try:
            for epoch in (0, 1):
                steps = 0
                for batch, wanted in zip(
                    stream.batches(plan.batches(epoch)), plan.batches(epoch), strict=True
                ):
                    check_batch(truth, batch, wanted)
                    steps += 1
                assert steps == plan.num_steps(epoch)
                assert source.held_bytes == 0
                assert source.peak_bytes > 0
        finally:
            stream.close()


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_holds_every_clip_once(location: tuple[str, str], many_shards: Path, world_size: int):
    url, cache = location
    seen: list[int] = []
    with open_shards(many_shards / "eval") as truth, open_shards(join(url, "eval"), cache) as shards:
        for rank in range(world_size):
            plan = SequentialPlan(shards.index.num_frames, 5, (60, FRAMES), rank, world_size)
            stream, _ = stream_of(shards, plan.shapes)
            for batch, wanted in zip(stream.batches(plan.batches()), plan.batches(), strict=True):
                check_batch(truth, batch, wanted)
                seen += batch.clip_ids.tolist()
            stream.close()
        assert sorted(seen) == list(range(len(truth)))


def test_single_clips_and_their_origins_are_read_from_anywhere(location: tuple[str, str], many_shards: Path):
    url, cache = location
    with open_shards(many_shards / "val") as truth, open_shards(join(url, "val"), cache) as shards:
        for clip_id in (0, len(truth) - 1):
            assert np.array_equal(shards.fbank(clip_id), truth.fbank(clip_id))
            assert shards.read_origin(clip_id) == truth.read_origin(clip_id)
        if shards.remote:
            with pytest.raises(ShardError, match=r"is remote: use --stream\.kind webdataset"):
                shards.read_into(0, memoryview(bytearray(4)), False)


def test_whether_a_split_is_there_can_be_asked_anywhere(location: tuple[str, str]):
    url, _ = location
    assert exists_split(join(url, "eval"))
    assert not exists_split(join(url, "evil"))


def test_the_same_seed_gives_the_same_batches_and_another_epoch_another_order(many_shards: Path):
    with open_shards(many_shards / "train") as shards:
        first, again, other = (read_epoch(shards, epoch) for epoch in (1, 1, 2))
        for one, two in zip(first, again, strict=True):
            assert torch.equal(one.fbank, two.fbank)
            assert torch.equal(one.targets, two.targets)
            assert torch.equal(one.lam, two.lam)
        assert [list(b.clip_ids) for b in first] != [list(b.clip_ids) for b in other]


def test_a_resume_at_any_step_goes_on_exactly(many_shards: Path):
    with open_shards(many_shards / "train") as shards:
        whole = read_epoch(shards, 3)
        for start in range(len(whole)):
            rest = read_epoch(shards, 3, start=start)
            for one, two in zip(whole[start:], rest, strict=True):
                assert torch.equal(one.fbank, two.fbank)


def test_a_split_is_opened_with_few_requests_and_every_byte_asked_for_once(many_shards: Path):
    with serve(many_shards) as server, open_shards(f"{server.url}/train") as shards:
        assert len(server.requests) <= 4
        plan = plan_of(shards, kind="shuffle", mixup_rate=0.0)
        stream, _ = stream_of(shards, plan.shapes)
        list(stream.batches(plan.batches(0)))
        stream.close()
    asked = sorted(
        (path, *(int(place) for place in ranged.removeprefix("bytes=").split("-")))
        for path, ranged in server.tars()
    )
    for (path, _, end), (next_path, start, _) in pairwise(asked):
        assert path != next_path or start > end


def test_an_abandoned_epoch_leaves_nothing_behind_and_the_next_one_is_exact(many_shards: Path):
    with serve(many_shards) as server, open_shards(f"{server.url}/train") as shards:
        plan = plan_of(shards)
        stream, source = stream_of(shards, plan.shapes)
        for _ in stream.batches(plan.batches(0)):
            break
        with open_shards(many_shards / "train") as truth:
            for batch, wanted in zip(stream.batches(plan.batches(1, 2)), plan.batches(1, 2), strict=True):
                check_batch(truth, batch, wanted)
        assert source.held_bytes == 0
        stream.close()
        assert not own_threads()


def test_closing_leaves_no_thread_file_or_folder(location: tuple[str, str], tmp_path: Path, monkeypatch):
    url, cache = location
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    if url.startswith("s3"):
        assert exists_split(join(url, "train"))  # the library keeps a connection of its own
    files = len(os.listdir("/proc/self/fd"))
    with open_shards(join(url, "train"), cache) as shards:
        assert shards.remote == (bool(os.listdir(tmp_path / "tmp")) or bool(cache))
        plan = plan_of(shards)
        stream, _ = stream_of(shards, plan.shapes, replace(CONFIG, cache=cache))
        batches = stream.batches(plan.batches(0))
        next(batches)
        began = time.monotonic()
        stream.close()
        assert time.monotonic() - began < 2
        batches.close()
    assert not own_threads()
    assert not os.listdir(tmp_path / "tmp")
    until = time.monotonic() + 2
    while len(os.listdir("/proc/self/fd")) > files and time.monotonic() < until:
        time.sleep(0.01)  # the server's side of the connections is in this process, too
    if not url.startswith("s3"):
        assert len(os.listdir("/proc/self/fd")) <= files


def draw_rows(shards: Shards, config: StreamConfig) -> list[npt.NDArray[np.int64]]:
    return [plan.row_ids for plan in plan_of(shards, config).batches(0)]


@pytest.mark.parametrize("hold_rows", [1, 7, 1000])
def test_a_schedule_reads_each_visit_once_before_its_use_and_holds_none_too_long(
    many_shards: Path, hold_rows: int
):
    with open_shards(many_shards / "train") as shards:
        rows = draw_rows(shards, CONFIG)
        plan = make_schedule(shards.index, shards.frame_bytes, rows, hold_rows)
        assert Counter(np.repeat(plan.clip, plan.uses).tolist()) == Counter(np.concatenate(rows).tolist())
        assert sorted(plan.visits.tolist()) == list(range(len(plan.clip)))
        assert (np.diff(plan.first_step) >= 0).all()
        left, row = plan.uses.copy(), 0
        latest: dict[int, int] = {}  # row of a block's first use, or of a visit's last one
        for step, ids in enumerate(rows):
            for clip_id in ids.tolist():
                visit = next(v for v in np.flatnonzero(plan.clip == clip_id) if left[v])
                block = -1 - plan.block[visit]
                assert plan.first_step[plan.block[visit]] <= step
                assert row - latest.get(visit, latest.setdefault(block, row)) <= hold_rows
                latest[visit], left[visit], row = row, left[visit] - 1, row + 1
        for block, (first, end) in enumerate(zip(plan.starts[:-1], plan.starts[1:], strict=True)):
            clips = plan.clip[plan.visits[first:end]]
            assert (plan.block[plan.visits[first:end]] == block).all()
            assert len(set(shards.index.shard[clips].tolist())) == 1
            assert (np.diff(shards.index.offset[clips]) > 0).all()
            assert np.ptp(shards.index.offset[clips]) <= BLOCK_BYTES


def test_a_replacement_that_no_plan_named_is_read_by_itself(many_shards: Path):
    with serve(many_shards) as server, open_shards(f"{server.url}/train") as shards:
        source = BlockSource(shards, CONFIG)
        plans = source.follow(iter([BatchPlan(*one_row(3), BatchShape(1, FRAMES, partners=False))]))
        next(plans)
        for clip_id in (5, 3, 3):
            target = bytearray(int(shards.index.num_frames[clip_id]) * shards.frame_bytes)
            source.read_into(clip_id, memoryview(target))
            stored = np.frombuffer(target, dtype=shards.storage.numpy)
            assert np.array_equal(shards.storage.decode(stored), shards.fbank(clip_id).reshape(-1))
        source.close()


def one_row(clip_id: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    return np.array([clip_id]), np.array([-1]), np.ones(1, dtype=np.float32)


def test_a_damaged_local_clip_is_one_clear_error_or_skipped(many_shards: Path, tmp_path: Path):
    import shutil

    folder = Path(shutil.copytree(many_shards, tmp_path / "shards")) / "train"
    with open_shards(folder) as shards:
        clip_id = int(plan_of(shards).draws(0).clip_ids[10])
        key, offset = shards.keys[clip_id], int(shards.index.offset[clip_id])
        tar = shards.shard_path(int(shards.index.shard[clip_id]))
    raw = bytearray(tar.read_bytes())
    raw[offset + 40] ^= 255
    tar.write_bytes(raw)
    with open_shards(folder) as shards:
        with pytest.raises(ShardError, match=f"{tar}, key {key}, offset {offset}: crc32 differs"):
            read_epoch(shards, 0, replace(CONFIG, check_crc=True))
        batches = read_epoch(shards, 0, replace(CONFIG, check_crc=True, on_error="skip"))
        skipped = [text for batch in batches for text in batch.skipped]
        assert len(skipped) >= 1
        assert all(key in text for text in skipped)
        assert all(clip_id not in batch.clip_ids for batch in batches)


def test_addresses_are_joined_with_their_queries_kept():
    assert join("http://host/set/train?token=1", "00000.tar") == "http://host/set/train/00000.tar?token=1"
    assert join("http://host/set/train/", "../classes.csv") == "http://host/set/classes.csv"
    assert join("s3://bucket/set/train", "../classes.csv") == "s3://bucket/set/classes.csv"
    assert join("/data/set", "train") == "/data/set/train"


def test_a_kind_of_storage_without_its_library_names_the_extra():
    with pytest.raises(ValueError, match=r"psla-fast\[remote\]"):
        open_shards("nosuchkind://bucket/train")
