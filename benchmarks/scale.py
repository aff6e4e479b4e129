"""A split of 2M clips in 1,000 shards, as sparse tars: how long the index, an epoch's draws and reads take.

The tars are of full size, but hold only the headers of the clips that are read, so no disk of 512 GB is
needed; what is read is the kernel's zero pages. Reads are compared with those of a small split in one run.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

import torch
from record import interleave, paired_ratio, print_table, read_environment, summarise, write_record
from scale_split import write_headers, write_sparse_split
from stream_ours import bare_pread, best_of

from psla_fast.errors import exit_on_user_error
from psla_fast.recipe import parse_flags
from psla_fast.sampling import SamplingConfig
from psla_fast.shards import Shards, open_shards
from psla_fast.shards.spec import TAR_BLOCK
from psla_fast.stream import Batch, BatchPlan, DrawPlan, PlanConfig, StreamConfig, open_stream
from psla_fast.stream.dali import INDEX_FOLDER, MB, batch_bytes, make_chunk, write_indices

RATIOS = {
    "reads, 2M clips/8 shards": ("2M clips", "8 shards"),
    "reads, 2M clips/pread": ("2M clips", "2M clips, pread"),
    "pread, 2M clips/8 shards": ("2M clips, pread", "8 shards, pread"),
}


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
    indexed = write_epoch_indices(shards, plan)
    shards.close()
    return {
        "index opened, s": opened - start,
        "index opened, MB more": after - before,
        "sample weights, s": weighed - opened,
        "draws of an epoch, s": drawn - weighed,
        "the same by shard, with weights, s": arranged,
        "DALI's index files of an epoch, s": indexed,
    }


def write_epoch_indices(shards: Shards, plan: DrawPlan) -> float:
    """Seconds that the index files of all of an epoch's chunks take, and their removal."""
    config, plans = StreamConfig(kind="dali"), plan.batches(1)
    num_batches = config.dali_buffer_mb * MB // batch_bytes(shards, plan.shapes)
    start = perf_counter()
    while batches := list(islice(plans, num_batches)):
        chunk = make_chunk(shards, batches)
        with tempfile.TemporaryDirectory(dir=INDEX_FOLDER) as folder:
            sizes = chunk.size + TAR_BLOCK
            write_indices(folder, shards.index, chunk.clip_ids, sizes, config.num_threads)
    return perf_counter() - start


def measure_reads(config: ScaleBenchmark, folder: Path, split: Path) -> dict[str, list[float]]:
    """Clips a second of the large split and of one of 8 such shards, ours and bare preads of the same."""
    per_shard = -(-config.num_clips // config.num_shards)
    small = write_sparse_split(folder / "small", 8 * per_shard, 8)
    contestants: dict[str, Callable[[], float]] = {}
    for name, path in (("2M clips", split), ("8 shards", small)):
        shards = open_shards(path)
        draws = SamplingConfig(kind="shuffle", mixup_rate=0, num_draws=config.num_reads)
        plan = DrawPlan(shards, PlanConfig(draws, StreamConfig(), 0, 100, 1056))
        plans = list(plan.batches(1))
        write_headers(shards, plans)
        stream = open_stream(shards, StreamConfig(), plan.shapes, torch.device("cpu"))
        contestants[name] = partial(read_rate, partial(read_all, stream.batches, plans))
        for threads in (2, 4):
            read = bare_pread(shards, plans, StreamConfig().read_ahead + 2, threads)
            contestants[f"{name}, pread, threads={threads}"] = partial(read_rate, read)
    return best_of(interleave(contestants, config.trials), ", threads=")


def read_all(batches: Callable[[Iterator[BatchPlan]], Iterator[Batch]], plans: list[BatchPlan]) -> int:
    """Read what plans name; returns how many clips."""
    return sum(len(batch.clip_ids) for batch in batches(iter(plans)))


def read_rate(read: Callable[[], int]) -> float:
    """Clips a second of one pass."""
    start = perf_counter()
    return read() / (perf_counter() - start)  # read is called first


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
    ratios = {name: paired_ratio(rates[a], rates[b]) for name, (a, b) in RATIOS.items()}
    print_table(
        ["ratio", "median", "p10", "p90"], [[name, *ratio.values()] for name, ratio in ratios.items()]
    )
    record = {
        "benchmark": "scale",
        "ratios": {name: ratio["median"] for name, ratio in ratios.items()},
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
