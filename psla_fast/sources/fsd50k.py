"""FSD50K: its official CSV files and audio folders -> the clips of train, val and eval."""

import csv
from collections.abc import Iterator
from pathlib import Path

from psla_fast.classes import Classes, read_classes
from psla_fast.clip import Clip, Rejected
from psla_fast.sources.base import Split

TRUTH = "FSD50K.ground_truth"


def read_fsd50k(root: Path) -> tuple[Classes, list[Split]]:
    """Read FSD50K's class list and its three splits from the folder that holds FSD50K.dev_audio.

    A row whose audio file is missing, whose mid is not in the vocabulary, whose names and mids disagree in
    number, or whose name stood before is rejected, not fatal. Raises ValueError where a file of the data set
    is missing or has other columns.
    """
    for needed in (f"{TRUTH}/vocabulary.csv", f"{TRUTH}/dev.csv", f"{TRUTH}/eval.csv"):
        if not (root / needed).is_file():
            raise ValueError(f"{needed} not found in {root}. Pass the folder that holds FSD50K.dev_audio.")
    for folder in ("FSD50K.dev_audio", "FSD50K.eval_audio"):
        if not (root / folder).is_dir():
            raise ValueError(f"{folder} not found in {root}. Pass the folder that holds FSD50K.dev_audio.")
    classes = read_classes(root / TRUTH / "vocabulary.csv", header=False)
    dev = list(_read_rows(root / TRUTH / "dev.csv", ["fname", "labels", "mids", "split"]))
    evaluation = list(_read_rows(root / TRUTH / "eval.csv", ["fname", "labels", "mids"]))
    unknown = sorted({row["split"] for row in dev} - {"train", "val"})
    if unknown:
        raise ValueError(
            f"{TRUTH}/dev.csv has split {unknown[0]!r}, expected train or val. Restore the official file."
        )
    heard: set[str] = set()
    splits = [
        _read_split(
            "train",
            [row for row in dev if row["split"] == "train"],
            root / "FSD50K.dev_audio",
            classes,
            heard,
        ),
        _read_split(
            "val", [row for row in dev if row["split"] == "val"], root / "FSD50K.dev_audio", classes, heard
        ),
        _read_split("eval", evaluation, root / "FSD50K.eval_audio", classes, set()),
    ]
    return classes, splits


def _read_rows(path: Path, columns: list[str]) -> Iterator[dict[str, str]]:
    try:
        yield from _parse_rows(path, columns)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not a CSV file in UTF-8 ({error}). Restore the official file."
        ) from error


def _parse_rows(path: Path, columns: list[str]) -> Iterator[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != columns:
            raise ValueError(
                f"{path}: columns are {reader.fieldnames}, expected {columns}. Restore the official file."
            )
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}, line {reader.line_num}: expected {len(columns)} cells. Quote lists of labels."
                )
            yield row


def _read_split(
    name: str, rows: list[dict[str, str]], folder: Path, classes: Classes, heard: set[str]
) -> Split:
    """Make the clips of a split; `heard` holds the names that stood before, and takes these."""
    index_by_mid = classes.index_by_mid()
    there = {entry.name for entry in folder.iterdir()}
    clips: list[Clip] = []
    rejected: list[Rejected] = []
    for row in rows:
        fname, mids = row["fname"], [mid for mid in row["mids"].split(",") if mid]
        path, source = folder / f"{fname}.wav", f"{folder.name}/{fname}.wav"
        unknown = [mid for mid in mids if mid not in index_by_mid]
        if fname in heard:
            reason = f"duplicate_name: {fname} stands more than once"
        elif unknown:
            reason = f"unknown_label: {unknown[0]} is not in vocabulary.csv"
        elif not mids:
            reason = "no_label: the row has no mid"
        elif path.name not in there:
            reason = f"missing_audio: {path.name} is not in {folder.name}"
        else:
            clips.append(Clip(fname, source, path, tuple(sorted({index_by_mid[mid] for mid in mids}))))
            heard.add(fname)
            continue
        rejected.append(Rejected(fname, source, reason))
    return Split(name, clips, rejected)
