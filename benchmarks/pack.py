#!/usr/bin/env python3
"""Packing: clips/s of one core for upstream's way, ours and decoding alone; then one worker against two.

Upstream's way is soundfile, torchaudio.functional.resample and its Kaldi fbank ("kernel kept": by
transforms.Resample, which computes its filter once); ours is a whole shard. Clips are 10 s of 44.1 kHz mono.

Where a wav's time goes in ours (ms a clip, one core of an AMD EPYC, 6.4 in all): decode, downmix, checks 1.0;
soxr HQ 1.8; fbank 2.3 (FFT 0.6, mel product 0.4, log 0.2; means, pre-emphasis, window and squares the rest);
float16 0.05; sums for mean and std 0.2; sha256, crc32 and the write 0.5; fsync 0.2; Python 0.3. FLAC and MP3
are bound by their decoders: 5.4 and 6.8.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.pack_contestants import (
    FORMATS,
    decode,
    ours,
    pack_all,
    upstream,
    worker_megabytes,
    write_clips,
)
from benchmarks.record import (
    interleave,
    paired_ratio,
    print_table,
    read_environment,
    summarise,
    write_record,
)
from psla_fast.errors import exit_on_user_error
from psla_fast.recipe import parse_flags


@dataclass(frozen=True)
class PackBenchmark:
    """Measure packing on this machine's CPU."""

    clips: int = 40
    """Clips a round, of each format, in the measures of one core."""
    clips_for_workers: int = 1500
    """Clips of a whole pack by one worker and by two (wav)."""
    trials: int = 7
    """Rounds; medians are reported."""
    tiny: bool = False
    """A run of seconds, for CI; its numbers mean nothing and are not kept."""


def per_second(run: Callable[[], int]) -> float:
    """Time one call that handles clips and returns how many."""
    start = perf_counter()
    return run() / (perf_counter() - start)  # run is called first


def main() -> None:
    """Measure, print the table, write the record."""
    config = parse_flags(PackBenchmark, sys.argv[1:], "benchmarks/pack.py")
    environment = read_environment()
    if config.tiny:
        config = replace(config, clips=2, clips_for_workers=64, trials=1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="psla_fast_pack_") as temporary:
        folder = Path(temporary)
        paths = write_clips(folder, config.clips)
        contestants: dict[str, Callable[[], int]] = {}
        for ending in FORMATS:
            contestants[f"{ending} upstream"] = upstream(paths[ending], keep_kernel=False)
            contestants[f"{ending} upstream, kernel kept"] = upstream(paths[ending], keep_kernel=True)
            contestants[f"{ending} ours"] = ours(paths[ending], folder / f"shard_{ending}")
            contestants[f"{ending} decode"] = decode(paths[ending])
        rates = interleave({name: partial(per_second, c) for name, c in contestants.items()}, config.trials)
        copies = -(-config.clips_for_workers // config.clips)
        packs = {f"pack, {n} workers": pack_all(paths["wav"], copies, n, folder / "packs") for n in (1, 2)}
        rates |= interleave({name: partial(per_second, c) for name, c in packs.items()}, config.trials)
        memory = worker_megabytes()
    clips = {name: summarise(values) for name, values in rates.items()}
    compared = {
        f"{e} ours/{other}": (f"{e} ours", f"{e} {other}")
        for e in FORMATS
        for other in ("upstream", "upstream, kernel kept", "decode")
    }
    compared["two workers/one"] = ("pack, 2 workers", "pack, 1 workers")
    ratios = {name: paired_ratio(rates[a], rates[b]) for name, (a, b) in compared.items()}
    print_table(
        ["", "clips/s", "p10", "p90"], [[n, *(f"{v:.1f}" for v in r.values())] for n, r in clips.items()]
    )
    print()
    print_table(
        ["ratio", "median", "p10", "p90"], [[n, *(f"{v:.3g}" for v in r.values())] for n, r in ratios.items()]
    )
    print(f"\npeak memory of a worker: {memory:.0f} MB")
    record = {
        "benchmark": "pack",
        "ratios": {name: ratio["median"] for name, ratio in ratios.items()},
        "ratio_spread": ratios,
        "compared": compared,
        "clips_per_second": clips,
        "worker_peak_mb": round(memory),
        "device": "cpu",
        "config": asdict(config),
        "environment": environment,
    }
    write_record(record, keep=not config.tiny)


if __name__ == "__main__":
    with exit_on_user_error("benchmarks/pack.py"):
        main()
