"""Streams of damaged, replaced or slow shards: the right clips or one clear error; nothing is left behind."""

import errno
import gc
import os
import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from psla_fast.sampling import SamplingConfig
from psla_fast.shards import ShardError, open_shards
from psla_fast.shards.sums import write_sums
from psla_fast.stream import Batch, SequentialPlan, StreamConfig, resident
from psla_fast.stream.batch import Kind
from tests.stream_worker import (
    list_children,
    list_open_files,
    make_plan,
    numbered_fbanks,
    open_on_cpu,
    random_fbanks,
    read_batches,
    samples,
    start_worker,
    write_split,
)

FRAMES = 40
LENGTHS = [25 + clip % 16 for clip in range(30)]
INDEXED = StreamConfig(num_threads=2)
SKIPPING = StreamConfig(num_threads=2, on_error="skip", check_crc=True)
KINDS = {
    "indexed": INDEXED,
    "resident": StreamConfig(kind="resident", place="host", num_threads=2),
    "resident-device": StreamConfig(kind="resident", place="device", num_threads=2),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
lacks_dali = pytest.mark.skipif(find_spec("nvidia.dali") is None, reason="DALI is not installed")


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """30 clips that hold their numbers, in 6 shards; one's own, to be damaged."""
    return write_split(tmp_path / "shards" / "train", numbered_fbanks(LENGTHS, "float16"), 5)


def read_epoch(path: Path, stream: StreamConfig) -> list[Batch]:
    with open_shards(path) as shards:
        return list(read_batches(shards, make_plan(shards, stream, FRAMES), stream))


def flip_byte(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 255]))


def damage_by_cutting(path: Path) -> None:
    os.truncate(path / "00002.tar", 3000)


def damage_by_a_flipped_byte(path: Path) -> None:
    with open_shards(path) as shards:
        for offset in shards.index.offset[shards.index.shard == 2]:
            flip_byte(path / "00002.tar", int(offset) + 100)


def damage_by_deleting(path: Path) -> None:
    (path / "00002.tar").unlink()


def put_index_of_another_pack(path: Path) -> None:
    """An index whose shard 2 is packed in another order, of the same sizes: none of its sums is wrong."""
    order = [*range(10), 14, 13, 11, 10, 12, *range(15, 30)]
    fbanks = numbered_fbanks([FRAMES] * 30, "float16")
    shutil.rmtree(path)
    write_split(path, fbanks, 5)
    other = write_split(path.parent.parent / "other" / "train", fbanks, 5, order=order)
    shutil.copy(other / "index.h5", path)
    write_sums(path, 6, {})


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (damage_by_cutting, "has 3000 bytes, its index says"),
    "flipped": (damage_by_a_flipped_byte, "crc32 differs"),
    "deleted": (damage_by_deleting, "No such file or directory"),
    "stale": (put_index_of_another_pack, "the tar has 'clip00.*fbank' there, it isn't the one"),
}


def check_names_clip(error: ShardError, path: Path, shard: int, text: str) -> None:
    """An error tells what is wrong, in one line, with shard, key and offset of one clip."""
    found = re.search(rf"{path}/(\d+)\.tar.*key (\w+), offset (\d+)", str(error))
    assert found, error
    assert re.search(text, str(error)), error
    with open_shards(path) as shards:
        clip_id = shards.keys.index(found[2])
        assert int(found[1]) == shards.index.shard[clip_id] == shard
        assert int(found[3]) == shards.index.offset[clip_id]
    assert "\n" not in str(error)


@every_kind
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_an_error_that_names_shard_key_and_offset(split: Path, kind: str, damage: str):
    make, text = DAMAGES[damage]
    make(split)
    stream = replace(KINDS[kind], check_crc=damage == "flipped")
    started = time.monotonic()
    with pytest.raises(ShardError) as caught:
        read_epoch(split, stream)
    assert time.monotonic() - started < 2
    check_names_clip(caught.value, split, 2, text)


