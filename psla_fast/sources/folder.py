"""Folder: a folder of audio files for each class -> classes and the clips of train and val."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from psla_fast.classes import Classes
from psla_fast.clip import Clip, Rejected
from psla_fast.sources.audio_folder import scan_audio
from psla_fast.sources.base import Split
from psla_fast.sources.rows import NoClip, make_row

SPLITS = ("train", "val", "eval")


def read_folder(root: Path, val_fraction: float = 0.0) -> tuple[Classes, list[Split]]:
    """Read ROOT/<class>/…/<clip>.wav, or ROOT/train/<class>/…, with val/ and eval/ where they are there.

    A class is a folder with audio in it or in its folders; its name is its mid too; they are sorted. A clip's
    name is its path without suffix. In the first layout each clip goes to val where the hash of its name,
    as a fraction of 1, lies below val_fraction: about that share of each class, and a clip stays where it is
    when others are added. Only a class of which all would go to val keeps the one of the largest hash in
    train. In the second layout val_fraction isn't used. Audio that lies in no class folder is rejected, in
    train. Raises ValueError where there is no class.
    """
    if not root.is_dir():
        raise ValueError(f"{root} not found. Pass the folder that holds a folder for each class.")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"the fraction for val is {val_fraction}; give a number from 0 to below 1.")
    folders = _list_folders(root)
    is_split = "train" in folders and set(folders) <= set(SPLITS)
    parts = {name: root / name for name in SPLITS if name in folders} if is_split else {"train": root}
    mids = sorted({mid for part in parts.values() for mid in _list_folders(part) if _has_audio(part / mid)})
    if not mids:
        raise ValueError(f"{root} holds no folder with audio files. Make a folder for each class.")
    _check_writable(root, mids)
    classes = Classes(tuple(mids), tuple(mids))
    if is_split:
        return classes, [_open_split(root, name, f"{name}/", classes, 0.0, False) for name in parts]
    names = ["train", "val"] if val_fraction > 0 else ["train"]
    return classes, [_open_split(root, name, "", classes, val_fraction, name == "val") for name in names]


def _open_split(
    root: Path, name: str, prefix: str, classes: Classes, val_fraction: float, is_val: bool
) -> Split:
    def build(source: str, label: int) -> Clip:
        return Clip(_name_of(source), source, (label,))

    def refuse(source: str) -> Clip:
        raise NoClip("no_label: it lies in no class folder")

    def read() -> Iterator[Clip | Rejected]:
        if not is_val:
            for source in sorted(f"{prefix}{path}" for path in scan_audio(root / prefix, nested=False)):
                yield make_row(_name_of(source), source, refuse, source)
        for label, mid in enumerate(classes.mids):
            if not (root / prefix / mid).is_dir():
                continue
            sources = sorted(f"{prefix}{mid}/{path}" for path in scan_audio(root / prefix / mid))
            for source in _choose(sources, val_fraction, is_val):
                yield make_row(_name_of(source), source, build, source, label)

    return Split(name, root, read, scanned=True)


def _choose(sources: list[str], val_fraction: float, is_val: bool) -> Iterator[str]:
    """Yield the sources of one class that belong to val, or to train."""
    if not sources:
        return
    kept = max(_fraction_of(source) for source in sources)
    for source in sources:
        fraction = _fraction_of(source)
        if (fraction < val_fraction and fraction < kept) == is_val:
            yield source


def _fraction_of(source: str) -> float:
    """Hash a clip's name to [0, 1)."""
    digest = hashlib.sha256(_name_of(source).encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _name_of(source: str) -> str:
    return source[: source.rfind(".")]


def _list_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _has_audio(folder: Path) -> bool:
    return next(scan_audio(folder), None) is not None


def _check_writable(root: Path, mids: list[str]) -> None:
    for mid in mids:
        if not mid.isprintable():
            raise ValueError(f"{root}: the folder name {mid!r} can't be a class. Rename it.")
