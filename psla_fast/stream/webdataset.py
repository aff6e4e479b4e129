"""Blocks: shards, remote or on slow disks, read some MB at a time as plans need them -> clips in memory."""

# U uses of clips by an epoch's rows, in their order; V visits; K blocks

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from psla_fast.shards import TAR_BLOCK, Index, ShardError, Shards, fill_from_file
from psla_fast.stream.batch import StreamConfig
from psla_fast.stream.plan import BatchPlan

BLOCK_BYTES = 8 * 2**20
MAX_GAP_BYTES = 2**20  # of clips that aren't needed; a wider gap is worth another request
JOIN_SECONDS = 0.5
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Schedule:
    """Which clips are read together, when, and how often each is used before it's let go.

    A visit is a clip's uses that lie near each other. clip, uses and block (V,) come by clip, then by time;
    visits (V,) are numbers of visits by block, then by place in the shard, block k's being those of
    visits[starts[k] : starts[k + 1]]; first_step (K,) ascends.
    """

    clip: Ints
    uses: Ints
    block: Ints
    visits: Ints
    starts: Ints
    first_step: Ints


def make_schedule(index: Index, frame_bytes: int, rows: Sequence[Ints], hold_rows: int) -> Schedule:
    """Schedule the reads of steps that use these clips; a clip waits hold_rows rows at most for its next."""
    used = np.concatenate([np.empty(0, dtype=np.int64), *rows])
    order = np.argsort(used, kind="stable")
    clip, is_first = used[order], np.ones(len(used), dtype=bool)
    is_first[1:] = (np.diff(clip) != 0) | (np.diff(order) > hold_rows)
    heads = np.flatnonzero(is_first)
    clip, first = clip[heads], order[heads]
    uses = np.diff(np.append(heads, len(used)))

    offset = index.offset[clip]
    end = offset + index.num_frames[clip] * np.int64(frame_bytes)
    where = index.shard[clip].astype(np.int64) * (int(index.shard_bytes.max(initial=0)) // BLOCK_BYTES + 1)
    _, area = np.unique(where + offset // BLOCK_BYTES, return_inverse=True)
    earliest = np.full(len(clip), len(used))
    np.minimum.at(earliest, area, first)
    turn = (first - earliest[area]) // hold_rows  # what is needed much later, too, is read again
    visits = np.lexsort((offset, turn, area))
    is_start = np.ones(len(clip), dtype=bool)
    is_start[1:] = (np.diff(area[visits]) != 0) | (np.diff(turn[visits]) != 0)
    is_start[1:] |= offset[visits][1:] - TAR_BLOCK - end[visits][:-1] > MAX_GAP_BYTES
    block_first = np.minimum.reduceat(first[visits], np.flatnonzero(is_start)) if len(clip) else first

    by_time = np.argsort(block_first, kind="stable")
    turned = np.empty_like(by_time)
    turned[by_time] = np.arange(len(by_time))
    block_of = turned[np.cumsum(is_start) - 1]
    again = np.argsort(block_of, kind="stable")
    visits, block_of = visits[again], block_of[again]
    block = np.empty_like(block_of)
    block[visits] = block_of
    starts = np.searchsorted(block_of, np.arange(len(by_time) + 1))
    first_step = np.searchsorted(np.cumsum([len(ids) for ids in rows]), block_first[by_time], side="right")
    return Schedule(clip, uses, block, visits, starts, first_step)


class Epoch:
    """The reading of some steps: threads fetch blocks as they fall due; a clip is held till its last use."""

    def __init__(self, shards: Shards, config: StreamConfig, plans: Sequence[BatchPlan]) -> None:
        """Schedule the plans and start num_threads threads, and as many again where whole shards are kept."""
        self._shards, self._config = shards, config
        self.mirror = shards.mirror.again() if shards.mirror else None
        hold_rows = 4 * config.lanes * config.shuffle_clips
        self._schedule = make_schedule(
            shards.index, shards.frame_bytes, [plan.row_ids for plan in plans], hold_rows
        )
        num_blocks = len(self._schedule.first_step)
        self._to_come, self._uses = self._schedule.uses.copy(), self._schedule.uses.copy()
        self._held: dict[int, npt.NDArray[np.uint8]] = {}
        self._fetched = np.zeros(num_blocks, dtype=bool)
        self._next, self._due, self._closed = 0, 0, False
        self._problem: Exception | None = None
        self._changed = threading.Condition()
        self.held_bytes = self.peak_bytes = 0
        work = [self._fetch_blocks] * config.num_threads
        if self.mirror and self.mirror.reads_whole:
            firsts = self._schedule.visits[self._schedule.starts[:-1]]
            in_turn = dict.fromkeys(shards.index.shard[self._schedule.clip[firsts]].tolist())
            self._wanted_shards = list(in_turn)
            work += [self._fetch_shards] * config.num_threads
        self._threads = [
            threading.Thread(target=task, name=f"psla-stream-blocks-{number}", daemon=True)
            for number, task in enumerate(work)
        ]
        for thread in self._threads:
            thread.start()

    def advance(self, step: int) -> None:
        """Let the blocks fall due that are first needed up to `read_ahead` steps after this one."""
        with self._changed:
            self._due = int(
                np.searchsorted(self._schedule.first_step, step + self._config.read_ahead, "right")
            )
            self._changed.notify_all()

    def take(self, clip_id: int) -> npt.NDArray[np.uint8] | None:
        """Wait for a clip's block and count a use of it; None for a clip that isn't in a block now."""
        with self._changed:
            clips = self._schedule.clip
            visit = int(np.searchsorted(clips, clip_id))
            while visit < len(clips) and clips[visit] == clip_id and not self._to_come[visit]:
                visit += 1
            if visit == len(clips) or clips[visit] != clip_id:
                return None
            block = self._schedule.block[visit]
            if block >= self._due:  # a replacement that its own step isn't near
                return None
            self._to_come[visit] -= 1
            while not self._fetched[block] and not self._closed:
                self._changed.wait()
            if self._closed:
                raise InterruptedError("closed while reading")
            if self._problem:
                raise self._problem
            self._uses[visit] -= 1
            if self._uses[visit]:
                return self._held.get(visit)
            stored = self._held.pop(visit, None)
            self.held_bytes -= 0 if stored is None else len(stored)
            return stored

    def close(self) -> None:
        """Break off; threads that hang are left behind."""
        with self._changed:
            self._closed = True
            self._held.clear()
            self.held_bytes = 0
            self._changed.notify_all()
        if self.mirror:
            self.mirror.close()
        until = time.monotonic() + JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _fetch_blocks(self) -> None:
        """Fetch one block after the other, on a thread, as they fall due."""
        while True:
            with self._changed:
                while not self._closed and self._due <= self._next < len(self._fetched):
                    self._changed.wait()
                if self._closed or self._next == len(self._fetched):
                    return
                block, self._next = self._next, self._next + 1
            clips: dict[int, npt.NDArray[np.uint8]] = {}
            try:
                clips = self._fetch(block)
            except (ShardError, OSError, EOFError):
                pass  # each clip is tried by itself then, and says what is wrong
            except Exception as error:
                self._problem = error
            finally:
                self._hold(block, clips)

    def _hold(self, block: int, clips: dict[int, npt.NDArray[np.uint8]]) -> None:
        """Keep the clips that are still to be used, and wake those who wait for them."""
        with self._changed:
            if not self._closed:
                self._held |= clips
                self.held_bytes += sum(map(len, clips.values()))
                self.peak_bytes = max(self.peak_bytes, self.held_bytes)
            self._fetched[block] = True
            self._changed.notify_all()

    def _fetch(self, block: int) -> dict[int, npt.NDArray[np.uint8]]:
        """Read a block: its clips (bytes,) by visit, without those that aren't what the index says."""
        first, end = self._schedule.starts[block : block + 2]
        visits = self._schedule.visits[first:end].tolist()
        clip_ids = self._schedule.clip[visits]
        index, frame_bytes = self._shards.index, self._shards.frame_bytes
        offsets = index.offset[clip_ids].tolist()
        sizes = (index.num_frames[clip_ids].astype(np.int64) * frame_bytes).tolist()
        headers = [bytearray(TAR_BLOCK) for _ in visits]
        clips = [np.empty(size, dtype=np.uint8) for size in sizes]
        start, at = offsets[0] - TAR_BLOCK, offsets[0] - TAR_BLOCK
        skipped = memoryview(bytearray(MAX_GAP_BYTES))
        buffers = []
        for header, clip, offset, size in zip(headers, clips, offsets, sizes, strict=True):
            buffers += [skipped[: offset - TAR_BLOCK - at], memoryview(header), clip.data]
            at = offset + size
        shard = int(index.shard[clip_ids[0]])
        if self.mirror:
            self.mirror.read(shard, start, buffers)
        else:
            fill_from_file(self._shards.descriptor(shard), start, buffers)
        check_crc = self._config.check_crc or self.mirror is not None
        return {
            visit: clip
            for visit, clip_id, header, clip in zip(visits, clip_ids.tolist(), headers, clips, strict=True)
            if self._is_right(clip_id, header, clip, check_crc)
        }

    def _is_right(
        self, clip_id: int, header: bytearray, clip: npt.NDArray[np.uint8], check_crc: bool
    ) -> bool:
        try:
            self._shards.check_clip(clip_id, header, clip.data, check_crc)
        except ShardError:
            return False
        return True

    def _fetch_shards(self) -> None:
        """Fetch whole shards in the order of their use, on a thread; those that others fetch come last."""
        assert self.mirror is not None
        while True:
            with self._changed:
                if self._closed or not self._wanted_shards:
                    return
                shard = self._wanted_shards.pop(0)
            try:
                if not self.mirror.fetch_shard(shard, wait=False):
                    self.mirror.fetcher.pause(0.1)
                    with self._changed:
                        self._wanted_shards.append(shard)
            except (ShardError, OSError):
                continue  # whoever needs the shard tries once more, and says what is wrong


class BlockSource:
    """A source of slabs: follows an epoch's plans with big reads, remote ones checked and tried again."""

    def __init__(self, shards: Shards, config: StreamConfig) -> None:
        """Read nothing yet. Whole shards are kept where `open_shards` was given a cache."""
        self._shards, self._config = shards, config
        self._epoch: Epoch | None = None
        self._closed = False

    @property
    def held_bytes(self) -> int:
        """Bytes of clips in memory now."""
        return self._epoch.held_bytes if self._epoch else 0

    @property
    def peak_bytes(self) -> int:
        """Most bytes of clips that were in memory at a time, of the plans that were followed last."""
        return self._epoch.peak_bytes if self._epoch else 0

    def follow(self, plans: Iterator[BatchPlan]) -> Iterator[BatchPlan]:
        """Look through all plans, then pass them on, reading ahead of them; ends what was followed before."""
        coming = list(plans)
        if self._epoch:
            self._epoch.close()
        epoch = self._epoch = Epoch(self._shards, self._config, coming)
        try:
            for step, plan in enumerate(coming):
                epoch.advance(step)
                yield plan
        except GeneratorExit:  # nobody wants the rest
            epoch.close()
            raise

    def read_into(self, clip_id: int, target: memoryview) -> None:
        """Copy a clip's first bytes; waits for its block. A clip that is in none is read by itself."""
        if self._closed:
            raise InterruptedError("closed while reading")
        epoch, shards = self._epoch, self._shards
        stored = epoch.take(clip_id) if epoch else None
        if stored is None:
            mirror = epoch.mirror if epoch else shards.mirror
            stored = np.empty(int(shards.index.num_frames[clip_id]) * shards.frame_bytes, dtype=np.uint8)
            if mirror:
                shards.fetch_into(clip_id, stored.data, mirror)
            else:
                shards.read_into(clip_id, stored.data, self._config.check_crc)
        np.copyto(np.frombuffer(target, dtype=np.uint8), stored[: len(target)])

    def close(self) -> None:
        """Break off all reads, and let the clips go."""
        self._closed = True
        if self._epoch:
            self._epoch.close()
