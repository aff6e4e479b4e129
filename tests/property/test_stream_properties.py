"""Streams: every draw once, whoever reads it; the same bytes from every executor; exact resumes; buckets."""

# D draws, G clips of a global batch, T frames

import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from psla_fast.sampling import SamplingConfig, compute_draws, compute_sample_weights
from psla_fast.shards import Shards, open_shards
from psla_fast.stream import Batch, BatchPlan, StreamConfig
from psla_fast.stream.order import arrange_by_shard, bucket_sizes, make_steps
from tests.stream_worker import (
    INDEXED,
    NUM_MELS,
    make_plan,
    numbered_fbanks,
    random_fbanks,
    read_batches,
    samples,
    write_split,
)

HOST = StreamConfig(kind="resident", place="host")
DEVICE = StreamConfig(kind="resident", place="device")
DALI = StreamConfig(kind="dali", dali_buffer_mb=1)
WEBDATASET = StreamConfig(kind="webdataset")
IN_ORDER = {"indexed": INDEXED, "resident": HOST, "resident-device": DEVICE, "dali": DALI}
KINDS = {**IN_ORDER, "webdataset": WEBDATASET}
BUCKETS = (10, 25, 40)
FRAMES = BUCKETS[-1]
LENGTHS = [1 + (7 * clip * clip) % 60 for clip in range(45)]  # some are longer than FRAMES

stream_options = st.fixed_dictionaries(
    {
        "num_threads": st.integers(1, 4),
        "read_ahead": st.integers(1, 5),
        "buckets": st.sampled_from([(), BUCKETS]),
        "bucket_by": st.sampled_from(["frames", "clips"]),
        "bucket_window": st.integers(1, 4),
        "lanes": st.integers(1, 6),
        "shuffle_clips": st.integers(1, 20),
    }
)
samplings = st.builds(
    SamplingConfig,
    kind=st.sampled_from(["balanced", "shuffle"]),
    num_draws=st.sampled_from([0, 0, 30, 71]),
    mixup_rate=st.sampled_from([0.0, 0.5, 1.0]),
)


def each(kinds: dict[str, StreamConfig]) -> pytest.MarkDecorator:
    """Parametrise over kinds; DALI's is left out where it isn't installed."""
    lacks_dali = pytest.mark.skipif(find_spec("nvidia.dali") is None, reason="DALI is not installed")
    marks = {"dali": [lacks_dali]}
    return pytest.mark.parametrize("kind", [pytest.param(kind, marks=marks.get(kind, [])) for kind in kinds])


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """45 random clips in 7 shards. Read only."""
    return write_split(tmp_path_factory.mktemp("stream") / "train", random_fbanks(LENGTHS), 7)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, int], Path]:
    """Splits of clips that hold their numbers, by dtype, number of clips, and clips of a shard."""

    @cache
    def write(dtype: str, num_clips: int, clips_a_shard: int) -> Path:
        folder = tmp_path_factory.mktemp("numbered") / "train"
        return write_split(folder, numbered_fbanks(LENGTHS[:num_clips], dtype), clips_a_shard, dtype)

    return write


def check_numbered(shards: Shards, batch: Batch) -> tuple[list[int], list[int]]:
    """Check every byte of a batch of numbered clips; give its clips, and their partners or -1."""
    found = batch.fbank[:, 0, 0].int() - 1
    length = batch.fbank.shape[1]
    inside = torch.arange(length) < batch.num_frames[:, None]
    wanted = torch.where(inside, found[:, None] + 1, 0)[:, :, None].expand(-1, -1, NUM_MELS)
    assert torch.equal(batch.fbank.int(), wanted.int())
    used = found >= 0
    rows = found[used].numpy()
    num_frames = np.minimum(shards.index.num_frames[rows], length)
    assert np.array_equal(batch.num_frames[used].numpy(), num_frames)
    assert not batch.num_frames[~used].any()
    assert not batch.targets[~used].any()
    assert [list(np.flatnonzero(t)) for t in batch.targets[used]] == [list(shards.labels(i)) for i in rows]
    clips = found[: len(batch.clip_ids)].tolist()
    assert clips == batch.clip_ids.tolist()
    partner_rows = batch.partner_row.tolist()
    return clips, [int(found[at]) if at != row else -1 for row, at in enumerate(partner_rows)]


