"""Programs: a scorer -> torch.export's graph with any number of clips and any length, and its file."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from psla_fast.export.scorer import FbankScorer, WaveformScorer

Scorer = FbankScorer | WaveformScorer


def input_names(scorer: Scorer) -> list[str]:
    """Name what a scorer's file takes: `waveform`, or `fbank` and, with `mask_padding`, `num_frames`."""
    if isinstance(scorer, WaveformScorer):
        return ["waveform"]
    return ["fbank", "num_frames"] if scorer.masks_padding else ["fbank"]


def trace(scorer: Scorer) -> ExportedProgram:
    """Turn a scorer into a graph; batch, and frames or samples, stay open.

    Raises ValueError for a model that can't be: one whose Python depends on values or sizes.
    """
    batch = Dim("batch")
    if isinstance(scorer, WaveformScorer):
        samples = 2 * scorer.config.sample_rate + 17  # of no meaning, as all of an example's sizes
        example: tuple[Tensor, ...] = (torch.linspace(-0.5, 0.5, 2 * samples).view(2, samples),)
        shapes: dict[str, dict[int, Dim]] = {"waveform": {0: batch, 1: Dim("samples")}}
    else:
        num_frames = scorer.spec.clip_frames + 37
        example = (torch.zeros(2, num_frames, scorer.spec.num_mels), torch.tensor([num_frames, 90]))
        shapes = {"fbank": {0: batch, 1: Dim("frames")}, "num_frames": {0: batch}}
    names = input_names(scorer)
    try:
        with torch.no_grad(), quiet():  # strict: the other way takes len(batch) for a constant
            return torch.export.export(
                scorer,
                example[: len(names)],
                dynamic_shapes={name: shapes[name] for name in names},
                strict=True,
            )
    except Exception as error:  # whatever a network's Python does with values that aren't there
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
        raise ValueError(
            f"this network can't be exported as a graph ({reason}). Export safetensors or hub instead."
        ) from error


def save_program(program: ExportedProgram, path: Path) -> None:
    """Write a program; `load_program` reads it."""
    with quiet(), open(path, "wb") as file:
        torch.export.save(program, file)


def load_program(path: Path) -> torch.nn.Module:
    """Read a program as a module without gradients; it takes what `input_names` says."""
    with quiet(), open(path, "rb") as file:
        return torch.export.load(file).module().requires_grad_(False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's warnings about its own insides to itself."""
    log = logging.getLogger("torch._export.serde.serialize")  # of sizes that no formula names
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            yield
    finally:
        log.setLevel(level)
