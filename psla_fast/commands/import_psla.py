"""The command import: PSLA's official weights -> a checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from psla_fast.recipe import parse_flags


@dataclass(frozen=True)
class ImportCommand:
    """Turn PSLA's official weights into a checkpoint that evaluate, tag, export and fine-tuning take."""

    weights: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WEIGHTS")]
    """A released file, for instance as_mdl_0.pth: size, heads and number of classes are read off it."""
    out: Path
    """Checkpoint to write."""
    classes: str = ""
    """audioset, fsd50k, or a class list's path (index,mid,display_name); by default AudioSet's for 527
    classes, FSD50K's for 200."""
    clip_frames: int | Literal["auto"] = "auto"
    """Frames of a clip; auto: 1056 for 527 classes, 3000 for 200, as PSLA trained."""
    strict: Annotated[bool, tyro.conf.FlagConversionOff] = True
    """False: a class list of another length gets a new, random head on the backbone."""


def import_psla(arguments: list[str]) -> None:
    """Write a checkpoint with the weights, and say what they are."""
    command = parse_flags(ImportCommand, arguments, "psla-fast import")
    import torch

    from psla_fast.checkpoint import save_checkpoint
    from psla_fast.official import import_official

    if command.out.is_dir() or command.out.resolve() == command.weights.resolve():
        raise ValueError(f"--out {command.out} can't be written: give a file other than WEIGHTS.")
    if command.clip_frames != "auto" and command.clip_frames < 1:
        raise ValueError(f"--clip-frames is {command.clip_frames}; give 1 or more.")
    torch.manual_seed(0)  # of a new head
    frames = None if command.clip_frames == "auto" else command.clip_frames
    imported = import_official(command.weights, command.classes, frames, command.strict)
    card = imported.card
    save_checkpoint(command.out, card, imported.state, epoch=0)
    print("\n".join(imported.said))
    names = ", ".join(card.classes.names[:3])
    print(
        f"{card.model.name}, {card.model.num_heads} heads, {card.model.same_padding} padding; "
        f"{len(card.classes)} classes ({names} …); clips of {card.input.clip_frames} frames, normalised by "
        f"{card.input.mean}, {card.input.std}\nwrote {command.out}"
    )
