import contextlib
import os
import shutil
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
from psla_fast.shards import ShardError, Shards, open_shards
from psla_fast.sources import read_fsd50k
from psla_fast.stream import Batch, BatchPlan, DrawPlan, PlanConfig, SequentialPlan, StreamConfig
from psla_fast.stream.indexed import IndexedSource
from psla_fast.stream.slabs import SlabStream

pytest.importorskip("nvidia.dali")

from psla_fast.stream import dali
from psla_fast.stream.dali import DaliStream, write_indices

CPU = torch.device("cpu")
FRAMES = 120
BATCH = 8
CONFIG = StreamConfig(kind="dali")


def make_plan(shards: Shards, config: StreamConfig = CONFIG) -> DrawPlan:
    sampling = SamplingConfig()
    return DrawPlan(shards, PlanConfig(sampling, config, seed=0, global_batch=BATCH, clip_frames=FRAMES))


def compare(shards: Shards, plans: list[BatchPlan], batches: Iterator[Batch]) -> int:
    """Hold batches against indexed's, bit for bit; returns how many."""
    shapes = [plan.shape for plan in plans]
    indexed = SlabStream(shards, StreamConfig(), shapes, CPU, IndexedSource(shards, False))
    try:
        for number, (want, got) in enumerate(zip(indexed.batches(iter(plans)), batches, strict=True)):
            assert got.fbank.dtype == want.fbank.dtype
            for name in ("fbank", "num_frames", "targets", "partner_row", "lam"):
                assert torch.equal(getattr(got, name), getattr(want, name)), (number, name)
            assert np.array_equal(got.clip_ids, want.clip_ids)
            assert got.skipped == ()
    finally:
        indexed.close()
    return len(plans)


def read_all(shards: Shards, config: StreamConfig = CONFIG) -> list[Batch]:
    plan = make_plan(shards, config)
    stream = DaliStream(shards, config, plan.shapes, CPU)
    try:
        return list(stream.batches(plan.batches(0)))
    finally:
        stream.close()


