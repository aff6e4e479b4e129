"""Score files: HDF5 with `key` (N,), `scores` (N, C) and, by choice, `targets` (N, C) and `mids` (C,)."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt

from psla_fast.files import check_room, replacing

CLIPS_A_PIECE = 8192


@dataclass(frozen=True)
class ScoreFile:
    """The scores (N, C) of clips by their keys; targets is empty (0, C) where the file has none."""

    keys: list[str]
    scores: npt.NDArray[np.float32]
    targets: npt.NDArray[np.uint8]

    def ordered(self, keys: Sequence[str], source: str) -> npt.NDArray[np.float32]:
        """Give the scores in the order of `keys`; raises ValueError for a missing or an unknown key."""
        row = {key: number for number, key in enumerate(self.keys)}
        missing, unknown = [key for key in keys if key not in row], sorted(row.keys() - set(keys))
        if missing or unknown:
            example = f"{missing[0]} has no scores" if missing else f"{unknown[0]} is not in the data"
            raise ValueError(f"{source}: {len(missing)} clips missing, {len(unknown)} unknown ({example}).")
        return self.scores[[row[key] for key in keys]]


def write_scores(
    path: Path,
    keys: Sequence[str],
    scores: npt.NDArray[np.floating],
    targets: npt.NDArray[np.generic],
    mids: Sequence[str] = (),
    origin: str = "",
) -> None:
    """Write a score file atomically; targets (N, C) are hard labels, mids (C,) say what the classes are.

    origin says what was scored, and by what, for `read_origin`.
    """
    with replacing(path) as temporary:
        _check_room(path, keys, targets)
        with h5py.File(temporary, "w") as file:
            _write_columns(file, keys, scores, targets)
            if mids:
                file.create_dataset("mids", data=np.array([mid.encode() for mid in mids], dtype="S"))
            file.attrs["origin"] = origin


def add_epoch_scores(
    path: Path,
    epoch: int,
    keys: Sequence[str],
    epoch_scores: npt.NDArray[np.floating],
    mean_scores: npt.NDArray[np.floating],
    targets: npt.NDArray[np.generic],
) -> None:
    """Add one epoch's scores as `epochs/NN` to a run's score file, whose `scores` are the mean; atomic."""
    goes_on = path.is_file() and epoch > 1
    with replacing(path) as temporary:
        _check_room(path, keys, targets, path.stat().st_size if goes_on else 0)
        if goes_on:
            shutil.copyfile(path, temporary)
        with h5py.File(temporary, "a") as file:
            for name in ("key", "scores", "targets", f"epochs/{epoch:02d}"):
                if name in file:
                    del file[name]
            _write_columns(file, keys, mean_scores, targets)
            file.create_dataset(f"epochs/{epoch:02d}", data=epoch_scores.astype(np.float32))


def _check_room(
    path: Path, keys: Sequence[str], targets: npt.NDArray[np.generic], old_bytes: int = 0
) -> None:
    """Raise OSError before the disk is full: h5py, when it can't close a file, prints tracebacks, too."""
    num_bytes = len(keys) * max(map(len, keys), default=0) + 9 * targets.size  # two float32 and a uint8 each
    check_room(path, old_bytes + num_bytes + 65_536)


def _write_columns(
    file: h5py.File, keys: Sequence[str], scores: npt.NDArray[np.floating], targets: npt.NDArray[np.generic]
) -> None:
    file.create_dataset("key", data=np.array([key.encode() for key in keys], dtype="S"))
    file.create_dataset("scores", data=scores.astype(np.float32))
    file.create_dataset("targets", data=targets.astype(np.uint8), compression="gzip", compression_opts=1)


def read_scores(path: Path) -> ScoreFile:
    """Read a score file; raises ValueError that says what is wrong with it."""
    with _open(path) as (file, keys):
        scores = file["scores"][:].astype(np.float32)
        targets = file["targets"][:] if "targets" in file else np.empty((0, scores.shape[1]), np.uint8)
    return ScoreFile(keys, scores, targets)


def read_origin(path: Path) -> str:
    """Read what a score file is said to be made from; empty where it doesn't say, or isn't there or whole."""
    try:
        with h5py.File(path, "r") as file:
            return str(file.attrs.get("origin", ""))
    except (OSError, KeyError):
        return ""


def read_pieces(path: Path, mids: Sequence[str]) -> Iterator[tuple[list[str], npt.NDArray[np.float32]]]:
    """Read a score file of these classes some thousand clips at a time: their keys, and scores (≤ N, C).

    Raises ValueError where it is no score file, or one of other classes.
    """
    with _open(path) as (file, keys):
        if file["scores"].shape[1] != len(mids):
            raise ValueError(f"{path} has scores of {file['scores'].shape[1]} classes, not {len(mids)}.")
        if "mids" in file and [mid.decode() for mid in file["mids"][:].tolist()] != list(mids):
            raise ValueError(f"{path} has scores of other classes, or in another order.")
        for start in range(0, len(keys), CLIPS_A_PIECE):
            piece = slice(start, start + CLIPS_A_PIECE)
            yield keys[piece], file["scores"][piece].astype(np.float32)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[h5py.File, list[str]]]:
    """Open a score file, checked but for its values; give it and its keys."""
    if not path.is_file():
        raise ValueError(f"{path} not found. Pass a score file that evaluate wrote.")
    try:
        with h5py.File(path, "r") as file:
            keys, shape = [key.decode() for key in file["key"][:].tolist()], file["scores"].shape
            if len(shape) != 2 or shape[0] != len(keys) or len(set(keys)) != len(keys):
                raise ValueError(
                    f"{path}: {len(keys)} keys, {len(set(keys))} different, scores {shape}; not a score file."
                )
            yield file, keys
    except (OSError, KeyError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not a score file ({error}). It needs key (N,) and scores (N, C)."
        ) from error
