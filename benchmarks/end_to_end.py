"""Training from shards, against the same training on a batch that lies on the device already.

The trainer's own epochs, one on each kind of stream in turn, over the same steps: draws, reading, partners,
augmentation, log lines and the checks of a run are in all of them.
"""

import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from record import interleave, paired_ratio, print_table, read_environment, summarise, write_record
from step_ours import build_batch
from stream_on_device import SyntheticStream, synchronize
from synthetic import make_shards

from psla_fast.distributed import World, start_world
from psla_fast.errors import exit_on_user_error
from psla_fast.models import ModelConfig
from psla_fast.recipe import parse_flags
from psla_fast.sampling import SamplingConfig
from psla_fast.stream import Stream, StreamConfig, open_stream
from psla_fast.train.compiling import CompileMode
from psla_fast.train.config import DataConfig, InputConfig, TrainConfig
from psla_fast.train.loop import Trainer
from psla_fast.train.optim import OptimConfig

SYNTHETIC = "synthetic, on the device"
KINDS = {
    SYNTHETIC: StreamConfig(),
    "indexed": StreamConfig(),
    "resident": StreamConfig(kind="resident"),
    "dali": StreamConfig(kind="dali"),
    "webdataset": StreamConfig(kind="webdataset"),
}


@dataclass(frozen=True)
class EndToEnd:
    """Measure what training from shards costs."""

    num_clips: int = 4000
    """Distinct clips of 10 s in the shards, 256 kB each."""
    draws: int = 0
    """Clips of an epoch, a trial; 0: 20,000 on a GPU, 160 on a CPU."""
    batch_size: int = 0
    """Clips of a batch; 0: 100 on a GPU, 8 on a CPU."""
    clip_frames: int = 1056
    """Frames of a batch."""
    model: str = "efficientnet_b2"
    """The model."""
    compile: CompileMode = "none"
    """As in training."""
    trials: int = 5
    """Rounds, after one to warm up."""
    tiny: bool = False
    """A run of seconds, for CI; its numbers mean nothing and are not kept."""


def measure(config: EndToEnd, folder: Path, world: World) -> dict[str, list[float]]:
    """Clips a second of whole epochs by kind and round."""
    runs = {}
    for kind, stream_config in KINDS.items():
        train = TrainConfig(
            DataConfig(str(folder), val="train", eval="train"),
            folder / "runs" / kind,
            InputConfig(clip_frames=config.clip_frames),
            SamplingConfig(kind="balanced", num_draws=config.draws),
            stream_config,
            model=ModelConfig(config.model),
            optim=OptimConfig(batch_size=config.batch_size),
            compile=config.compile,
        )
        trainer = Trainer(train, world)
        stream: Stream = SyntheticStream(build_batch(world.device, config.batch_size, config.clip_frames))
        if kind != SYNTHETIC:
            try:
                stream = open_stream(trainer.train, stream_config, trainer.plan.shapes, world.device)
            except ValueError as error:
                print(f"{kind} is left out: {error}")
                continue
        runs[kind] = partial(run_epoch, trainer, stream)
    return interleave(runs, config.trials)


def run_epoch(trainer: Trainer, stream: Stream) -> float:
    """Train the first epoch, once more; returns its clips a second."""
    trainer.state.step, trainer.state.loss_sum, trainer.state.skipped = 0, 0.0, 0
    start = perf_counter()
    trainer.progress.start_epoch(1, trainer.plan.batch_sizes(1), 0)
    trainer.train_epoch(1, trainer.progress.timed(stream.batches(trainer.plan.batches(1))))
    synchronize(trainer.world.device)
    return float(trainer.plan.batch_sizes(1).sum()) / (perf_counter() - start)


def main() -> None:
    """Measure, print the table, write the record."""
    config = parse_flags(EndToEnd, sys.argv[1:], "benchmarks/end_to_end.py")
    environment, world = read_environment(), start_world("auto")
    cuda = world.device.type == "cuda"
    config = replace(config, batch_size=config.batch_size or (100 if cuda else 8))
    config = replace(config, draws=config.draws or (20_000 if cuda else 160))
    if config.tiny:
        small = {"num_clips": 40, "draws": 16, "batch_size": 4, "clip_frames": 64, "trials": 2}
        config = replace(config, model="efficientnet_b0", **small)
    with tempfile.TemporaryDirectory(prefix="psla_fast_end_to_end_") as temporary:
        folder = Path(temporary)
        make_shards(folder, config.num_clips).close()
        rates = measure(config, folder, world)
    device = torch.cuda.get_device_name() if cuda else "cpu"
    header = [
        f"{config.model}, {config.batch_size} × {config.clip_frames}, {device}",
        "clips/s",
        "p10",
        "p90",
    ]
    shares = {kind: paired_ratio(values, rates[SYNTHETIC]) for kind, values in rates.items()}
    print_table(
        [*header, "of synthetic"],
        [
            [kind, *summarise(values).values(), f"{shares[kind]['median']:.1%}"]
            for kind, values in rates.items()
        ],
    )
    record = {
        "benchmark": "end_to_end",
        "ratios": {
            f"{kind}/synthetic": share["median"] for kind, share in shares.items() if kind != SYNTHETIC
        },
        "clips_per_second": {kind: summarise(values) for kind, values in rates.items()},
        "device": world.device.type,
        "config": asdict(config),
        "environment": environment,
    }
    write_record(record, keep=not config.tiny)


if __name__ == "__main__":
    with exit_on_user_error("benchmarks/end_to_end.py"):
        main()
