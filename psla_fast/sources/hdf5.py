"""HDF5: the packed AudioSet of PANNs (int16) or of PaSST and EfficientAT (mp3) -> clips and waveforms."""

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from psla_fast.audio import AudioError, prepare_waveform, read_waveform
from psla_fast.classes import Classes, shorten
from psla_fast.clip import Clip, Rejected
from psla_fast.sources.audio_folder import PREFERENCE
from psla_fast.sources.base import Split
from psla_fast.sources.rows import NoClip, make_row

CHUNK_ROWS = 4096  # names and targets are read this many rows at a time
LONGEST_NAME = 1024  # bytes
PANNS_RATE, MIN_RATE, MAX_RATE = 32000, 1000, 768_000  # Hz
# What h5py raises for a damaged file, or for one that is none
FAULTS = (
    OSError,
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
)


@dataclass(frozen=True)
class _Packed:
    """An open file: N names, N targets, and N rows of int16 (PANNs) or of mp3 bytes (PaSST, EfficientAT)."""

    path: Path
    file: Any
    names: Any
    targets: Any
    audio: Any
    is_mp3: bool
    rate: int


def read_hdf5(path: Path, classes: Classes, name: str) -> Split:
    """Read an HDF5 file of PANNs, PaSST or EfficientAT as one split; each row is a clip.

    PANNs: audio_name, waveform int16 (N, samples), target bool (N, C). PaSST, EfficientAT: audio_name, mp3 (N
    rows of bytes), target uint8 (N, ceil(C / 8)), np.packbits. A clip's name is its audio_name without
    suffix, and without the Y that PANNs puts before YouTube's ids of 11 characters. Raises ValueError where
    the file is something else, is damaged, or has another number of classes.
    """
    _open_for(path, classes).file.close()

    def build(clip_name: str | None, labels: tuple[int, ...], row: int) -> Clip:
        if clip_name is None:
            raise NoClip("bad_name: it is not in UTF-8")
        if not labels:
            raise NoClip("no_label: the row has no target")
        return Clip(clip_name, path.name, labels, row)

    def read() -> Iterator[Clip | Rejected]:
        packed = _open_for(path, classes)
        with packed.file:
            for first in range(0, len(packed.names), CHUNK_ROWS):
                for row, (clip_name, labels) in enumerate(_read_chunk(packed, first, len(classes)), first):
                    yield make_row(clip_name or f"row {row}", path.name, build, clip_name, labels, row)

    return Split(name, path.parent, read, missing_is_normal=True)


def read_hdf5_waveform(
    path: Path, row: int, sample_rate: int = 16000, max_seconds: float = 600.0
) -> npt.NDArray[np.float32]:
    """Read the waveform (samples,) of a row at `sample_rate`, its mean subtracted; the file is kept open.

    Raises AudioError as `read_waveform` does, with reason missing_audio where PANNs' row is all zeros or the
    mp3 row is empty, and undecodable where the row can't be read; ValueError where the file isn't one that
    `read_hdf5` reads, or has no such row.
    """
    if not path.is_file():
        raise ValueError(f"{path} not found. Pass an HDF5 file of PANNs, PaSST or EfficientAT.")
    status = path.stat()
    packed = _open_cached(path, status.st_mtime_ns, status.st_size, os.getpid())
    what = f"row {row} of {path}"
    if not 0 <= row < len(packed.names):
        raise ValueError(f"{what} is none of its {len(packed.names)}. Pass a row of the file.")
    if not packed.is_mp3 and packed.audio.shape[1] > max_seconds * packed.rate:
        raise AudioError("too_long", f"{what} lasts longer than {max_seconds:g} s")
    try:
        audio = packed.audio[row]
    except FAULTS as error:
        raise AudioError("undecodable", f"{what}: {_first_line(error)}") from error
    if packed.is_mp3:
        if not len(audio):
            raise AudioError("missing_audio", f"{what} holds no bytes")
        try:
            return read_waveform(audio.tobytes(), sample_rate, max_seconds=max_seconds)
        except AudioError as error:
            raise AudioError(error.reason, f"{what}: {str(error).partition(': ')[2]}") from error
    if not audio.any():
        zeros = f"{what} is all zeros, as PANNs' packer leaves a clip it could not find"
        raise AudioError("missing_audio", zeros)
    return prepare_waveform(audio.astype(np.float32) / 32767, packed.rate, sample_rate, what)


@functools.lru_cache(maxsize=4)
def _open_cached(path: Path, mtime_ns: int, size: int, process: int) -> _Packed:
    """Open a file once in a process; anew where it was written since."""
    return _open(path)


