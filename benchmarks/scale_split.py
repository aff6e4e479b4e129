"""The split of benchmarks/scale.py: sparse tars of full size, with a true index."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from synthetic import CLIP_FRAMES_10_S, NUM_CLASSES, make_classes

from psla_fast.fbank import FbankConfig
from psla_fast.files import write_atomically
from psla_fast.shards import Shards, Storage, open_shards
from psla_fast.shards.index import write_index
from psla_fast.shards.spec import TAR_BLOCK, shard_name
from psla_fast.shards.sums import CLASSES_NAME, format_sums, hash_file
from psla_fast.shards.writer import Member, ShardStatistics
from psla_fast.stream import BatchPlan

CLIP_BYTES = CLIP_FRAMES_10_S * 128 * 2
MEMBER_BYTES = TAR_BLOCK + -(-CLIP_BYTES // TAR_BLOCK) * TAR_BLOCK + 2 * TAR_BLOCK  # a clip and its labels


def list_shards(num_clips: int, num_shards: int) -> Iterator[ShardStatistics]:
    """Give the statistics of each shard, as their writer would."""
    rng = np.random.default_rng(0)
    for ids in np.array_split(np.arange(num_clips), num_shards):
        labels = rng.zipf(1.3, size=(len(ids), 2)) % NUM_CLASSES  # a few classes are common, most rare
        clips = []
        for place, (clip_id, pair) in enumerate(zip(ids.tolist(), labels.tolist(), strict=True)):
            key, offset = f"Y{clip_id:010d}", place * MEMBER_BYTES + TAR_BLOCK
            sizes = CLIP_BYTES, CLIP_FRAMES_10_S
            clips.append(Member(key, key, f"{key}.flac", 320_000, offset, *sizes, clip_id, sorted({*pair})))
        yield ShardStatistics(tar_bytes=len(ids) * MEMBER_BYTES + 2 * TAR_BLOCK, clips=clips)


def write_sparse_split(folder: Path, num_clips: int, num_shards: int) -> Path:
    """Write FOLDER/train: index, sums and empty tars of full size."""
    split = folder / "train"
    split.mkdir(parents=True)
    classes = make_classes(folder)
    shards = list_shards(num_clips, num_shards)
    write_index(split, shards, FbankConfig(), Storage.of("float16"), classes)
    sums = {name: hash_file(split / name) for name in ("index.h5", CLASSES_NAME)}
    write_atomically(split / "SHA256SUMS", format_sums(sums).encode())
    with open_shards(split) as opened:
        for number, size in enumerate(opened.index.shard_bytes.tolist()):
            with open(split / f"{shard_name(number)}.tar", "wb") as tar:
                tar.truncate(size)
    return split


def write_headers(shards: Shards, plans: list[BatchPlan]) -> None:
    """Write the tar headers of the clips that plans read."""
    for clip_id in np.unique(np.concatenate([plan.row_ids for plan in plans])).tolist():
        member = tarfile.TarInfo(shards.index.key[clip_id].decode() + ".fbank")
        member.size = CLIP_BYTES
        with open(shards.shard_path(int(shards.index.shard[clip_id])), "r+b") as tar:
            tar.seek(int(shards.index.offset[clip_id]) - TAR_BLOCK)
            tar.write(member.tobuf(tarfile.USTAR_FORMAT))
