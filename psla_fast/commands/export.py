"""The command `export`: a checkpoint -> safetensors, the Hub's layout, ONNX, torch.export, int8 ONNX."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from psla_fast.export.engine import Exported, Format
from psla_fast.recipe import parse_flags


@dataclass(frozen=True)
class ExportCommand:
    """Write a checkpoint's model in another format, read it again and compare its scores."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CKPT")]
    """A file of RUN/checkpoints, FILE.safetensors, or a folder of the Hub."""
    format: Format
    """safetensors: weights, with their card beside them as FILE.json; hub: the same as a folder that
    from_pretrained reads; onnx; torch-export: a program (.pt2); int8: ONNX whose products are of 8-bit
    integers, for CPUs."""
    out: Path
    """File or, for hub, folder to write: NAME.safetensors, NAME.onnx, NAME.pt2, NAME.int8.onnx."""
    with_fbank: bool = False
    """onnx, torch-export, int8: the file computes the log-mels itself, and takes waveforms of any length."""
    data: str = ""
    """onnx, torch-export, int8: a packed split, for instance SHARDS/eval, on which mAP and clips a second
    are measured before and after."""
    batch_size: int = 16
    """Clips scored at once for --data, 1 or more."""


def export(arguments: list[str]) -> None:
    """Export a checkpoint, and say what was written and how far its scores are from the checkpoint's."""
    command = parse_flags(ExportCommand, arguments, "psla-fast export")
    from psla_fast.checkpoint import load_checkpoint
    from psla_fast.evaluate import check_compatible
    from psla_fast.export import export_checkpoint
    from psla_fast.shards import open_shards

    if command.batch_size < 1:
        raise ValueError(f"--batch-size is {command.batch_size}; give 1 or more.")
    if command.batch_size != ExportCommand.batch_size and not command.data:
        raise ValueError(
            "--batch-size is for --data, which measures. Give --data SHARDS/eval, or leave it out."
        )
    if command.data:
        if command.format in ("safetensors", "hub") or command.with_fbank:
            raise ValueError(
                "--data measures onnx, torch-export and int8 that take log-mels, as shards hold them. Leave "
                "out --data or --with-fbank, or give another --format."
            )
        with open_shards(command.data) as shards:
            check_compatible(load_checkpoint(command.checkpoint).card, shards, command.checkpoint)
    exported = export_checkpoint(command.checkpoint, command.format, command.out, command.with_fbank)
    for path in exported.files:
        content = path.read_bytes()
        print(f"{path}  {len(content):,} bytes  sha256 {hashlib.sha256(content).hexdigest()}")
    largest, mean = exported.difference
    print(
        f"scores differ from the checkpoint's by {largest:.2g} at most, {mean:.2g} on average, over sounds "
        "made for the check"
    )
    if command.data:
        _measure(command, exported)


def _measure(command: ExportCommand, exported: Exported) -> None:
    """Print mAP, AUC and clips a second: of torch, of float32 ONNX beside int8, and of what was exported."""
    from psla_fast.checkpoint import load_checkpoint
    from psla_fast.export.measure import ROUNDS, checkpoint_runs, measure, with_lengths
    from psla_fast.shards import open_shards

    checkpoint = load_checkpoint(command.checkpoint)
    runs = checkpoint_runs(checkpoint)
    runs |= {name: with_lengths(run, checkpoint.card) for name, run in exported.runs.items()}
    with open_shards(command.data) as shards:
        results = measure(runs, shards, checkpoint.card.input, command.batch_size)
    before_name = "onnx float32" if command.format == "int8" else "torch float32"
    before, after = results[before_name], results[command.format]
    sizes = list(after.clips_per_second)
    print(f"{'':<14}      mAP       AUC" + "".join(f"{f'clips/s by {size}':>15}" for size in sizes))
    for name, found in results.items():
        speeds = "".join(f"{rate:>15.1f}" for rate in found.clips_per_second.values())
        print(f"{name:<14} {found.metrics.mean_ap:.6f}  {found.metrics.mean_auc:.6f}{speeds}")
    gains = (f"{after.clips_per_second[n] / before.clips_per_second[n]:.2f} by {n}" for n in sizes)
    print(
        f"{command.format} against {before_name}: mAP {after.metrics.mean_ap - before.metrics.mean_ap:+.4f}, "
        f"times the speed {', '.join(gains)} (medians of {ROUNDS} rounds)"
    )
