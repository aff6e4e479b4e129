"""The command `pack inspect`: a split's classes and lengths, or one clip's labels and its fbank as PNG."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from psla_fast.recipe import parse_flags
from psla_fast.shards import Shards, open_shards
from psla_fast.shards.spec import find_splits, make_key


@dataclass(frozen=True)
class InspectCommand:
    """Show what packed splits hold, or one clip's labels and fbank."""

    shards: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SHARDS")]
    """A split's folder, or the folder that holds the splits' folders."""
    key: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="KEY")] = ""
    """A clip's key or original name; none: a summary."""
    out: Path | None = None
    """PNG to draw the clip's fbank to; KEY.png where none is given."""


def inspect(arguments: list[str]) -> None:
    """Print a summary of each split, or show one clip."""
    command = parse_flags(InspectCommand, arguments, "psla-fast pack inspect")
    if command.out is not None and (command.out.is_dir() or not command.out.absolute().parent.is_dir()):
        raise ValueError(f"--out {command.out} can't be written: give a file in a folder that is there.")
    found = False
    for folder in find_splits(command.shards, ["index.h5"]) or [command.shards]:
        with open_shards(folder) as shards:
            if not command.key:
                _print_split(shards)
            elif not found and (clip_id := _find(shards, command.key)) is not None:
                _show_clip(shards, clip_id, command.out)
                found = True
    if command.key and not found:
        raise ValueError(
            f"no clip has the key {command.key!r} in {command.shards}. See rejected.jsonl there."
        )


def _find(shards: Shards, key: str) -> int | None:
    for wanted in (key, make_key(key)):
        clip_ids = np.flatnonzero(shards.index.key == wanted.encode(errors="surrogateescape"))
        if len(clip_ids):
            return int(clip_ids[0])
    return None


def _print_split(shards: Shards) -> None:
    shift = shards.fbank_config.frame_shift_ms / 1000
    seconds = shards.index.num_frames * shift
    counts = np.bincount(shards.index.indices, minlength=len(shards.classes))
    print(
        f"{shards.folder}: {len(shards):,} clips, {seconds.sum() / 3600:,.2f} h ({seconds.min():.2f} to "
        f"{seconds.max():.2f} s, median {np.median(seconds):.2f} s), {len(shards.index.shard_bytes):,} "
        f"shards, {shards.storage.dtype}, log-mel mean {shards.mean:.4f}, std {shards.std:.4f}"
    )
    print(f"  {(counts > 0).sum()} of {len(counts)} classes, {counts.sum() / len(shards):.2f} labels a clip")
    for index in np.argsort(-counts, kind="stable"):
        if counts[index]:
            print(f"  {counts[index]:>9,}  {shards.classes.mids[index]:<12}  {shards.classes.names[index]}")


def _show_clip(shards: Shards, clip_id: int, out: Path | None) -> None:
    from psla_fast.plots import plot_fbank

    fbank, key = shards.fbank(clip_id), shards.keys[clip_id]
    name, source = shards.read_origin(clip_id)
    seconds = len(fbank) * shards.fbank_config.frame_shift_ms / 1000
    names = [shards.classes.names[i] for i in shards.labels(clip_id)]
    labels = [f"{shards.classes.names[i]} ({shards.classes.mids[i]})" for i in shards.labels(clip_id)]
    path = out or Path(f"{key}.png")
    plot_fbank(path, fbank, shards.fbank_config.frame_shift_ms, f"{name}: {', '.join(names)}")
    shard = shards.shard_path(int(shards.index.shard[clip_id]))
    print(f"key      {key}\nname     {name}\nsource   {source}\nlabels   {', '.join(labels)}")
    print(f"length   {len(fbank)} frames, {seconds:.2f} s")
    print(f"log-mel  min {fbank.min():.2f}, mean {fbank.mean():.2f}, max {fbank.max():.2f}")
    print(f"shard    {shard}, offset {shards.index.offset[clip_id]}\npicture  {path}")
