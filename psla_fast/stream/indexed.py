"""Indexed source: random reads of a split on a local disk, straight into the slabs."""

import contextlib
import os
from collections.abc import Iterator

from psla_fast.shards import ShardError, Shards
from psla_fast.stream.memory import available_memory
from psla_fast.stream.plan import BatchPlan
from psla_fast.stream.rows import count_frames

CACHED_FRACTION = 0.7  # of the available memory; a larger split won't stay in the page cache


class IndexedSource:
    """Reads each clip by one `preadv`; tells the kernel beforehand what is read next of a cold split."""

    def __init__(self, shards: Shards, check_crc: bool) -> None:
        """Compare the split's size with the memory that the page cache may take."""
        self._shards, self._check_crc = shards, check_crc
        self._stays_cached = int(shards.index.shard_bytes.sum()) <= CACHED_FRACTION * available_memory()
        self._followed_before = False

    def follow(self, plans: Iterator[BatchPlan]) -> Iterator[BatchPlan]:
        """Pass plans on; the disk starts on their clips, unless an earlier pass has left them cached."""
        announces = not (self._followed_before and self._stays_cached)
        self._followed_before = True
        for plan in plans:
            if announces:
                self._announce(plan)
            yield plan

    def read_into(self, clip_id: int, target: memoryview) -> None:
        """Read a clip's first bytes; by choice its crc32 is checked, where the target takes it whole."""
        self._shards.read_into(clip_id, target, self._check_crc)

    def close(self) -> None:
        """Nothing to release: open files belong to the shards."""

    def _announce(self, plan: BatchPlan) -> None:
        shards, index, frame_bytes = self._shards, self._shards.index, self._shards.frame_bytes
        sizes = count_frames(shards, plan)[: len(plan.row_ids)] * frame_bytes
        where = zip(index.shard[plan.row_ids], index.offset[plan.row_ids], sizes, strict=True)
        for shard, offset, size in where:
            with contextlib.suppress(ShardError):  # the read itself tells it, or skips the clip
                os.posix_fadvise(
                    shards.descriptor(int(shard)), int(offset), int(size), os.POSIX_FADV_WILLNEED
                )
