"""Order: an epoch's draws -> the same draws shard by shard, and the steps of equal lengths they make up."""

# D draws of an epoch, G clips of the smallest global batch, S steps

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from psla_fast.sampling import Draws
from psla_fast.shards import Index
from psla_fast.stream.batch import StreamConfig

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Steps:
    """The global batches of an epoch: step s holds the draws positions[starts[s] : starts[s + 1]].

    positions (D,) every draw once, starts (S + 1,), num_frames (S,) the batch's length T.
    """

    positions: Ints
    starts: Ints
    num_frames: Ints


def bucket_sizes(stream: StreamConfig, global_batch: int, clip_frames: int) -> dict[int, int]:
    """Give the length of each bucket in frames -> clips of its global batch, a multiple of `global_batch`.

    So any number of ranks that divides the smallest batch divides all.
    """
    if not stream.buckets:
        return {clip_frames: global_batch}
    by_frames = stream.bucket_by == "frames"
    return {frames: global_batch * (clip_frames // frames if by_frames else 1) for frames in stream.buckets}


def make_steps(
    lengths: npt.NDArray[np.integer],
    sizes: dict[int, int],
    global_batch: int,
    window: int,
    seed: int,
    epoch: int,
) -> Steps:
    """Put draws of these lengths (D,), a multiple of G, into batches by length; deterministic, each once.

    From each window of draws every bucket's whole batches are taken, in shuffled order; what is left waits
    for the next one. What the epoch's end leaves goes into batches of G, of the next longer bucket where a
    bucket can't fill one.
    """
    num_draws = len(lengths)
    if len(sizes) == 1:
        starts = np.arange(0, num_draws + 1, global_batch, dtype=np.int64)
        return Steps(
            np.arange(num_draws), starts, np.full(len(starts) - 1, next(iter(sizes)), dtype=np.int64)
        )
    frames = np.array(list(sizes), dtype=np.int64)
    bucket = np.searchsorted(frames[:-1], lengths)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, 3])))
    waiting: list[Ints] = [np.empty(0, dtype=np.int64) for _ in frames]
    batches: list[Ints] = []
    batch_frames: list[int] = []
    for first in range(0, num_draws, window):
        inside = bucket[first : first + window]
        found: list[tuple[Ints, int]] = []
        for number, (length, size) in enumerate(sizes.items()):
            joined = np.concatenate([waiting[number], first + np.flatnonzero(inside == number)])
            whole = len(joined) // size * size
            found += [(batch, length) for batch in joined[:whole].reshape(-1, size)]
            waiting[number] = joined[whole:]
        for place in rng.permutation(len(found)):
            batches.append(found[place][0])
            batch_frames.append(found[place][1])
    carried = np.empty(0, dtype=np.int64)
    for length, left in zip(frames.tolist(), waiting, strict=True):
        carried = np.concatenate([carried, left])
        whole = len(carried) // global_batch * global_batch
        batches += list(carried[:whole].reshape(-1, global_batch))
        batch_frames += [length] * (whole // global_batch)
        carried = carried[whole:]
    starts = np.cumsum([0, *map(len, batches)], dtype=np.int64)
    return Steps(np.concatenate(batches), starts, np.array(batch_frames, dtype=np.int64))


def arrange_by_shard(
    draws: Draws, index: Index, stream: StreamConfig, global_batch: int, seed: int, epoch: int
) -> Draws:
    """Reorder draws so that the shards can be read one after the other: the same clips, partners and λ.

    Shards come in an order drawn anew each epoch. `lanes` parts of that sequence run side by side, each
    filling its share of every global batch; within a lane a draw moves by at most `shuffle_clips` places.
    Partners are dealt out anew, so that they lie near the clips they are mixed with.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, 4])))
    turn = rng.permutation(len(index.shard_bytes))
    lanes = min(stream.lanes, global_batch)
    share = np.diff(np.arange(lanes + 1) * global_batch // lanes)  # rows of a lane in each batch
    num_steps = len(draws.clip_ids) // global_batch
    sequence = _along_shards(draws.clip_ids, index, turn)
    partners = draws.partner_ids[draws.partner_ids >= 0]
    partners = partners[_along_shards(partners, index, turn)]
    placed: list[Ints] = []
    dealt = np.full(len(draws.clip_ids), -1, dtype=np.int64)
    first, num_dealt = 0, 0
    for rows in share * num_steps:
        lane = sequence[first : first + rows]
        lane = lane[_jitter(len(lane), stream.shuffle_clips, rng)]
        mixed = lane[draws.partner_ids[lane] >= 0]
        near = partners[num_dealt : num_dealt + len(mixed)]
        dealt[mixed] = near[_jitter(len(near), stream.shuffle_clips, rng)]
        placed.append(lane.reshape(num_steps, -1))
        first, num_dealt = first + rows, num_dealt + len(mixed)
    order = np.concatenate(placed, axis=1).reshape(-1)
    return Draws(draws.clip_ids[order], dealt[order], draws.lam[order])


def _along_shards(clip_ids: Ints, index: Index, turn: npt.NDArray[np.integer]) -> Ints:
    """Sort clips by their shard's turn, then by their place in it, as ids do: positions (len,)."""
    return np.argsort(turn[index.shard[clip_ids]] * len(index.shard) + clip_ids, kind="stable")


def _jitter(count: int, reach: int, rng: np.random.Generator) -> Ints:
    """Permute 0…count-1 so that none moves further than `reach`."""
    return np.argsort(np.arange(count) + rng.random(count) * reach, kind="stable")