@pytest.fixture(scope="module")
def packed_uint8(synthetic_fsd50k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "uint8"
    classes, splits = read_fsd50k(synthetic_fsd50k)
    pack_splits(classes, splits, out, PackConfig(dtype="uint8", shard_mb=0.05), WorkConfig(workers=1))
    return out


@pytest.fixture
def copied(packed: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(packed, tmp_path / "copy")
    return tmp_path / "copy" / "train"


@pytest.fixture(params=["slabs", "scattered"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches in slabs, or as on a GPU: in one tensor, into whose rows padded samples are scattered."""
    if request.param == "scattered":

        def take(stream: DaliStream) -> dali.DeviceMemory:
            return dali.DeviceMemory(stream._shards, stream._shapes, stream._most, CPU)

        monkeypatch.setattr(DaliStream, "_take_memory", take)


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("dtype", ["float16", "uint8"])
@pytest.mark.parametrize("buckets", [(), (50, 90, FRAMES)])
@pytest.mark.parametrize(("num_threads", "chunk_batches"), [(1, 1), (3, 2), (3, 100)])
def test_batches_are_those_of_indexed_bit_for_bit(
    packed: Path,
    packed_uint8: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    buckets: tuple[int, ...],
    num_threads: int,
    chunk_batches: int,
):
    with open_shards((packed if dtype == "float16" else packed_uint8) / "train") as shards:
        config = replace(CONFIG, buckets=buckets, num_threads=num_threads)
        plan = make_plan(shards, config)
        assert len(shards.index.shard_bytes) > num_threads
        assert (shards.index.num_frames > FRAMES).any()
        assert (shards.index.num_frames < FRAMES).any()
        stream = DaliStream(shards, config, plan.shapes, CPU)
        monkeypatch.setattr(stream, "_most", chunk_batches)
        for epoch, start in ((0, 0), (1, 0), (1, 3)):  # two epochs in a row, then a resume
            plans = list(plan.batches(epoch, start))
            assert any((each.partner_ids >= 0).any() for each in plans)
            assert compare(shards, plans, stream.batches(iter(plans))) == plan.num_steps(epoch) - start
        stream.close()


@pytest.mark.usefixtures("memory")
def test_a_pass_over_every_clip_zeroes_the_spare_rows_of_its_last_batches(packed: Path):
    with open_shards(packed / "val") as shards:
        plan = SequentialPlan(shards.index.num_frames, 5, (60, FRAMES))
        stream = DaliStream(shards, CONFIG, plan.shapes, CPU)
        for _ in range(2):
            plans = list(plan.batches())
            assert any(len(each.clip_ids) < 5 for each in plans)
            compare(shards, plans, stream.batches(iter(plans)))
        stream.close()


def test_a_stream_goes_on_after_an_epoch_that_was_broken_off(packed: Path):
    with open_shards(packed / "train") as shards:
        plan = make_plan(shards)
        stream = DaliStream(shards, CONFIG, plan.shapes, CPU)
        for num_read in (1, 2, 4):
            for number, _ in enumerate(stream.batches(plan.batches(0)), start=1):
                if number == num_read:
                    break
            plans = list(plan.batches(1))
            compare(shards, plans, stream.batches(iter(plans)))
        stream.close()


def test_chunks_fit_in_the_buffer(packed: Path):
    with open_shards(packed / "train") as shards:
        plan = make_plan(shards)
        stream = DaliStream(shards, replace(CONFIG, dali_buffer_mb=1), plan.shapes, CPU)
        largest = max(shape.num_rows for shape in plan.shapes) * FRAMES * shards.frame_bytes
        assert stream._most == max(1, 10**6 // largest)
        stream.close()


def test_index_files_list_each_readers_share_by_shard_and_offset(packed: Path, tmp_path: Path):
    with open_shards(packed / "train") as shards:
        index = shards.index
        clip_ids = np.random.default_rng(0).integers(0, len(shards), size=50)
        parts = write_indices(str(tmp_path), index, clip_ids, np.arange(50) + 512, num_readers=3)
        assert sorted(np.concatenate([part.samples for part in parts]).tolist()) == list(range(50))
        assert {len(part.samples) for part in parts} == {16, 17}
        for part in parts:
            lines = []
            for shard, path in zip(part.shards, part.index_paths, strict=True):
                head, *rest = Path(path).read_text().splitlines()
                assert head == f"v1.2 {len(rest)}"
                lines += [(shard, line) for line in rest]
            wanted = [
                (int(index.shard[clip]), f"fbank {index.offset[clip] - 512} {sample + 512} clip")
                for sample, clip in zip(part.samples.tolist(), clip_ids[part.samples].tolist(), strict=True)
            ]
            assert lines == wanted
            assert len(set(part.shards)) == len(part.shards)


def test_a_shard_cut_short_is_an_error_that_names_it(copied: Path):
    with open_shards(copied) as shards:
        os.truncate(copied / "00001.tar", 1024)
        with pytest.raises(ShardError, match=r"00001\.tar has 1024 bytes, its index says"):
            read_all(shards)


def test_a_shard_cut_while_it_is_read_is_one_line_and_the_process_survives(
    copied: Path, monkeypatch: pytest.MonkeyPatch
):
    with open_shards(copied) as shards:
        monkeypatch.setattr(dali, "check_files", lambda shards, clip_ids: None)
        for size in (int(shards.index.offset[shards.index.shard == 1].max()) + 100, 512, 0):
            os.truncate(copied / "00001.tar", size)
            with pytest.raises(ShardError, match=r"can't be read by DALI: .*") as raised:
                read_all(shards)
            assert "\n" not in str(raised.value)
            assert str(copied) in str(raised.value)


def test_a_shard_cut_between_epochs_is_found(copied: Path):
    with open_shards(copied) as shards:
        plan = make_plan(shards)
        stream = DaliStream(shards, CONFIG, plan.shapes, CPU)
        assert len(list(stream.batches(plan.batches(0)))) == plan.num_steps(0)
        os.truncate(copied / "00001.tar", 1024)
        with pytest.raises(ShardError, match=r"00001\.tar has 1024 bytes"):
            list(stream.batches(plan.batches(1)))
        stream.close()


def test_a_deleted_shard_is_an_error_that_names_it(copied: Path):
    with open_shards(copied) as shards:
        (copied / "00002.tar").unlink()
        with pytest.raises(ShardError, match=r"00002\.tar: No such file or directory"):
            read_all(shards)


@pytest.mark.usefixtures("memory")
def test_another_tar_of_the_same_size_is_an_error_that_names_the_key(copied: Path):
    with open_shards(copied) as shards:
        tar = copied / "00001.tar"
        stored = bytearray(tar.read_bytes())
        for clip_id in np.flatnonzero(shards.index.shard == 1):
            at = int(shards.index.offset[clip_id]) - 512
            stored[at : at + 3] = b"ZZZ"
        tar.write_bytes(stored)
        with pytest.raises(ShardError, match=r"00001\.tar, key .*the tar has 'ZZZ"):
            read_all(shards)


@pytest.mark.parametrize("fault", ["none", "cut", "another tar"])
def test_nothing_is_left_behind_by_a_closed_stream(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
):
    monkeypatch.setattr(dali, "INDEX_FOLDER", str(tmp_path))
    with open_shards(copied) as shards:
        read_all(shards)  # what DALI keeps for good
        files, tasks = leavings(until=0)
        errors = []  # their tracebacks mustn't keep anything
        for stop_after in (1, 3, 100):
            if fault == "cut" and stop_after == 3:
                monkeypatch.setattr(dali, "check_files", lambda shards, clip_ids: None)
                os.truncate(copied / "00001.tar", 512)
            if fault == "another tar" and stop_after == 3:
                (copied / "00001.tar").write_bytes(bytes((copied / "00001.tar").stat().st_size))
            plan = make_plan(shards)
            stream = DaliStream(shards, CONFIG, plan.shapes, CPU)
            try:
                for number, _ in enumerate(stream.batches(plan.batches(0)), start=1):
                    if number == stop_after:
                        break
            except ShardError as error:
                errors.append(error)
            stream.close()
            assert leavings(until=tasks) == (files, tasks)
            assert not list(tmp_path.glob("psla_fast_dali_*"))
        assert bool(errors) == (fault != "none")


def leavings(until: int) -> tuple[list[str], int]:
    """The tars this process has open, and its threads, DALI's too; those that end have a second to do so."""
    for _ in range(20):
        tasks = len(os.listdir("/proc/self/task"))
        if tasks <= until:
            break
        time.sleep(0.05)
    links = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    return sorted(link for link in links if link.endswith(".tar")), tasks


def test_closing_in_the_middle_of_a_chunk_takes_less_than_two_seconds(
    packed: Path, monkeypatch: pytest.MonkeyPatch
):
    store = dali.HostMemory.store

    def slow(self: dali.HostMemory, *rest: object) -> None:
        time.sleep(0.2)
        store(self, *rest)

    with open_shards(packed / "train") as shards:
        plan = make_plan(shards)
        stream = DaliStream(shards, CONFIG, plan.shapes, CPU)
        batches = stream.batches(plan.batches(0))
        next(batches)
        next(batches)
        monkeypatch.setattr(dali.HostMemory, "store", slow)
        next(batches)
        start = time.monotonic()
        stream.close()
        assert time.monotonic() - start < 2
        with pytest.raises(InterruptedError):  # rather than batches that were read in part
            list(batches)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("psla-stream")]


def test_without_dali_the_error_says_what_to_install(packed: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali.fn", None)
    with open_shards(packed / "train") as shards:
        plan = make_plan(shards)
        with pytest.raises(ValueError, match=r"needs the extra dali: pip install 'psla-fast\[dali\]'\."):
            DaliStream(shards, CONFIG, plan.shapes, CPU)