@each(KINDS)
@settings(max_examples=25)
@given(data=st.data())
def test_every_draw_is_read_once_with_its_partner_and_lambda_by_any_ranks_and_threads(
    numbered: Callable[[str, int, int], Path], kind: str, data: st.DataObject
):
    dtype = data.draw(st.sampled_from(["float16", "uint8"]), "dtype")
    path = numbered(
        dtype, data.draw(st.sampled_from([12, 29]), "clips"), data.draw(st.sampled_from([1, 4, 40]))
    )
    world_size = data.draw(st.integers(1, 4), "ranks")
    global_batch = world_size * data.draw(st.integers(1, 12 // world_size), "batch")
    sampling = data.draw(samplings, "sampling")
    stream = replace(KINDS[kind], **data.draw(stream_options, "stream"))
    epoch, seed = data.draw(st.integers(1, 3), "epoch"), data.draw(st.integers(0, 9), "seed")
    with open_shards(path) as shards:
        plan = partial(make_plan, shards, stream, FRAMES, global_batch, sampling, seed=seed)
        ranks = [
            list(read_batches(shards, plan(rank=rank, world_size=world_size), stream, epoch))
            for rank in range(world_size)
        ]
        weights = compute_sample_weights(shards.index.indptr, shards.index.indices, len(shards.classes))
        draws = compute_draws(sampling, weights, seed, epoch)
        used = len(draws.clip_ids) // global_batch * global_batch
        seen = [
            (clip, partner, float(lam))
            for batches in ranks
            for batch in batches
            for clip, partner, lam in zip(*check_numbered(shards, batch), batch.lam, strict=True)
        ]
    wanted = [draws.clip_ids[:used], draws.partner_ids[:used], draws.lam[:used]]
    if kind == "webdataset":  # deals partners out anew, to clips that are mixed
        assert Counter((c, lam, p >= 0) for c, p, lam in seen) == Counter(
            zip(wanted[0].tolist(), wanted[2].tolist(), (wanted[1] >= 0).tolist(), strict=True)
        )
        assert Counter(p for _, p, _ in seen) == Counter(wanted[1].tolist())
    else:
        assert Counter(seen) == Counter(zip(*(column.tolist() for column in wanted), strict=True))
    shapes = [[tuple(batch.fbank.shape) for batch in batches] for batches in ranks]
    assert all(of_rank == shapes[0] for of_rank in shapes)


def read_tars(folder: Path) -> dict[str, np.ndarray]:
    """Every member's bytes by its name, by the standard library."""
    members = {}
    for tar in folder.glob("*.tar"):
        with tarfile.open(tar) as file:
            for member in file:
                content = file.extractfile(member)
                assert content is not None
                members[member.name] = np.frombuffer(bytearray(content.read()), dtype="u1")
    return members


def build_batch(members: dict[str, np.ndarray], shards: Shards, step: BatchPlan) -> Batch:
    """The batch a plan asks for, clip by clip from the tars' members."""
    size, length, stored = step.shape.batch_size, step.shape.num_frames, shards.storage.numpy
    fbank = np.zeros((2 * size, length, NUM_MELS), dtype=stored)
    num_frames = np.zeros(2 * size, dtype=np.int64)
    targets = np.zeros((2 * size, len(shards.classes)), dtype=np.float32)
    partner_row, spare = np.arange(size), size
    rows = list(enumerate(step.clip_ids))
    for row in np.flatnonzero(step.partner_ids >= 0):
        partner_row[row] = spare
        rows.append((spare, step.partner_ids[row]))
        spare += 1
    for row, clip_id in rows:
        key = shards.keys[clip_id]
        clip = members[f"{key}.fbank"].view(stored).reshape(-1, NUM_MELS)[:length]
        fbank[row, : len(clip)], num_frames[row] = clip, len(clip)
        targets[row, members[f"{key}.labels"].view("<i4")] = 1
    arrays = (fbank, num_frames, targets, partner_row, step.lam)
    return Batch(step.clip_ids, *(torch.from_numpy(array) for array in arrays))


@pytest.mark.parametrize("buckets", [(), BUCKETS])
@pytest.mark.parametrize("dtype", ["float16", "uint8"])
@each(IN_ORDER)
def test_executors_in_draw_order_give_the_tars_own_bytes_as_batches(
    tmp_path: Path, kind: str, dtype: str, buckets: tuple[int, ...]
):
    path = write_split(tmp_path / "train", random_fbanks(LENGTHS), 7, dtype)
    members = read_tars(path)
    sampling = SamplingConfig(num_draws=90)
    with open_shards(path) as shards:
        stream = replace(IN_ORDER[kind], buckets=buckets)
        plan = make_plan(shards, stream, FRAMES, 8, sampling, seed=4)
        batches = list(read_batches(shards, plan, stream, epoch=2))
        of_indexed = make_plan(shards, StreamConfig(buckets=buckets), FRAMES, 8, sampling, seed=4)
        for batch, step in zip(batches, of_indexed.batches(2), strict=True):
            wanted = build_batch(members, shards, step)
            assert np.array_equal(batch.clip_ids, wanted.clip_ids)
            for name in ("fbank", "num_frames", "targets", "partner_row", "lam"):
                found, expected = getattr(batch, name), getattr(wanted, name)
                assert found.dtype == expected.dtype, name
                assert torch.equal(found, expected), name
    assert sum(len(batch.clip_ids) for batch in batches) == 88


@pytest.mark.parametrize("buckets", [(), BUCKETS])
@each(KINDS)
def test_a_resume_at_any_step_by_any_number_of_ranks_continues_exactly(
    split: Path, kind: str, buckets: tuple[int, ...]
):
    stream = replace(KINDS[kind], buckets=buckets, num_threads=2, lanes=4, shuffle_clips=5)
    with open_shards(split) as shards:
        whole = [samples(b) for b in read_batches(shards, make_plan(shards, stream, FRAMES), stream)]
        assert len(whole) == make_plan(shards, stream, FRAMES).num_steps(1) > 1
        for start in range(1, len(whole)):
            for world_size in (1, (2, 4, 8)[start % 3]):
                ranks = [
                    list(read_batches(shards, plan, stream, start=start))
                    for plan in (
                        make_plan(shards, stream, FRAMES, rank=r, world_size=world_size)
                        for r in range(world_size)
                    )
                ]
                joined = [[s for batch in step for s in samples(batch)] for step in zip(*ranks, strict=True)]
                assert joined == whole[start:], (start, world_size)


def test_balanced_draws_follow_the_weights_and_partners_are_uniform_over_many_epochs(split: Path):
    with open_shards(split) as shards:
        weights = compute_sample_weights(shards.index.indptr, shards.index.indices, len(shards.classes))
        plan = make_plan(shards, INDEXED, FRAMES, 5, SamplingConfig(mixup_rate=0.3, mixup_alpha=2.0))
        clips, partners, lam = [], [], []
        for epoch in range(1, 401):
            for step in plan.batches(epoch):
                clips.append(step.clip_ids)
                partners.append(step.partner_ids[step.partner_ids >= 0])
                lam.append(step.lam[step.partner_ids >= 0])
    counts = np.bincount(np.concatenate(clips), minlength=45)
    assert counts.sum() == 400 * 45
    assert weights.max() > 1.5 * weights.min()  # so uniform draws would not pass
    assert stats.chisquare(counts, counts.sum() * weights / weights.sum()).pvalue > 1e-3
    mixed = np.concatenate(partners)
    assert stats.binomtest(len(mixed), int(counts.sum()), 0.3).pvalue > 1e-3
    assert stats.chisquare(np.bincount(mixed, minlength=45)).pvalue > 1e-3
    assert stats.kstest(np.concatenate(lam), stats.beta(2, 2).cdf).pvalue > 1e-3


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=150),
    buckets=st.lists(st.integers(1, 50), min_size=1, max_size=5, unique=True).map(sorted),
    by=st.sampled_from(["frames", "clips"]),
    global_batch=st.integers(1, 9),
    window=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_buckets_take_every_draw_once_in_batches_no_longer_than_needed(
    lengths: list[int], buckets: list[int], by: str, global_batch: int, window: int, seed: int
):
    used = np.tile(lengths, global_batch)
    stream = StreamConfig(buckets=tuple(buckets), bucket_by=by)  # type: ignore[arg-type]
    sizes = bucket_sizes(stream, global_batch, buckets[-1])
    steps = make_steps(used, sizes, global_batch, window, seed, 1)
    assert sorted(steps.positions.tolist()) == list(range(len(used)))
    assert len(steps.starts) == len(steps.num_frames) + 1
    assert (steps.starts[0], steps.starts[-1]) == (0, len(used))
    own = np.array(buckets)[np.searchsorted(buckets[:-1], used)]  # the smallest that holds it; longest: cut
    filled, longer = [], 0
    for (first, end), frames in zip(pairwise(steps.starts), steps.num_frames, strict=True):
        held = own[steps.positions[first:end]]
        assert end > first
        assert (end - first) % global_batch == 0
        assert held.max() <= frames
        filled.append(end - first == sizes[int(frames)] and (held == frames).all())
        assert filled[-1] or end - first == global_batch
        longer += int((held < frames).sum())
    tail = len(filled) - filled.index(False) if False in filled else 0
    # a bucket leaves less than one of its batches, and hands less than a batch of G to the next
    assert tail * global_batch <= sum(size - 1 for size in sizes.values())
    assert longer <= (len(buckets) - 1) * (global_batch - 1)
    if by == "frames":
        frames_of = [size * length for length, size in sizes.items()]
        assert max(frames_of) == global_batch * buckets[-1]
        assert all(2 * frames > max(frames_of) for frames in frames_of)  # about as many in each
    else:
        assert set(sizes.values()) == {global_batch}
    again = make_steps(used, sizes, global_batch, window, seed, 1)
    assert np.array_equal(again.positions, steps.positions)
    assert np.array_equal(again.num_frames, steps.num_frames)


def test_buckets_spare_padding_and_mix_lengths_over_an_epoch(split: Path):
    stream = StreamConfig(buckets=BUCKETS, bucket_window=32)
    with open_shards(split) as shards:
        plan = make_plan(shards, stream, FRAMES, 4, SamplingConfig(num_draws=2000, mixup_rate=0))
        batches = list(plan.batches(1))
        ids = np.concatenate([batch.clip_ids for batch in batches])
        held = np.minimum(shards.index.num_frames[ids], FRAMES).sum()
        padded = sum(batch.shape.num_rows * batch.shape.num_frames for batch in batches)
        assert held / padded > 0.75 > held / (FRAMES * len(ids))
        frames = np.array([batch.shape.num_frames for batch in batches])
        windows = 2000 / (32 * 4)
        assert (np.diff(frames) != 0).sum() > 4 * windows  # not one bucket after the other
        assert {*frames[: len(frames) // 8].tolist()} == {*BUCKETS}
        assert plan.batch_sizes(1).tolist() == [len(batch.clip_ids) for batch in batches]
        assert plan.num_steps(1) == len(batches)
        again = make_plan(shards, stream, FRAMES, 4, SamplingConfig(num_draws=2000, mixup_rate=0)).batches(2)
        assert [batch.shape.num_frames for batch in again] != frames.tolist()


@given(
    num_draws=st.integers(8, 120),
    global_batch=st.integers(1, 8),
    lanes=st.integers(1, 10),
    reach=st.integers(1, 40),
    mixup_rate=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_draws_along_the_shards_are_the_same_draws_none_far_from_its_place(
    split: Path, num_draws: int, global_batch: int, lanes: int, reach: int, mixup_rate: float, seed: int
):
    sampling = SamplingConfig(num_draws=num_draws, mixup_rate=mixup_rate)
    stream = StreamConfig(kind="webdataset", lanes=lanes, shuffle_clips=reach)
    with open_shards(split) as shards:
        index = shards.index
    drawn = compute_draws(sampling, np.arange(1.0, 46.0), seed, 1)
    used = num_draws // global_batch * global_batch
    draws = replace(
        drawn, clip_ids=drawn.clip_ids[:used], partner_ids=drawn.partner_ids[:used], lam=drawn.lam[:used]
    )
    there = arrange_by_shard(draws, index, stream, global_batch, seed, 1)

    def rows(of, *names):
        return Counter(zip(*(getattr(of, name).tolist() for name in names), strict=True))

    assert rows(there, "clip_ids", "lam") == rows(draws, "clip_ids", "lam")
    assert rows(there, "partner_ids") == rows(draws, "partner_ids")
    mixed = Counter(draws.clip_ids[draws.partner_ids >= 0].tolist())
    assert Counter(there.clip_ids[there.partner_ids >= 0].tolist()) == mixed
    assert (there.lam[there.partner_ids < 0] == 1).all()
    # a draw's clip, the place of its shard in turn: told by the order without shuffling, of the same epoch
    still = arrange_by_shard(draws, index, replace(stream, shuffle_clips=1), global_batch, seed, 1)
    count = min(lanes, global_batch)
    lane_of = np.repeat(np.arange(count), np.diff(np.arange(count + 1) * global_batch // count))
    before, now = (d.clip_ids.reshape(-1, global_batch) for d in (still, there))
    sequence = np.concatenate([before[:, lane_of == lane].reshape(-1) for lane in range(count)])
    turn = list(dict.fromkeys(index.shard[sequence].tolist()))
    places = [(turn.index(int(index.shard[clip])), int(index.offset[clip])) for clip in sequence]
    assert places == sorted(places)
    for lane in range(count):
        old, new = (clips[:, lane_of == lane].reshape(-1) for clips in (before, now))
        assert sorted(old) == sorted(new)
        for clip in np.unique(old):
            moved = np.flatnonzero(new == clip) - np.flatnonzero(old == clip)
            assert np.abs(moved).max() <= reach


def test_the_order_along_the_shards_is_another_one_each_epoch(split: Path):
    with open_shards(split) as shards:
        plan = make_plan(shards, StreamConfig(kind="webdataset", lanes=1, shuffle_clips=1), FRAMES)
        turns = [tuple(dict.fromkeys(shards.index.shard[plan.draws(e).clip_ids].tolist())) for e in range(8)]
    assert len(set(turns)) == 8
