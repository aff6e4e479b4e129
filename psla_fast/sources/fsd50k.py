"""FSD50K: its official CSV files and audio folders -> the clips of train, val and eval."""

from collections.abc import Iterator
from pathlib import Path

from psla_fast.classes import Classes, read_classes, shorten
from psla_fast.clip import Clip, Rejected
from psla_fast.sources.base import Split
from psla_fast.sources.rows import NoClip, find_labels, make_row, read_columns

TRUTH = "FSD50K.ground_truth"


def read_fsd50k(root: Path) -> tuple[Classes, list[Split]]:
    """Read FSD50K's class list and its three splits from the folder that holds FSD50K.dev_audio.

    A row of no or an unknown mid, or of val whose name stands in train too, is rejected, not fatal. Raises
    ValueError where a file of the data set is missing, has other columns, or can't be read.
    """
    for needed in (f"{TRUTH}/vocabulary.csv", f"{TRUTH}/dev.csv", f"{TRUTH}/eval.csv"):
        if not (root / needed).is_file():
            raise ValueError(f"{needed} not found in {root}. Pass the folder that holds FSD50K.dev_audio.")
    for folder in ("FSD50K.dev_audio", "FSD50K.eval_audio"):
        if not (root / folder).is_dir():
            raise ValueError(f"{folder} not found in {root}. Pass the folder that holds FSD50K.dev_audio.")
    classes = read_classes(root / TRUTH / "vocabulary.csv", header=False)
    for name in ("train", "eval"):
        for _ in _read_rows(root, name):  # whole, so that a faulty file is an error before the work begins
            pass
    return classes, [_open_split(root, name, classes) for name in ("train", "val", "eval")]


def _open_split(root: Path, name: str, classes: Classes) -> Split:
    folder = "FSD50K.eval_audio" if name == "eval" else "FSD50K.dev_audio"
    index_by_mid = classes.index_by_mid()

    def read() -> Iterator[Clip | Rejected]:
        there = {entry.name for entry in (root / folder).iterdir()}
        in_train = {fname for fname, _ in _read_rows(root, "train")} if name == "val" else set()

        def build(fname: str, mids: str) -> Clip:
            if fname in in_train:
                raise NoClip(f"duplicate_name: {shorten(fname)!r} stands in train too")
            labels = find_labels(mids.split(","), index_by_mid)
            return Clip(fname, f"{folder}/{fname}.wav", labels, found=f"{fname}.wav" in there)

        for fname, mids in _read_rows(root, name):
            yield make_row(fname, f"{folder}/{fname}.wav", build, fname, mids)

    return Split(name, root, read, scanned=True)


def _read_rows(root: Path, name: str) -> Iterator[tuple[str, str]]:
    """Yield (fname, mids) of the rows of a split."""
    if name == "eval":
        for _, (fname, mids) in read_columns(root / TRUTH / "eval.csv", ("fname", "mids")):
            yield fname, mids
        return
    path = root / TRUTH / "dev.csv"
    for line, (fname, mids, split) in read_columns(path, ("fname", "mids", "split")):
        if split not in ("train", "val"):
            got = shorten(split)
            raise ValueError(
                f"{path}, line {line}: split is {got!r}, expected train or val. Restore the official file."
            )
        if split == name:
            yield fname, mids
