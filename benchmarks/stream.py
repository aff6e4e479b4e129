"""Clips a second into batches of 1056×128 fbanks: upstream's loader, ours by kind, others', and bare preads.

All in host memory, in one run: float16 and uint8 from the warm page cache, then float16 from the disk, the
cached pages dropped before each trial. Contestants "+ partners" also read a mixup partner for half of their
clips, as PSLA's recipe does; a ratio compares two that read alike, round by round. Bare preads are the
ceiling: into as many batches of memory as indexed keeps, and into one that stays in the processor's cache,
which no loader can use whose consumer keeps a batch while the next is read.
"""

import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from record import paired_ratio, print_table, read_environment, summarise, write_record
from stream_rounds import StreamBenchmark, measure
from synthetic import CLIP_FRAMES_10_S

from psla_fast.errors import exit_on_user_error
from psla_fast.recipe import parse_flags

RATIOS = {  # name: what is divided by what
    "indexed/upstream": ("indexed + partners", "upstream + partners"),
    "indexed/pread": ("indexed", "pread"),
    "indexed/pread + partners": ("indexed + partners", "pread + partners"),
    "indexed/pread, one buffer": ("indexed", "pread, one buffer"),
    "indexed/webloader": ("indexed", "webloader"),
    "indexed/webloader shuffled": ("indexed", "webloader shuffled"),
    "indexed/webloader, reshuffled": ("indexed", "webloader, reshuffled"),
    "indexed/dali": ("indexed", "dali's reader"),
    "indexed/dali padded": ("indexed", "dali's reader, padded"),
    "resident/pread": ("resident", "pread"),
    "dali kind/dali padded": ("dali", "dali's reader, padded"),
    "webdataset kind/webloader, reshuffled": ("webdataset", "webloader, reshuffled"),
    "indexed/pread, uint8": ("indexed, uint8", "pread, uint8"),
    "uint8/float16": ("indexed, uint8", "indexed"),
    "indexed/pread, cold": ("indexed, cold", "pread, cold"),
}


def main() -> None:
    """Measure, print the table, write the record."""
    config = parse_flags(StreamBenchmark, sys.argv[1:], "benchmarks/stream.py")
    environment = read_environment()
    if config.tiny:
        small = {"num_clips": 40, "num_wavs": 4, "batch_size": 10, "upstream_clips": 20, "epochs": 1}
        config = replace(config, trials=2, **small)
    with tempfile.TemporaryDirectory(prefix="psla_fast_stream_") as temporary:
        rates = measure(config, config.data or Path(temporary))
    clips = {name: summarise(values) for name, values in rates.items()}
    ratios: dict[str, Any] = {
        name: paired_ratio(rates[a], rates[b]) for name, (a, b) in RATIOS.items() if a in rates and b in rates
    }
    print_table(
        ["", "clips/s", "p10", "p90"],
        [[name, *(f"{v:.0f}" for v in rate.values())] for name, rate in clips.items()],
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
        "device": "cpu",
        "config": {**asdict(config), "data": str(config.data) if config.data else "temporary"},
        "clip_frames_stored": CLIP_FRAMES_10_S,
        "environment": environment,
    }
    write_record(record, keep=not config.tiny)


if __name__ == "__main__":
    with exit_on_user_error("benchmarks/stream.py"):
        main()
