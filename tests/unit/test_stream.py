from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from psla_fast.sampling import SamplingConfig
from psla_fast.shards import ShardError, Shards, open_shards
from psla_fast.stream import (
    Batch,
    BatchShape,
    DrawPlan,
    PlanConfig,
    SequentialPlan,
    StreamConfig,
    explain_difference,
    open_stream,
)

CPU = torch.device("cpu")
FRAMES = 120


def make_plan(
    shards: Shards,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
    global_batch: int = 8,
    rank: int = 0,
    world_size: int = 1,
    stream: StreamConfig | None = None,
) -> DrawPlan:
    config = PlanConfig(sampling or SamplingConfig(), stream or StreamConfig(), seed, global_batch, FRAMES)
    return DrawPlan(shards, config, rank, world_size)


def read_rows(shards: Shards, plan: DrawPlan, epoch: int, config: StreamConfig, start: int = 0):
    """Every batch of an epoch, copied out of its slab."""
    stream = open_stream(shards, config, plan.shapes, CPU)
    try:
        for batch in stream.batches(plan.batches(epoch, start)):
            yield Batch(batch.clip_ids.copy(), batch.fbank.clone(), *(t.clone() for t in tensors(batch)))
    finally:
        stream.close()


def tensors(batch: Batch) -> tuple[torch.Tensor, ...]:
    return batch.num_frames, batch.targets, batch.partner_row, batch.lam


def check_rows(shards: Shards, batch: Batch, partner_ids: np.ndarray) -> None:
    """A batch's rows hold exactly the clips and partners of its draws."""
    for row, clip_id in enumerate(batch.clip_ids):
        partner_row = int(batch.partner_row[row])
        assert (partner_row == row) == (partner_ids[row] < 0)
        wanted = [(row, int(clip_id))] + (
            [(partner_row, int(partner_ids[row]))] if partner_row != row else []
        )
        for slab_row, wanted_id in wanted:
            expected = shards.fbank(wanted_id)[:FRAMES]
            num_frames = int(batch.num_frames[slab_row])
            assert num_frames == len(expected)
            assert np.array_equal(batch.fbank[slab_row, :num_frames].float().numpy(), expected)
            assert list(np.flatnonzero(batch.targets[slab_row])) == list(shards.labels(wanted_id))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_batches_hold_the_draws_in_order(packed: Path, num_threads: int):
    with open_shards(packed / "train") as shards:
        plan = make_plan(shards, seed=3)
        draws = plan.draws(2)
        config = StreamConfig(num_threads=num_threads, read_ahead=3)
        batches = list(read_rows(shards, plan, 2, config))
        assert len(batches) == plan.num_steps(2) == len(shards) // 8
        for step, batch in enumerate(batches):
            rows = slice(8 * step, 8 * step + 8)
            assert np.array_equal(batch.clip_ids, draws.clip_ids[rows])
            assert np.array_equal(batch.lam.numpy(), draws.lam[rows])
            check_rows(shards, batch, draws.partner_ids[rows])


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_slices_put_together_are_one_rank_s_batches(packed: Path, world_size: int):
    with open_shards(packed / "train") as shards:
        whole = make_plan(shards, seed=1)
        parts = [make_plan(shards, None, 1, 8, rank, world_size) for rank in range(world_size)]
        assert all(plan.identity == whole.identity for plan in parts)
        for step, plans in enumerate(
            zip(whole.batches(1), *(part.batches(1) for part in parts), strict=True)
        ):
            joined = [np.concatenate([getattr(p, name) for p in plans[1:]]) for name in ("clip_ids", "lam")]
            assert np.array_equal(joined[0], plans[0].clip_ids), step
            assert np.array_equal(joined[1], plans[0].lam), step


def test_a_resume_at_any_step_continues_exactly(packed: Path):
    with open_shards(packed / "train") as shards:
        plan = make_plan(shards, seed=1)
        whole = list(read_rows(shards, plan, 1, StreamConfig()))
        for start in range(plan.num_steps(1)):
            fresh = make_plan(shards, seed=1)
            rest = list(read_rows(shards, fresh, 1, StreamConfig(), start))
            assert [list(b.clip_ids) for b in rest] == [list(b.clip_ids) for b in whole[start:]]


