"""A split of 2M clips in 1,000 shards, as sparse tars: how long the index, an epoch's draws and reads take.

The tars are of full size, but hold only the headers of the clips that are read, so no disk of 512 GB is
needed; what is read is the kernel's zero pages. Reads are compared with those of a small split in one run.
"""

import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from record import interleave, paired_ratio, print_table, read_environment, summarise, write_record
from synthetic import CLIP_FRAMES_10_S, NUM_CLASSES, make_classes

from psla_fast.errors import exit_on_user_error
from psla_fast.fbank import FbankConfig
from psla_fast.files import write_atomically
from psla_fast.recipe import parse_flags
from psla_fast.sampling import SamplingConfig
from psla_fast.shards import Shards, Storage, open_shards
from psla_fast.shards.index import write_index
from psla_fast.shards.spec import TAR_BLOCK, shard_name
from psla_fast.shards.sums import CLASSES_NAME, format_sums, hash_file
from psla_fast.shards.writer import Member, ShardStatistics
from psla_fast.stream import BatchPlan, DrawPlan, PlanConfig, StreamConfig, open_stream

CLIP_BYTES = CLIP_FRAMES_10_S * 128 * 2
MEMBER_BYTES = TAR_BLOCK + -(-CLIP_BYTES // TAR_BLOCK) * TAR_BLOCK + 2 * TAR_BLOCK  # a clip and its labels


@dataclass(frozen=True)
class ScaleBenchmark:
    """Measure what grows with the number of clips."""

    num_clips: int = 2_000_000
    """Clips of the split, 10 s each."""
    num_shards: int = 1000
    """Its shards."""
    num_reads: int = 8000
    """Clips that a trial reads."""
    trials: int = 7
    """Rounds, after one to warm up."""
    tiny: bool = False
    """A run of seconds, for CI; its numbers mean nothing and are not kept."""


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


def peak_memory() -> float:
    """Give the most memory that this process held so far, in MB; getrusage would give its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def measure_index(split: Path) -> dict[str, float]:
    """Open a split in this fresh process and draw an epoch: seconds, and MB that this took at most."""
    before = peak_memory()
    start = perf_counter()
    shards = open_shards(split)
    opened = perf_counter()
    after = peak_memory()
    plan = DrawPlan(shards, PlanConfig(SamplingConfig(), StreamConfig(), 0, 100, 1056))
    weighed = perf_counter()
    plan.draws(1)
    drawn = perf_counter()
    by_shard = PlanConfig(SamplingConfig(), StreamConfig(kind="webdataset"), 0, 100, 1056)
    DrawPlan(shards, by_shard).draws(1)
    arranged = perf_counter() - drawn
    shards.close()
    return {
        "index opened, s": opened - start,
        "index opened, MB more": after - before,
        "sample weights, s": weighed - opened,
        "draws of an epoch, s": drawn - weighed,
        "the same by shard, with weights, s": arranged,
    }


def measure_reads(config: ScaleBenchmark, folder: Path, split: Path) -> dict[str, list[float]]:
    """Clips a second from all shards of the large split, and from a split of 8 such shards."""
    per_shard = -(-config.num_clips // config.num_shards)
    small = write_sparse_split(folder / "small", 8 * per_shard, 8)
    contestants = {}
    for name, path in (("2M clips", split), ("8 shards", small)):
        shards = open_shards(path)
        draws = SamplingConfig(kind="shuffle", mixup_rate=0, num_draws=config.num_reads)
        plan = DrawPlan(shards, PlanConfig(draws, StreamConfig(), 0, 100, 1056))
        plans = list(plan.batches(1))
        write_headers(shards, plans)
        stream = open_stream(shards, StreamConfig(), plan.shapes, torch.device("cpu"))
        contestants[name] = partial(read_rate, stream.batches, plans)
    return interleave(contestants, config.trials)


def read_rate(batches: object, plans: list[BatchPlan]) -> float:
    """Clips a second of one pass."""
    start = perf_counter()
    num_clips = sum(len(batch.clip_ids) for batch in batches(iter(plans)))  # type: ignore[operator]
    return num_clips / (perf_counter() - start)


def main() -> None:
    """Measure, print the table, write the record."""
    config = parse_flags(ScaleBenchmark, sys.argv[1:], "benchmarks/scale.py")
    environment = read_environment()
    if config.tiny:
        config = replace(config, num_clips=2000, num_shards=10, num_reads=400, trials=2)
    with tempfile.TemporaryDirectory(prefix="psla_fast_scale_") as temporary:
        split = write_sparse_split(Path(temporary) / "large", config.num_clips, config.num_shards)
        index_mb = os.path.getsize(split / "index.h5") / 1e6
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            seconds = fresh.submit(measure_index, split).result()
        rates = measure_reads(config, Path(temporary), split)
    measured = {"index.h5, MB": index_mb} | seconds
    print_table(["", "median"], [[name, f"{value:.3g}"] for name, value in measured.items()])
    summary = {name: summarise(values) for name, values in rates.items()}
    print_table(["", "clips/s", "p10", "p90"], [[name, *rate.values()] for name, rate in summary.items()])
    ratio = paired_ratio(rates["2M clips"], rates["8 shards"])
    print(f"reads, 2M clips / 8 shards: {ratio['median']:.3g} ({ratio['p10']:.3g} to {ratio['p90']:.3g})")
    record = {
        "benchmark": "scale",
        "ratios": {"reads large/small": ratio["median"]},
        "measured": {name: float(f"{value:.4g}") for name, value in measured.items()},
        "clips_per_second": summary,
        "device": "cpu",
        "config": asdict(config),
        "environment": environment,
    }
    write_record(record, keep=not config.tiny)


if __name__ == "__main__":
    with exit_on_user_error("benchmarks/scale.py"):
        main()
