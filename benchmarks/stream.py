"""Clips a second into batches of 1056×128 fbanks: upstream's loader, ours, others', and a bare pread loop.

All in warm page cache and in host memory. Contestants "+ partners" also read a mixup partner for half of
their clips, as PSLA's recipe does; a ratio compares two that read alike, round by round.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter

from record import interleave, paired_ratio, print_table, read_environment, summarise, write_record
from stream_contestants import bare_pread, dali, indexed, webdataset
from stream_upstream import upstream
from synthetic import CLIP_FRAMES_10_S, make_shards, make_wavs

from psla_fast.errors import exit_on_user_error
from psla_fast.recipe import parse_flags
from psla_fast.sampling import SamplingConfig
from psla_fast.stream import DrawPlan, PlanConfig, StreamConfig

RATIOS = {  # name: what is divided by what
    "indexed/upstream": ("indexed + partners", "upstream + partners"),
    "indexed/pread": ("indexed", "pread"),
    "indexed/pread + partners": ("indexed + partners", "pread + partners"),
    "indexed/pread, two buffers": ("indexed", "pread, two buffers"),
    "indexed/webloader": ("indexed", "webloader"),
    "indexed/webloader shuffled": ("indexed", "webloader shuffled"),
    "indexed/webloader, reshuffled": ("indexed", "webloader, reshuffled"),
    "indexed/webdataset": ("indexed", "webdataset"),
    "indexed/dali": ("indexed", "dali"),
    "indexed/dali padded": ("indexed", "dali padded"),
}


@dataclass(frozen=True)
class StreamBenchmark:
    """Measure the ways to read training batches, all in one run, in turn."""

    data: Path | None = None
    """Folder for the synthetic data, reused where it is there; the default is a temporary one."""
    num_clips: int = 2000
    """Distinct clips of 10 s in the shards, 256 kB each."""
    num_wavs: int = 300
    """Distinct wavs of 10 s, read by upstream's way."""
    batch_size: int = 100
    """Clips of a batch."""
    clip_frames: int = 1056
    """Frames of a batch."""
    trials: int = 7
    """Rounds, after one to warm up."""
    epochs: int = 4
    """Passes over the shards in a trial (WebDataset: one)."""
    upstream_clips: int = 400
    """Clips in a trial of upstream's way."""
    tiny: bool = False
    """A run of seconds, for CI; its numbers mean nothing and are not kept."""
    stream: StreamConfig = StreamConfig()

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.trials < 1 or self.num_clips < self.batch_size:
            raise ValueError("--trials must be 1 or more, and --num-clips at least --batch-size.")


def clips_per_second(read: Callable[[], int]) -> float:
    """Time one call that reads clips and returns how many."""
    start = perf_counter()
    return read() / (perf_counter() - start)  # read is called first


def measure(config: StreamBenchmark, folder: Path) -> tuple[dict[str, list[float]], float]:
    """Run all contestants; return their clips/s by round, and the rows read per clip with partners."""
    with make_shards(folder / f"shards_{config.num_clips}", config.num_clips) as shards:
        wavs = make_wavs(folder / "wavs", config.num_wavs, shards.fbank_config.sample_rate)
        size = (config.batch_size, config.clip_frames)
        plans = {}
        for suffix, mixup_rate in (("", 0.0), (" + partners", SamplingConfig().mixup_rate)):
            draws = PlanConfig(SamplingConfig(mixup_rate=mixup_rate), config.stream, 0, *size)
            plan = DrawPlan(shards, draws)
            plans[suffix] = [batch for epoch in range(config.epochs) for batch in plan.batches(epoch)]
        contestants = {"upstream + partners": upstream(wavs, config.upstream_clips, *size)}
        for suffix, batches in plans.items():
            contestants[f"indexed{suffix}"] = indexed(shards, batches, config.stream, *size)
            for num_threads in sorted({1, 2, config.stream.num_threads}):
                name = f"pread{suffix}, threads={num_threads}"
                contestants[name] = bare_pread(shards, batches, num_threads, 1, config.clip_frames)
        contestants["pread, two buffers"] = bare_pread(shards, plans[""], 2, 2, config.clip_frames)
        contestants["webdataset"] = webdataset(shards, 0, "none", *size)
        contestants["webloader"] = webdataset(shards, 2, "none", *size)
        contestants["webloader shuffled"] = webdataset(shards, 2, "clips", *size)
        contestants["webloader, reshuffled"] = webdataset(shards, 2, "batches too", *size)
        try:
            contestants["dali"] = dali(shards, False, len(plans[""]), *size)
            contestants["dali padded"] = dali(shards, True, len(plans[""]), *size)
        except ImportError:
            print("DALI is not installed: left out.")
        timed = {name: partial(clips_per_second, read) for name, read in contestants.items()}
        rates = interleave(timed, config.trials)
    num_rows = sum(len(plan.clip_ids) + (plan.partner_ids >= 0).sum() for plan in plans[" + partners"])
    for suffix in plans:  # the ceiling is the best number of threads
        tried = [name for name in rates if name.startswith(f"pread{suffix}, threads=")]
        rates[f"pread{suffix}"] = rates[max(tried, key=lambda name: summarise(rates[name])["median"])]
    return rates, float(num_rows / sum(len(plan.clip_ids) for plan in plans[" + partners"]))


def main() -> None:
    """Measure, print the table, write the record."""
    config = parse_flags(StreamBenchmark, sys.argv[1:], "benchmarks/stream.py")
    environment = read_environment()
    if config.tiny:
        small = {"num_clips": 40, "num_wavs": 4, "batch_size": 10, "upstream_clips": 20, "epochs": 1}
        config = replace(config, trials=2, **small)
    with tempfile.TemporaryDirectory(prefix="psla_fast_stream_") as temporary:
        rates, rows_per_clip = measure(config, config.data or Path(temporary))
    clips = {name: summarise(values) for name, values in rates.items()}
    rows = {name: c["median"] * (rows_per_clip if "partners" in name else 1) for name, c in clips.items()}
    ratios = {
        name: paired_ratio(rates[a], rates[b]) for name, (a, b) in RATIOS.items() if a in rates and b in rates
    }
    print_table(
        ["", "clips/s", "p10", "p90", "rows/s"],
        [[name, *(f"{v:.0f}" for v in rate.values()), f"{rows[name]:.0f}"] for name, rate in clips.items()],
    )
    print()
    print_table(
        ["ratio", "median", "p10", "p90"],
        [[name, *(f"{v:.3g}" for v in ratio.values())] for name, ratio in ratios.items()],
    )
    record = {
        "benchmark": "stream",
        "ratios": {name: ratio["median"] for name, ratio in ratios.items()},
        "ratio_spread": ratios,
        "compared": {name: RATIOS[name] for name in ratios},
        "clips_per_second": clips,
        "rows_per_second": {name: float(f"{value:.4g}") for name, value in rows.items()},
        "rows_per_clip_with_partners": rows_per_clip,
        "device": "cpu",
        "config": {**asdict(config), "data": str(config.data) if config.data else "temporary"},
        "clip_frames_stored": CLIP_FRAMES_10_S,
        "environment": environment,
    }
    write_record(record, keep=not config.tiny)


if __name__ == "__main__":
    with exit_on_user_error("benchmarks/stream.py"):
        main()