def test_a_shuffled_epoch_reads_every_clip_once(packed: Path):
    with open_shards(packed / "train") as shards:
        plan = make_plan(shards, SamplingConfig(kind="shuffle"))
        seen = Counter(int(i) for batch in plan.batches(1) for i in batch.clip_ids)
        assert set(seen.values()) == {1}
        assert len(seen) == plan.num_steps(1) * 8


@pytest.mark.parametrize(("batch_size", "world_size"), [(7, 1), (5, 3), (64, 2)])
def test_evaluation_reads_every_clip_once_and_marks_spare_rows_empty(
    packed: Path, batch_size: int, world_size: int
):
    with open_shards(packed / "eval") as shards:
        seen: list[int] = []
        for rank in range(world_size):
            plan = SequentialPlan(shards.index.num_frames, batch_size, (FRAMES,), rank, world_size)
            stream = open_stream(shards, StreamConfig(), plan.shapes, CPU)
            for batch in stream.batches(plan.batches()):
                assert batch.fbank.shape[0] == batch_size
                assert int(batch.num_frames[len(batch.clip_ids) :].sum()) == 0
                check_rows(shards, batch, np.full(len(batch.clip_ids), -1))
                seen += batch.clip_ids.tolist()
            stream.close()
        assert sorted(seen) == list(range(len(shards)))


def test_other_data_weights_seed_batch_or_order_are_named(packed: Path):
    with open_shards(packed / "train") as train, open_shards(packed / "val") as val:
        base = make_plan(train).identity
        assert explain_difference(base, make_plan(train, rank=1, world_size=2).identity) == ""
        other = {
            "sampling.kind: balanced, now shuffle": make_plan(train, SamplingConfig(kind="shuffle")),
            "seed: 0, now 1": make_plan(train, seed=1),
            "optim.batch_size: 8, now 4": make_plan(train, global_batch=4),
            "shards: others than before": make_plan(val),
            "stream.buckets: [], now [50, 120]": make_plan(train, stream=StreamConfig(buckets=(50, FRAMES))),
            "stream.kind: any in draw order, now webdataset": make_plan(
                train, stream=StreamConfig(kind="webdataset")
            ),
        }
        for text, plan in other.items():
            assert text in explain_difference(base, plan.identity)
        resident = make_plan(train, stream=StreamConfig(kind="resident", num_threads=1))
        assert explain_difference(base, resident.identity) == ""


def test_ranks_that_cannot_share_a_batch_and_a_batch_above_an_epoch_are_refused(packed: Path):
    with open_shards(packed / "train") as shards:
        with pytest.raises(ValueError, match="can't be shared by 3 ranks"):
            make_plan(shards, None, 0, 8, 0, 3)
        with pytest.raises(ValueError, match="fewer than one batch of 1000"):
            make_plan(shards, global_batch=1000)


def test_a_changed_byte_stops_the_stream_when_crc_is_on_and_threads_end(packed: Path, tmp_path: Path):
    import shutil
    import threading

    folder = Path(shutil.copytree(packed, tmp_path / "shards")) / "val"
    with open_shards(folder) as shards:
        short = int(np.argmin(shards.index.num_frames))
        where = folder / f"{int(shards.index.shard[short]):05d}.tar", int(shards.index.offset[short])
    raw = bytearray(where[0].read_bytes())
    raw[where[1]] ^= 255
    where[0].write_bytes(raw)
    with open_shards(folder) as shards:
        shape = BatchShape(4, 300, partners=False)
        plan = SequentialPlan(shards.index.num_frames, 4, (300,))
        for check_crc in (False, True):
            stream = open_stream(shards, StreamConfig(check_crc=check_crc), [shape], CPU)
            try:
                if check_crc:
                    with pytest.raises(ShardError, match=shards.keys[short]):
                        list(stream.batches(plan.batches()))
                else:
                    assert len(list(stream.batches(plan.batches()))) > 0
            finally:
                stream.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("psla-stream")]
