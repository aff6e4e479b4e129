#!/usr/bin/env python3
"""What int8 gains on one CPU core: clips a second of exported models, by the processor time that they take.

Contestants, on the same random log-mels and weights: torch in float32 and bf16, onnxruntime in float32,
quantize_dynamic as onnxruntime has it (convolutions as ConvInteger), and ours (large products alone). What it
costs in mAP is printed by `psla-fast export CKPT --format int8 --out FILE.int8.onnx --data SHARDS/eval`.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from record import interleave, paired_ratio, print_table, read_environment, summarise, write_record
from torch import Tensor

from psla_fast.augment import InputSpec
from psla_fast.checkpoint import Card, Checkpoint
from psla_fast.classes import Classes
from psla_fast.errors import exit_on_user_error
from psla_fast.export.int8 import quantise
from psla_fast.export.measure import checkpoint_runs
from psla_fast.export.onnx_file import build_onnx, open_onnx
from psla_fast.export.program import trace
from psla_fast.export.scorer import build_scorer
from psla_fast.fbank import PSLA_MEAN, PSLA_STD, FbankConfig
from psla_fast.models import ModelConfig, build_model
from psla_fast.recipe import parse_flags


@dataclass(frozen=True)
class Int8:
    """Compare int8 with float32 on one core."""

    model: str = "efficientnet_b2"
    """Network, its weights random."""
    clip_frames: int = 1056
    """Frames of a clip."""
    batch_size: int = 1
    """Clips scored at once."""
    clips: int = 8
    """Clips scored in a trial."""
    trials: int = 5
    """Rounds in which all contestants take turns."""
    tiny: bool = False
    """Run through in seconds; the numbers mean nothing and no record is kept."""


def make_checkpoint(config: Int8) -> Checkpoint:
    """Build the network, with AudioSet's number of classes and 4 heads."""
    torch.manual_seed(0)
    model_config, num_classes = ModelConfig(name=config.model), 527
    names = tuple(f"class {index}" for index in range(num_classes))
    spec = InputSpec(config.clip_frames, 128, 0.0, PSLA_MEAN, PSLA_STD)
    card = Card(model_config, Classes(names, names), spec, FbankConfig())
    return Checkpoint(card, build_model(model_config, num_classes).state_dict(), 0, {})


def quantise_as_it_comes(content: bytes) -> bytes:
    """Quantise all that quantize_dynamic does without settings, but unsigned: signed is slower."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(prefix="psla_fast_int8_") as folder:
        path = Path(folder) / "model.onnx"
        quantize_dynamic(onnx.load_from_string(content), path, weight_type=QuantType.QUInt8)
        return path.read_bytes()


def build_contestants(config: Int8) -> tuple[dict[str, Callable[[], float]], dict[str, float]]:
    """Name functions that score the clips and return clips a second, and the ONNX files' sizes in MB."""
    checkpoint = make_checkpoint(config)
    model = build_onnx(trace(build_scorer(checkpoint, with_fbank=False)), ["fbank"], checkpoint)
    plain = model.SerializeToString()
    files = {"onnx float32": plain, "quantize_dynamic": quantise_as_it_comes(plain)}
    files["int8"] = quantise(model).SerializeToString()
    num_frames = torch.full((config.batch_size,), config.clip_frames)
    shape = (config.batch_size, config.clip_frames, 128)
    fbank = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * PSLA_STD + PSLA_MEAN

    def timed(run: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], float]:
        def score() -> float:
            start = time.process_time()
            for _ in range(max(1, config.clips // config.batch_size)):
                run(*inputs)
            return (
                max(1, config.clips // config.batch_size) * config.batch_size / (time.process_time() - start)
            )

        return score

    contestants = {name: timed(run, fbank, num_frames) for name, run in checkpoint_runs(checkpoint).items()}
    contestants |= {name: timed(open_onnx(content, 1), fbank) for name, content in files.items()}
    return contestants, {name: len(content) / 1e6 for name, content in files.items()}


def main() -> None:
    """Measure, print the table, write the record."""
    config = parse_flags(Int8, sys.argv[1:], "benchmarks/int8.py")
    if config.tiny:
        config = Int8("efficientnet_b0", clip_frames=64, clips=1, trials=2, tiny=True)
    environment = read_environment()
    torch.set_num_threads(1)
    contestants, sizes = build_contestants(config)
    rates = interleave(contestants, config.trials)
    ratios = {name: paired_ratio(values, rates["onnx float32"]) for name, values in rates.items()}
    print_table(
        [f"{config.model}, {config.batch_size} × {config.clip_frames}, 1 core", "clips/s", "p10", "p90"]
        + ["of onnx float32", "MB"],
        [
            [name, *summarise(values).values(), ratios[name]["median"], f"{sizes.get(name, 0):.1f}"]
            for name, values in rates.items()
        ],
    )
    record = {
        "benchmark": "int8",
        "ratios": {f"{name}/onnx float32": ratio["median"] for name, ratio in ratios.items()},
        "clips_per_second": {name: summarise(values) for name, values in rates.items()},
        "megabytes": sizes,
        "config": asdict(config),
        "environment": environment,
    }
    write_record(record, keep=not config.tiny)


if __name__ == "__main__":
    with exit_on_user_error("benchmarks/int8.py"):
        main()
