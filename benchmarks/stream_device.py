"""Streams to the device: GB/s by kind, and what a real training step waits for them.

On a GPU where there is one, else in host memory. A batch counts as there when the device's own work on it is
done. The training step is the trainer's (step_ours.py), with partners; its rate on one batch that lies on the
device already is the ceiling.
"""

import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from record import interleave, paired_ratio, print_table, read_environment, summarise, write_record
from step_ours import build_batch, build_our_step
from stream_on_device import read_all, synchronize, train
from stream_ours import make_plan
from synthetic import make_shards

from psla_fast.errors import exit_on_user_error
from psla_fast.evaluate import resolve_precision
from psla_fast.models import ModelConfig
from psla_fast.recipe import parse_flags
from psla_fast.shards import Shards
from psla_fast.stream import BatchPlan, Stream, StreamConfig, open_stream

KINDS = {
    "indexed": StreamConfig(),
    "resident": StreamConfig(kind="resident"),
    "resident, host": StreamConfig(kind="resident", place="host"),
    "dali": StreamConfig(kind="dali"),
    "webdataset": StreamConfig(kind="webdataset"),
}


@dataclass(frozen=True)
class DeviceBenchmark:
    """Measure the ways to the device."""

    num_clips: int = 4000
    """Distinct clips of 10 s in the shards, 256 kB each."""
    batch_size: int = 0
    """Clips of a batch; 0: 100 on a GPU, 8 on a CPU."""
    clip_frames: int = 1056
    """Frames of a batch."""
    model: str = "efficientnet_b2"
    """The step's model."""
    compile: str = "none"
    """none, default or max, as in training."""
    steps: int = 40
    """Training steps of a trial; a stream alone goes over all clips."""
    trials: int = 5
    """Rounds, after one to warm up."""
    tiny: bool = False
    """A run of seconds, for CI; its numbers mean nothing and are not kept."""


def measure(
    config: DeviceBenchmark, shards: Shards, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, list[float]]]:
    """GB/s by kind, clips/s of training steps by kind and on one batch, and the shares waited, by round."""
    precision = resolve_precision("auto", device)
    step = build_our_step(
        ModelConfig(name=config.model), device, precision, config.compile, (config.clip_frames,)
    )
    size = config.batch_size, config.clip_frames
    waits: dict[str, list[float]] = {}
    streams, steps = {}, {}

    def train_on(kind: str, stream: Stream, plans: list[BatchPlan]) -> float:
        rate, waited = train(step, stream.batches(iter(plans)), device)
        waits.setdefault(kind, []).append(waited)
        return rate

    def train_on_one() -> float:
        start = perf_counter()
        for _ in range(config.steps):
            step(one)
        synchronize(device)
        return config.steps * config.batch_size / (perf_counter() - start)

    for kind, stream_config in KINDS.items():
        plan, plans = make_plan(shards, stream_config, 0.5, 1, *size)
        try:
            stream = open_stream(shards, stream_config, plan.shapes, device)
        except ValueError as error:
            print(f"{kind} is left out: {error}")
            continue
        streams[kind] = partial(read_all, stream, plans, device)
        steps[kind] = partial(train_on, kind, stream, plans[: config.steps])
    one = build_batch(device, *size)
    steps["one batch on the device"] = train_on_one
    return interleave(streams, config.trials), interleave(steps, config.trials), waits


def main() -> None:
    """Measure, print the tables, write the record."""
    config = parse_flags(DeviceBenchmark, sys.argv[1:], "benchmarks/stream_device.py")
    environment = read_environment()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = replace(config, batch_size=config.batch_size or (100 if device.type == "cuda" else 8))
    if config.tiny:
        small = {"num_clips": 40, "batch_size": 4, "clip_frames": 64, "steps": 2, "trials": 2}
        config = replace(config, model="efficientnet_b0", **small)
    with (
        tempfile.TemporaryDirectory(prefix="psla_fast_device_") as temporary,
        make_shards(Path(temporary), config.num_clips) as shards,
    ):
        rates, steps, waits = measure(config, shards, device)
    print_table(
        [f"to {device.type}, stored rows", "GB/s", "p10", "p90"],
        [[kind, *summarise(values).values()] for kind, values in rates.items()],
    )
    ceiling = steps["one batch on the device"]
    print_table(
        [f"training {config.model}", "clips/s", "of one batch's", "waited"],
        [
            [kind, summarise(values)["median"], f"{paired_ratio(values, ceiling)['median']:.1%}"]
            + [f"{summarise(waits[kind][1:])['median']:.2%}" if kind in waits else "–"]
            for kind, values in steps.items()
        ],
    )
    record = {
        "benchmark": "stream_device",
        "ratios": {f"{kind}/one batch": paired_ratio(steps[kind], ceiling)["median"] for kind in waits},
        "gb_per_second": {kind: summarise(values) for kind, values in rates.items()},
        "clips_per_second": {kind: summarise(values) for kind, values in steps.items()},
        "waited": {kind: summarise(values[1:]) for kind, values in waits.items()},
        "device": device.type,
        "config": asdict(config),
        "environment": environment,
    }
    write_record(record, keep=not config.tiny)


if __name__ == "__main__":
    with exit_on_user_error("benchmarks/stream_device.py"):
        main()
