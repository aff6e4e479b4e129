"""The rounds of benchmarks/stream.py: who takes part, and their clips a second by round."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter

from record import interleave
from stream_contestants import dali, webdataset
from stream_ours import bare_pread, best_of, drop_cached, first_pass, make_plan, ours
from stream_upstream import upstream
from synthetic import make_shards, make_wavs

from psla_fast.shards import Shards
from psla_fast.stream import StreamConfig

THREADS = (1, 2, 4)
Contestants = dict[str, Callable[[], int]]


@dataclass(frozen=True)
class StreamBenchmark:
    """Measure the ways to read training batches, all in one run, in turn."""

    data: Path | None = None
    """Folder for the synthetic data, reused where it is there; the default is a temporary one."""
    num_clips: int = 2000
    """Distinct clips of 10 s in the shards, 256 kB each as float16."""
    num_wavs: int = 300
    """Distinct wavs of 10 s, read by upstream's way."""
    batch_size: int = 100
    """Clips of a batch."""
    clip_frames: int = 1056
    """Frames of a batch."""
    trials: int = 7
    """Rounds, after one to warm up."""
    epochs: int = 4
    """Passes over the shards in a trial (WebDataset and cold reads: one)."""
    upstream_clips: int = 400
    """Clips in a trial of upstream's way."""
    tiny: bool = False
    """A run of seconds, for CI; its numbers mean nothing and are not kept."""
    stream: StreamConfig = StreamConfig()

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.trials < 1 or self.num_clips < self.batch_size:
            raise ValueError("--trials must be 1 or more, and --num-clips at least --batch-size.")


def clips_per_second(read: Callable[[], int], prepare: Callable[[], None]) -> float:
    """Time one call that reads clips and returns how many."""
    prepare()
    start = perf_counter()
    return read() / (perf_counter() - start)  # read is called first


def list_warm(config: StreamBenchmark, shards: Shards, wavs: list[Path]) -> Contestants:
    """Everybody, on float16."""
    size = (config.batch_size, config.clip_frames)
    found: Contestants = {"upstream + partners": upstream(wavs, config.upstream_clips, *size)}
    for suffix, rate in (("", 0.0), (" + partners", 0.5)):
        found |= list_preads(config, shards, suffix, rate)
        for kind in ("indexed", "resident", "dali", "webdataset"):
            stream = replace(config.stream, kind=kind)
            try:
                found[f"{kind}{suffix}"] = ours(shards, stream, rate, config.epochs, *size)
            except ValueError as error:
                print(f"{kind} is left out: {error}")
    plans = make_plan(shards, StreamConfig(), 0.0, config.epochs, *size)[1]
    found |= {f"pread, one buffer, threads={n}": bare_pread(shards, plans, 1, n) for n in THREADS}
    found["webloader"] = webdataset(shards, "none", *size)
    found["webloader shuffled"] = webdataset(shards, "clips", *size)
    found["webloader, reshuffled"] = webdataset(shards, "batches too", *size)
    if "dali" in found:
        num_batches = config.epochs * (len(shards) // config.batch_size)
        found["dali's reader"] = dali(shards, False, num_batches, *size)
        found["dali's reader, padded"] = dali(shards, True, num_batches, *size)
    return found


def list_preads(
    config: StreamBenchmark, shards: Shards, suffix: str, rate: float, epochs: int = 0
) -> Contestants:
    """Bare preads by number of threads, into as many batches of memory as indexed keeps."""
    num_epochs, num_buffers = epochs or config.epochs, config.stream.read_ahead + 2
    plans = make_plan(shards, StreamConfig(), rate, num_epochs, config.batch_size, config.clip_frames)[1]
    return {f"pread{suffix}, threads={n}": bare_pread(shards, plans, num_buffers, n) for n in THREADS}


def measure(config: StreamBenchmark, folder: Path) -> dict[str, list[float]]:
    """Run all contestants; returns their clips/s by round."""
    size, rates = (config.batch_size, config.clip_frames), {}
    with (
        make_shards(folder / f"shards_{config.num_clips}", config.num_clips) as shards,
        make_shards(folder / f"uint8_{config.num_clips}", config.num_clips, "uint8") as small,
    ):
        wavs = make_wavs(folder / "wavs", config.num_wavs, shards.fbank_config.sample_rate)
        warm = list_warm(config, shards, wavs)
        warm["indexed, uint8"] = ours(small, config.stream, 0.0, config.epochs, *size)
        warm |= list_preads(config, small, ", uint8", 0.0)
        cold = list_preads(config, shards, ", cold", 0.0, epochs=1)
        cold["indexed, cold"] = first_pass(shards, config.stream, 0.0, *size)
        for contestants, prepare in ((warm, lambda: None), (cold, partial(drop_cached, shards))):
            timed = {name: partial(clips_per_second, read, prepare) for name, read in contestants.items()}
            rates |= interleave(timed, config.trials)
    return best_of(rates, ", threads=")
