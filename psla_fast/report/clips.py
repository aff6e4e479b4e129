"""Clips: a run's shards -> how often each class occurs, and pictures of clips' fbanks."""

# T frames, F mels, C classes

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psla_fast.classes import Classes
from psla_fast.labels import read_labels, replace_labels
from psla_fast.report.runs import Run
from psla_fast.shards import is_remote, join, open_shards

MOST_COLUMNS = 360  # of a picture
COLOURS = 64


@dataclass(frozen=True)
class Picture:
    """A clip's fbank as PNG, its length, and how much of it the model hears, both in seconds."""

    png: bytes
    seconds: float
    heard_seconds: float


def find_shards(run: Run, given: str) -> str:
    """Give where a run's shards are: what was given, else its config's; empty where those are remote or gone.

    Raises ValueError where those given aren't there.
    """
    if given:
        if not is_remote(given) and not Path(given).is_dir():
            raise ValueError(f"--shards {given}: no such folder. Pass what pack wrote, or leave it out.")
        return given
    known = str(run.config.get("data.shards", ""))
    return known if known and not is_remote(known) and Path(known).is_dir() else ""


def check_classes(classes: Classes | None, found: Classes, location: str) -> None:
    """Raise ValueError where shards have other classes than the runs."""
    if classes is not None and classes.mids != found.mids:
        raise ValueError(
            f"{location} has {len(found)} classes, not the runs' {len(classes)}, or in another order. Pass "
            "the shards that they were trained on by --shards."
        )


@dataclass(frozen=True)
class SplitCounts:
    """How many clips a split has, in all and by class (C,)."""

    num_clips: int
    by_class: npt.NDArray[np.int64]
    classes: Classes


def count_split(run: Run, shards: str, role: str) -> SplitCounts:
    """Count a packed split's labels, of `train` those that training used; raises ValueError as opening it."""
    with open_shards(join(shards, run.split_name(role))) as split:
        labels = str(run.config.get("data.labels", ""))
        if role == "train" and labels:
            replace_labels(split, read_labels(Path(labels), split.classes))
        counts = np.bincount(split.index.indices, minlength=len(split.classes))
        return SplitCounts(len(split), counts, split.classes)


def draw_clips(run: Run, shards: str, role: str, clips: Mapping[str, Sequence[int]]) -> dict[str, Picture]:
    """Draw fbanks of clips, given by their keys and class indices.

    Those that the split doesn't hold, or holds with other labels, are left out.
    """
    pictures = {}
    with open_shards(join(shards, run.split_name(role))) as split:
        number_of = {key: number for number, key in enumerate(split.keys)}
        shift = split.fbank_config.frame_shift_ms / 1000
        for key, labels in clips.items():
            if key in number_of and split.labels(number_of[key]).tolist() == list(labels):
                fbank = split.fbank(number_of[key])
                heard = _heard_frames(run.config, len(fbank))
                pictures[key] = Picture(draw_fbank(fbank), len(fbank) * shift, heard * shift)
    return pictures


def _heard_frames(config: dict[str, Any], num_frames: int) -> int:
    """Of a clip's frames those that reach the model: the first clip_frames, or the longest bucket."""
    buckets = config.get("stream.buckets") or [config.get("input.clip_frames", num_frames)]
    return min(num_frames, max(int(length) for length in buckets))


def draw_fbank(fbank: npt.NDArray[np.float32]) -> bytes:
    """Draw log-mels (T, F) as PNG: time to the right, at most MOST_COLUMNS wide, mel bins upwards.

    Colours run from the clip's 1st to its 99.9th percentile.
    """
    columns = min(len(fbank), MOST_COLUMNS)
    edges = np.linspace(0, len(fbank), columns, endpoint=False).astype(np.int64)
    widths = np.diff(np.append(edges, len(fbank)))[:, None]
    pooled = np.add.reduceat(fbank, edges, axis=0) / widths
    low, high = np.percentile(pooled, [1, 99.9])
    scaled = (pooled - low) / max(float(high - low), 1e-6)
    levels = np.clip(scaled * COLOURS, 0, COLOURS - 1).astype(np.uint8)
    return encode_png(np.ascontiguousarray(levels.T[::-1]))


def encode_png(levels: npt.NDArray[np.uint8]) -> bytes:
    """Write levels (rows, columns) below COLOURS as a PNG with a palette; the same levels, the same bytes."""
    rows, columns = levels.shape
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), levels], axis=1)  # filter 0 in front of each line
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"PLTE", _palette()), (b"IDAT", zlib.compress(lines.tobytes(), 9)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in (*chunks, (b"IEND", b"")))


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@cache
def _palette() -> bytes:
    from matplotlib import colormaps

    colours = colormaps["magma"](np.linspace(0, 1, COLOURS), bytes=True)
    return np.asarray(colours)[:, :3].astype(np.uint8).tobytes()