def _open_for(path: Path, classes: Classes) -> _Packed:
    """Open a file, and raise ValueError where its targets don't fit the classes."""
    packed = _open(path)
    width = packed.targets.shape[1]
    if packed.is_mp3 and width != -(-len(classes) // 8):
        got = f"target has {width} bytes a row, for {max(0, 8 * width - 7)} to {8 * width} classes"
    elif not packed.is_mp3 and width != len(classes):
        got = f"target has {width} classes"
    else:
        return packed
    packed.file.close()
    raise ValueError(f"{path}: {got}, but the class list has {len(classes)}. Pass its own class list.")


def _open(path: Path) -> _Packed:
    if not path.is_file():
        raise ValueError(f"{path} not found. Pass an HDF5 file of PANNs, PaSST or EfficientAT.")
    try:
        file = h5py.File(path, "r")
    except FAULTS as error:
        raise ValueError(
            f"{path} is no HDF5 file, or damaged ({_first_line(error)}). Get it anew."
        ) from error
    fault = ""
    try:
        key = "waveform" if "waveform" in file else "mp3"
        missing = [
            key for key in ("audio_name", "target", key) if not isinstance(file.get(key), h5py.Dataset)
        ]
        if missing:
            fault = f"has no data set {' or '.join(missing).replace('mp3', 'waveform or mp3')}"
        else:
            rate = file.attrs.get("sample_rate", PANNS_RATE)
            names, targets, audio = file["audio_name"], file["target"], file[key]
            fault = _find_fault(names, targets, audio, rate, is_mp3=key == "mp3")
            if not fault:
                return _Packed(path, file, names, targets, audio, key == "mp3", int(rate))
    except FAULTS as error:
        fault = f"is damaged ({_first_line(error)})"
    file.close()
    raise ValueError(f"{path} {fault}. Pass an HDF5 file of PANNs, PaSST or EfficientAT.")


def _find_fault(names: Any, targets: Any, audio: Any, rate: Any, is_mp3: bool) -> str:
    """Say what is wrong with the data sets' types and sizes; empty where they are as they should."""
    text = h5py.check_string_dtype(names.dtype)  # its length is None where each row has its own
    if names.ndim != 1 or text is None or (text.length or 0) > LONGEST_NAME:
        return f"has audio_name of {names.dtype} {names.shape}, expected short texts (N,)"
    if is_mp3 and (audio.ndim != 1 or h5py.check_vlen_dtype(audio.dtype) != np.uint8):
        return f"has mp3 of {audio.dtype} {audio.shape}, expected N rows of uint8"
    if not is_mp3 and (audio.ndim != 2 or audio.dtype != np.int16):
        return f"has waveform of {audio.dtype} {audio.shape}, expected int16 (N, samples)"
    if targets.ndim != 2 or targets.dtype != (np.uint8 if is_mp3 else np.bool_):
        expected = "uint8 (N, bytes of C bits)" if is_mp3 else "bool (N, C)"
        return f"has target of {targets.dtype} {targets.shape}, expected {expected}"
    if not len(names) == len(targets) == len(audio):
        return f"has {len(names)} names, {len(targets)} targets and {len(audio)} rows of audio"
    if not (np.isscalar(rate) and MIN_RATE <= float(rate) <= MAX_RATE):  # type: ignore[arg-type]
        return f"has sample_rate {shorten(repr(rate), 20)}, expected {MIN_RATE} to {MAX_RATE} Hz"
    return ""


def _read_chunk(
    packed: _Packed, first: int, num_classes: int
) -> Iterator[tuple[str | None, tuple[int, ...]]]:
    """Yield (name, None where it isn't UTF-8; labels) of up to CHUNK_ROWS rows from `first` on."""
    span = slice(first, min(first + CHUNK_ROWS, len(packed.names)))
    try:
        names, targets = packed.names[span], packed.targets[span]
    except FAULTS as error:
        where = f"{packed.path}, rows {span.start} to {span.stop - 1}"
        raise ValueError(f"{where}: can't be read ({_first_line(error)}). Get the file anew.") from error
    if packed.is_mp3:
        targets = np.unpackbits(targets, axis=1)
        if targets[:, num_classes:].any():
            raise ValueError(
                f"{packed.path}: target has classes above {num_classes}, the length of the class list. "
                "Pass its own class list."
            )
    rows, labels = np.nonzero(targets)
    bounds = np.searchsorted(rows, np.arange(len(names) + 1)).tolist()
    for row, name in enumerate(names):
        yield _clean_name(name), tuple(labels[bounds[row] : bounds[row + 1]].tolist())


def _clean_name(audio_name: bytes | str) -> str | None:
    try:
        name = audio_name.decode() if isinstance(audio_name, bytes) else audio_name
    except UnicodeDecodeError:
        return None
    stem, _, suffix = name.rpartition(".")
    if suffix.lower() in PREFERENCE:
        name = stem
    return name[1:] if len(name) == 12 and name.startswith("Y") else name


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shorten(lines[0], 120)