@every_kind
def test_an_error_of_the_disk_names_shard_key_and_offset(
    split: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    bare, broken = os.preadv, os.stat(split / "00003.tar").st_ino

    def preadv(file: int, *rest: object) -> int:
        if os.fstat(file).st_ino == broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return bare(file, *rest)

    monkeypatch.setattr("psla_fast.shards.reader.os.preadv", preadv)
    with pytest.raises(ShardError) as caught:
        read_epoch(split, KINDS[kind])
    check_names_clip(caught.value, split, 3, r"Input/output error\. Check the disk")


def test_a_shard_cut_while_it_is_read_is_an_error(split: Path):
    with open_shards(split) as shards:
        plan = make_plan(shards, INDEXED, FRAMES)
        list(read_batches(shards, plan, INDEXED))
        os.truncate(split / "00002.tar", 3000)
        with pytest.raises(ShardError) as caught:
            list(read_batches(shards, plan, INDEXED))
    os.truncate(split / "00002.tar", 1)
    check_names_clip(caught.value, split, 2, r"read \d+ of \d+ bytes\. The shard was cut")


def test_a_read_that_the_kernel_cuts_short_goes_on(split: Path, monkeypatch: pytest.MonkeyPatch):
    wanted = [samples(batch) for batch in read_epoch(split, INDEXED)]
    bare = os.preadv

    def preadv(file: int, buffers: list[memoryview], offset: int) -> int:
        if len(buffers) == 2:
            return bare(file, [buffers[0], memoryview(buffers[1])[:101]], offset)
        return bare(file, [buffers[0][:77]], offset)

    monkeypatch.setattr("psla_fast.shards.reader.os.preadv", preadv)
    assert [samples(batch) for batch in read_epoch(split, INDEXED)] == wanted


def test_a_tar_replaced_while_it_is_read_is_still_read_whole_and_refused_when_opened_anew(split: Path):
    fbanks = numbered_fbanks([FRAMES] * 30, "float16")
    shutil.rmtree(split)
    write_split(split, fbanks, 5)
    other = write_split(split.parent.parent / "other" / "train", fbanks, 5, order=range(29, -1, -1))
    with open_shards(split) as shards:
        plan = make_plan(shards, INDEXED, FRAMES, sampling=SamplingConfig(kind="shuffle", num_draws=32))
        before = [samples(batch) for batch in read_batches(shards, plan, INDEXED)]
        os.replace(other / "00002.tar", split / "00002.tar")
        assert [samples(batch) for batch in read_batches(shards, plan, INDEXED)] == before
    with pytest.raises(ShardError) as caught:
        read_epoch(split, INDEXED)
    check_names_clip(caught.value, split, 2, "it isn't the one that was indexed")


def test_a_tar_rewritten_in_place_while_it_is_read_is_an_error(split: Path):
    fbanks = numbered_fbanks([FRAMES] * 30, "float16")
    shutil.rmtree(split)
    write_split(split, fbanks, 5)
    other = write_split(split.parent.parent / "other" / "train", fbanks, 5, order=range(29, -1, -1))
    with open_shards(split) as shards:
        plan = make_plan(shards, INDEXED, FRAMES, sampling=SamplingConfig(num_draws=4000))
        opened = open_on_cpu(shards, INDEXED, plan.shapes)
        try:
            batches = opened.batches(plan.batches(1))
            next(batches)
            with open(split / "00002.tar", "r+b") as file:
                file.write((other / "00002.tar").read_bytes())
            with pytest.raises(ShardError) as caught:
                for _ in batches:
                    pass
        finally:
            opened.close()
    check_names_clip(caught.value, split, 2, "it isn't the one that was indexed")


def test_a_slow_disk_changes_no_batch(split: Path, monkeypatch: pytest.MonkeyPatch):
    wanted = [samples(batch) for batch in read_epoch(split, INDEXED)]
    rng, bare, order = np.random.default_rng(0), os.preadv, []

    def preadv(file: int, buffers: list[memoryview], offset: int) -> int:
        time.sleep(float(rng.choice([0, 0.005, 0.02])))
        num_read = bare(file, buffers, offset)
        order.append(bytes(buffers[0][:8]))
        return num_read

    monkeypatch.setattr("psla_fast.shards.reader.os.preadv", preadv)
    found = [samples(batch) for batch in read_epoch(split, replace(INDEXED, num_threads=8))]
    assert found == wanted
    in_order = [f"clip{s.clip_id:04d}".encode() for batch in wanted for s in batch]
    assert [key for key in order if key in in_order] != in_order  # they did arrive in another one


@every_kind
def test_an_error_on_a_slow_disk_does_not_wait_for_the_other_reads(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    split = write_split(tmp_path / "train", numbered_fbanks([FRAMES] * 300, "float16"), 100)
    bare = os.preadv

    def preadv(*arguments: object) -> int:
        time.sleep(0.05)  # 300 reads by 2 threads: 7.5 s
        return bare(*arguments)  # type: ignore[arg-type]

    with open_shards(split) as shards:
        sampling = SamplingConfig(kind="shuffle", mixup_rate=0)
        plan = make_plan(shards, KINDS[kind], FRAMES, 100, sampling)
        first = 0 if kind != "indexed" else int(plan.draws(1).clip_ids[0])
        flip_byte(shards.shard_path(int(shards.index.shard[first])), int(shards.index.offset[first]))
        monkeypatch.setattr("psla_fast.shards.reader.os.preadv", preadv)
        started = time.monotonic()
        with pytest.raises(ShardError, match=f"{shards.keys[first]}.*crc32 differs"):
            list(read_batches(shards, plan, replace(KINDS[kind], check_crc=True)))
        assert time.monotonic() - started < 1.5


def damaged_clips(path: Path) -> set[int]:
    """Delete shard 1, flip a byte in a clip of shard 4; give the clips that can't be read."""
    with open_shards(path) as shards:
        (path / "00001.tar").unlink()
        flip_byte(path / "00004.tar", int(shards.index.offset[21]) + 9)
        return {*np.flatnonzero(shards.index.shard == 1).tolist(), 21}


def held(batch: Batch) -> list[int]:
    """The clips that a batch of numbered clips holds, by what lies in its rows: clips, then partners."""
    return [int(value) - 1 for value in batch.fbank[:, 0, 0] if value]


@pytest.mark.parametrize("announces", [False, True])
def test_skipped_clips_are_counted_and_another_draw_stands_in_for_each(
    split: Path, announces: bool, monkeypatch: pytest.MonkeyPatch
):
    if announces:  # as for a split larger than memory
        monkeypatch.setattr("psla_fast.stream.indexed.available_memory", lambda: 0)
    bad = damaged_clips(split)
    with open_shards(split) as shards:
        plan = make_plan(shards, SKIPPING, FRAMES, 8, SamplingConfig(num_draws=160))
        drawn = set(plan.draws(1).clip_ids.tolist())
        stand_ins = []
        batches = list(read_batches(shards, plan, SKIPPING))
        for batch, step in zip(batches, plan.batches(1), strict=True):
            asked, rows = step.row_ids.tolist(), held(batch)
            assert len(batch.skipped) == sum(clip in bad for clip in asked)
            keys = {shards.keys[clip] for clip in asked if clip in bad}
            assert {re.search(r"key (\w+)", text)[1] for text in batch.skipped} == keys  # type: ignore[index]
            assert len(rows) == len(asked)
            for row, (wanted, found) in enumerate(zip(asked, rows, strict=True)):
                assert found == wanted if wanted not in bad else found not in bad
                if wanted in bad:
                    stand_ins.append(found)
                    assert found in drawn or row >= 8
                assert list(np.flatnonzero(batch.targets[row])) == list(shards.labels(found))
                assert int(batch.num_frames[row]) == shards.index.num_frames[found]
                length = int(batch.num_frames[row])
                assert (batch.fbank[row, :length] == found + 1).all()
                assert not batch.fbank[row, length:].any()
            assert batch.clip_ids.tolist() == rows[:8]
            assert np.array_equal(batch.lam.numpy(), step.lam)
    assert len(stand_ins) > 10
    assert len(set(stand_ins)) > len(stand_ins) / 4  # not one clip for all


@pytest.mark.parametrize("kind", ["indexed", "webdataset"])
def test_a_resume_of_a_skipping_stream_by_any_number_of_ranks_continues_exactly(split: Path, kind: Kind):
    damaged_clips(split)
    stream = replace(SKIPPING, kind=kind, lanes=3, shuffle_clips=4)
    with open_shards(split) as shards:

        def read(start: int, world_size: int) -> list[tuple[list[object], Counter[str]]]:
            plans = [
                make_plan(shards, stream, FRAMES, rank=rank, world_size=world_size)
                for rank in range(world_size)
            ]
            ranks = [list(read_batches(shards, plan, stream, 2, start)) for plan in plans]
            return [
                ([s for batch in step for s in samples(batch)], Counter(t for b in step for t in b.skipped))
                for step in zip(*ranks, strict=True)
            ]

        whole = read(0, 1)
        assert sum(skipped.total() for _, skipped in whole) > 3
        for start in range(len(whole)):
            for world_size in (1, 2, 4, 8):
                assert read(start, world_size) == whole[start:]


def test_evaluation_never_skips(split: Path):
    damaged_clips(split)
    with open_shards(split) as shards:
        plan = SequentialPlan(shards.index.num_frames, 4, (FRAMES,))
        stream = open_on_cpu(shards, SKIPPING, plan.shapes)
        with pytest.raises(ShardError, match=r"00001\.tar: No such file"):
            list(stream.batches(plan.batches()))
        stream.close()


@pytest.mark.parametrize("announces", [False, True])
def test_a_skipping_stream_that_finds_nothing_to_read_ends_in_one_error(
    split: Path, announces: bool, monkeypatch: pytest.MonkeyPatch
):
    if announces:
        monkeypatch.setattr("psla_fast.stream.indexed.available_memory", lambda: 0)
    for tar in split.glob("*.tar"):
        tar.unlink()
    started = time.monotonic()
    with pytest.raises(ShardError, match=r"No such file.*16 other clips in its place can't be read either"):
        read_epoch(split, SKIPPING)
    assert time.monotonic() - started < 2


def test_a_split_that_does_not_fit_is_refused_before_it_is_read(split: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resident, "available_memory", lambda: 1000)
    monkeypatch.setattr("psla_fast.shards.reader.os.preadv", None)
    for kind in ("resident", "resident-device"):
        with pytest.raises(ValueError, match=r"takes 0\.00 GB .* has 0\.00 GB free\. Use --stream\.kind ind"):
            read_epoch(split, KINDS[kind])


def held_resources() -> tuple[Counter[str], set[int | None], set[int]]:
    """Open files, threads and children of this process."""
    gc.collect()
    threads = {thread.native_id for thread in threading.enumerate()}
    return Counter(list_open_files()), threads, list_children()


@pytest.mark.parametrize("kind", [*KINDS, "webdataset", pytest.param("dali", marks=lacks_dali)])
@pytest.mark.parametrize("ending", ["whole", "abandoned", "failed"])
def test_no_thread_file_or_process_is_left_after_a_stream_is_closed(split: Path, kind: str, ending: str):
    others = {name: StreamConfig(kind=name, num_threads=2) for name in ("webdataset", "dali")}
    stream = {**KINDS, **others}[kind]
    read_epoch(split, stream)  # what is imported or started once
    before = held_resources()
    if ending == "failed":
        damage_by_deleting(split)
    with open_shards(split) as shards:
        plan = make_plan(shards, stream, FRAMES)
        if ending == "failed":
            with pytest.raises(ShardError):
                list(read_batches(shards, plan, stream))
        else:
            opened = open_on_cpu(shards, stream, plan.shapes)
            batches: Iterator[Batch] = opened.batches(plan.batches(1))
            for _ in batches:
                assert held_resources() != before
                if ending == "abandoned":
                    break
            opened.close()
            del batches, opened
    assert held_resources() == before


def test_a_resident_stream_can_be_closed_while_its_threads_copy(split: Path, monkeypatch: pytest.MonkeyPatch):
    stream, copy = KINDS["resident"], np.copyto

    def copy_slowly(target: np.ndarray, source: np.ndarray) -> None:
        time.sleep(0.02)
        copy(target, source)

    monkeypatch.setattr("psla_fast.stream.resident.np.copyto", copy_slowly)
    before = held_resources()[1]
    with open_shards(split) as shards:
        plan = make_plan(shards, stream, FRAMES)
        opened = open_on_cpu(shards, stream, plan.shapes)
        batches = opened.batches(plan.batches(1))  # not ended, as where training raises
        next(batches)
        opened.close()
        assert held_resources()[1] == before
        del batches


def mebibytes(path: Path) -> Path:
    """A split of 12 MB, so that an epoch kept by mistake shows."""
    rng = np.random.default_rng(0)
    fbanks = [rng.uniform(-15, 8, (FRAMES, 128)).astype(np.float32) for _ in range(600)]
    return write_split(path / "large" / "train", fbanks, 100)


def test_memory_stays_flat_over_20_epochs(tmp_path: Path):
    split = mebibytes(tmp_path)
    workers = {kind: start_worker("measure_memory", split, kind) for kind in ("indexed", "resident")}
    for kind, worker in workers.items():
        output, errors = worker.communicate(timeout=100)
        assert worker.returncode == 0, errors
        used = np.array(output.split(), dtype=np.float64)[5:]
        assert len(used) == 20
        assert np.abs(used / used[0] - 1).max() < 0.02, (kind, used)


def test_ctrl_c_ends_a_stream_and_a_training_on_a_slow_disk_within_2_seconds(packed: Path, tmp_path: Path):
    split = write_split(tmp_path / "shards" / "train", random_fbanks([FRAMES] * 300), 100)
    flags = ["--data.shards", packed, "--run", tmp_path / "run", "--model.name", "tiny"]
    flags += ["--input.clip-frames", "100", "--optim.batch-size", "8", "--precision", "fp32"]
    workers = {
        "indexed": start_worker("stream_slowly", split, "indexed"),
        "resident": start_worker("stream_slowly", split, "resident"),
        "training": start_worker("train_slowly", *flags),
    }
    try:
        for worker in workers.values():
            assert worker.stdout
            while (line := worker.stdout.readline()) and line != "reading\n":
                pass
        for name, worker in workers.items():
            time.sleep(0.3)
            assert worker.poll() is None, worker.communicate()
            sent = time.monotonic()
            worker.send_signal(signal.SIGINT)
            _, errors = worker.communicate(timeout=60)
            seconds = time.monotonic() - sent
            if name == "training":
                assert worker.returncode == 130, errors
                assert errors.splitlines()[-1] == "psla_fast.train: interrupted"
            else:
                assert worker.returncode == -signal.SIGINT, errors
                assert errors.splitlines()[-1] == "KeyboardInterrupt"
            busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # others want the processors, too
            assert seconds < 2 * busy, (name, seconds)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.communicate()
