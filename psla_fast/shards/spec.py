"""What a shard is made of: names, sizes, number formats; shared by writer and reader.

A split's folder holds NNNNN.tar (USTAR, mtime 0; a clip is `<key>.fbank` and `<key>.labels`), NNNNN.idx
(DALI's index), NNNNN.json (statistics, written last), index.h5 (all clips), rejected.jsonl, pack.json (the
plan), SHA256SUMS (of all these, written when the split is complete) and pack.log; classes.csv lies one folder
above.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from psla_fast.fbank import LOG_FLOOR_POWER

FORMAT_VERSION = 2
TAR_BLOCK = 512
DtypeName = Literal["float16", "uint8"]
LOWEST_LOG_MEL = math.log(LOG_FLOOR_POWER)  # -15.94
HIGHEST_LOG_MEL = 12.0  # a full-scale square wave reaches 11.6


class ShardError(ValueError):
    """A damaged or incomplete shard set; says shard, key and offset where they are known."""


@dataclass(frozen=True)
class Storage:
    """How log-mels are stored: value = stored × scale + offset."""

    dtype: DtypeName = "float16"
    scale: float = 1.0
    offset: float = 0.0

    @classmethod
    def of(cls, dtype: DtypeName) -> "Storage":
        """Give the storage of a dtype: float16 as it is; uint8 in 256 steps of 0.11 over [-15.94, 12]."""
        if dtype == "float16":
            return cls("float16")
        return cls("uint8", (HIGHEST_LOG_MEL - LOWEST_LOG_MEL) / 255, LOWEST_LOG_MEL)

    @property
    def numpy(self) -> np.dtype[np.generic]:
        """The stored dtype, little-endian."""
        return np.dtype("<f2" if self.dtype == "float16" else "u1")

    def encode(self, fbank: npt.NDArray[np.float32]) -> npt.NDArray[np.generic]:
        """Turn log-mels into stored values (rounded to the nearest; uint8 saturates)."""
        if self.dtype == "float16":  # by torch, which has the CPU do it: 20 times as fast as NumPy's
            halves: npt.NDArray[np.generic] = torch.from_numpy(fbank).half().numpy()
            return halves.astype(self.numpy, copy=False)
        steps: npt.NDArray[np.float32] = np.rint((fbank - self.offset) / self.scale)
        return np.clip(steps, 0, 255).astype(self.numpy)

    def decode(self, stored: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
        """Turn stored values back into float32 log-mels."""
        if self.dtype == "float16":
            values: npt.NDArray[np.float32] = torch.from_numpy(stored).float().numpy()
            return values
        return stored.astype(np.float32) * np.float32(self.scale) + np.float32(self.offset)


def make_key(name: str) -> str:
    """Turn a clip's name into a key that tar, WebDataset and DALI take: ≤ 80 of [A-Za-z0-9_-].

    A name that has to be changed gets a hash of the original, so that two names never share a key.
    """
    key = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    if key == name and 0 < len(key) <= 80:
        return key
    return f"{key[:67]}-{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:12]}"


def find_splits(folder: Path, marks: Sequence[str]) -> list[Path]:
    """Give FOLDER where it holds one of the files `marks`, else the folders one or two below that do."""
    for pattern in ("", "*/", "*/*/"):
        found = {path.parent for mark in marks for path in folder.glob(pattern + mark) if path.is_file()}
        if found:
            return sorted(found)
    return []


def shard_name(number: int) -> str:
    """Give the stem of shard number 0, 1, …: five digits, more where they are needed."""
    return f"{number:05d}"
