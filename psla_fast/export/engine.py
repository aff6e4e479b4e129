"""The way of an export: a checkpoint is read, turned into a format, written, read again and compared."""

import os
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from psla_fast.checkpoint import HUB_CONFIG, HUB_WEIGHTS, Checkpoint, load_checkpoint, save_safetensors
from psla_fast.export.check import Difference, Run, compare, score_padded
from psla_fast.export.hub_folder import README, save_hub_folder
from psla_fast.export.int8 import quantise
from psla_fast.export.onnx_file import build_onnx, open_onnx
from psla_fast.export.program import input_names, load_program, save_program, trace
from psla_fast.export.scorer import build_scorer
from psla_fast.files import replacing

Format = Literal["safetensors", "hub", "onnx", "torch-export", "int8"]
SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2", "int8": ".int8.onnx"}
LARGEST = 1e-4  # difference of a score from the checkpoint's
LARGEST_MEAN_OF_INT8 = 0.03


class Exported(NamedTuple):
    """What was written, the config last; how far its scores are from the checkpoint's on the check's sounds.

    runs: functions of the file's inputs in their order, its own under the format's name; besides int8's
    that of the float32 ONNX it was made of.
    """

    files: tuple[Path, ...]
    difference: Difference
    runs: dict[str, Run]


def export_checkpoint(path: Path, kind: Format, out: Path, with_fbank: bool = False) -> Exported:
    """Export a checkpoint; with_fbank puts the log-mels' computation into the file: it takes waveforms.

    Raises ValueError for an `out` of another format or that is the checkpoint itself, a network that the
    format can't hold, and where the scores of what was written are too far from the checkpoint's; then no
    file, or no config, is left.
    """
    check_target(kind, out, with_fbank)
    _check_source(path, kind, out)
    checkpoint = load_checkpoint(path)
    if kind in ("safetensors", "hub"):
        return _export_weights(checkpoint, kind, out)
    scorer = build_scorer(checkpoint, with_fbank)
    program = trace(scorer)
    runs: dict[str, Run] = {}
    with replacing(out) as temporary:
        if kind == "torch-export":
            save_program(program, temporary)
            runs[kind] = load_program(temporary)
        else:
            model = build_onnx(program, input_names(scorer), checkpoint)
            if kind == "int8":
                runs["onnx float32"] = open_onnx(model.SerializeToString())
                model = quantise(model)
            temporary.write_bytes(model.SerializeToString())
            runs[kind] = open_onnx(temporary)
        difference = compare(runs[kind], checkpoint, with_fbank)
        _check_difference(difference, kind, out)
    return Exported((out,), difference, runs)


def check_target(kind: Format, out: Path, with_fbank: bool) -> None:
    """Raise ValueError where `out` can't be of that format."""
    if with_fbank and kind in ("safetensors", "hub"):
        raise ValueError(f"--with-fbank is for onnx, int8 and torch-export: {kind} holds weights alone.")
    if kind == "hub":
        if out.is_file():
            raise ValueError(f"--out {out} is a file. Give a folder, for --format hub.")
    elif not out.name.endswith(SUFFIXES[kind]) or out.is_dir():
        raise ValueError(f"--out {out} can't be of --format {kind}. Give a file NAME{SUFFIXES[kind]}.")
    elif kind == "onnx" and out.name.endswith(SUFFIXES["int8"]):
        raise ValueError(f"--out {out} names int8, and --format onnx is float32. Give another name.")
    existing = next(folder for folder in out.absolute().parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"--out {out} can't be written: {existing} is no folder one may write to.")


def _export_weights(checkpoint: Checkpoint, kind: Format, out: Path) -> Exported:
    contents = checkpoint.card, checkpoint.state, checkpoint.epoch
    weights, config = _weights_and_config(out, is_folder=kind == "hub")
    if kind == "hub":
        save_hub_folder(out, *contents)
    else:
        save_safetensors(weights, config, *contents)
    model, spec = load_checkpoint(out).build(), checkpoint.card.input

    def run(fbank: Tensor, num_frames: Tensor | None = None) -> Tensor:
        every = torch.full((len(fbank),), fbank.shape[1])
        return score_padded(model, fbank, every if num_frames is None else num_frames, spec)

    difference = compare(run, checkpoint, with_fbank=False)
    try:
        _check_difference(difference, kind, out)
    except ValueError:
        config.unlink()
        raise
    files = (out / README, weights, config) if kind == "hub" else (weights, config)
    return Exported(files, difference, {kind: run})


def _weights_and_config(path: Path, is_folder: bool) -> tuple[Path, Path]:
    if is_folder:
        return path / HUB_WEIGHTS, path / HUB_CONFIG
    return path, path.with_suffix(".json")


def _check_source(path: Path, kind: Format, out: Path) -> None:
    """Raise ValueError where an export would replace the files it is made of."""
    source, target = {path}, {out}
    if path.is_dir() or path.suffix == ".safetensors":
        source = set(_weights_and_config(path, path.is_dir()))
    if kind in ("safetensors", "hub"):
        target = set(_weights_and_config(out, kind == "hub"))
    if {file.resolve() for file in source} & {file.resolve() for file in target}:
        raise ValueError(f"--out {out} is the checkpoint itself. Give another name.")


def _check_difference(difference: Difference, kind: Format, out: Path) -> None:
    what, got, limit = "largest", difference.largest, LARGEST
    if kind == "int8":
        what, got, limit = "mean", difference.mean, LARGEST_MEAN_OF_INT8
    if not got <= limit:  # of NaN nothing is true
        written = f"{out} was not written"
        if kind in ("safetensors", "hub"):
            weights, config = _weights_and_config(out, kind == "hub")
            written = f"{weights} was written, but not {config.name}, so that nothing loads it"
        raise ValueError(
            f"{written}: the {what} difference of its scores from the checkpoint's is {got:.2g}, "
            f"above {limit:g}. Export another format."
        )
