"""Class vocabulary: reads and writes class lists, turns class indices into multi-hot targets."""

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

PACKAGED = {"audioset": "audioset_classes.csv", "fsd50k": "fsd50k_classes.csv"}
LARGEST_LIST = 64 * 2**20  # bytes; what is longer is no class list


@dataclass(frozen=True)
class Classes:
    """The classes of a data set in index order: `mids[i]` and `names[i]` belong to class i."""

    mids: tuple[str, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuse a vocabulary that names a mid twice, or holds nothing."""
        if not self.mids:
            raise ValueError("the class list is empty. Give at least one class.")
        if "" in self.mids:
            raise ValueError(f"class {self.mids.index('')} has an empty mid. Give every class a mid.")
        if len(set(self.mids)) < len(self.mids):
            twice = min(mid for mid, count in Counter(self.mids).items() if count > 1)
            raise ValueError(f"mid {shorten(twice)} stands twice in the class list. Keep one row per class.")

    def __len__(self) -> int:
        """Give the number of classes C."""
        return len(self.mids)

    @property
    def fingerprint(self) -> str:
        """Hash of the mids in their order."""
        return hashlib.sha256("\n".join(self.mids).encode()).hexdigest()

    def index_by_mid(self) -> dict[str, int]:
        """Map each mid to its class index."""
        return {mid: index for index, mid in enumerate(self.mids)}


def find_classes(name_or_path: str) -> Classes:
    """Give the class list `audioset` or `fsd50k` that comes with the package, or read the one at a path."""
    if name_or_path in PACKAGED:
        return read_classes(Path(__file__).parent / "data" / PACKAGED[name_or_path])
    path = Path(name_or_path)
    if not path.is_file():
        known = " or ".join(PACKAGED)
        raise ValueError(f"class list {name_or_path} not found. Pass {known}, or the path of a CSV file.")
    return read_classes(path)


def read_classes(path: Path, header: bool = True) -> Classes:
    """Read a class list: `index,mid,display_name` with a header, or FSD50K's `index,name,mid` without one.

    Indices must be 0…C-1; rows may stand in any order. Raises ValueError that names the file and the row.
    """
    rows = _read_cells(path)
    if header:
        if not rows or [cell.strip() for cell in rows[0][:2]] != ["index", "mid"]:
            raise ValueError(f"{path}: the first row is not 'index,mid,display_name'. Add that header.")
        rows = [[row[0], row[2], row[1]] if len(row) == 3 else row for row in rows[1:]]
    by_index: dict[int, tuple[str, str]] = {}
    for number, row in enumerate(rows, start=2 if header else 1):
        if not row:
            continue
        if len(row) != 3 or not row[0].strip().isdecimal() or len(row[0]) > 12:
            got = shorten(", ".join(row))
            raise ValueError(f"{path}, row {number}: got {got!r}, expected an index, a mid and a name.")
        index, name, mid = int(row[0]), row[1].strip(), row[2].strip()
        if index in by_index:
            raise ValueError(
                f"{path}, row {number}: index {index} stands twice. Number the classes 0, 1, 2, …"
            )
        by_index[index] = (mid, name)
    if sorted(by_index) != list(range(len(by_index))):
        raise ValueError(f"{path}: indices are not 0…{len(by_index) - 1}. Number the classes 0, 1, 2, …")
    ordered = [by_index[index] for index in range(len(by_index))]
    try:
        return Classes(tuple(mid for mid, _ in ordered), tuple(name for _, name in ordered))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_cells(path: Path) -> list[list[str]]:
    """Read the rows of a small CSV file; a byte order mark is skipped."""
    if not path.is_file():
        raise ValueError(f"{path} not found. Pass a class list (index,mid,display_name).")
    if path.stat().st_size > LARGEST_LIST:
        raise ValueError(f"{path} is larger than {LARGEST_LIST >> 20} MB. Pass a class list.")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return list(csv.reader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8 ({error}). Restore the original.") from error


def shorten(text: str, length: int = 80) -> str:
    """Cut a text of a user's file for a message."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def format_classes(classes: Classes) -> str:
    """Return the CSV text `index,mid,display_name` that `read_classes` reads back."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", "mid", "display_name"])
    writer.writerows((i, classes.mids[i], classes.names[i]) for i in range(len(classes)))
    return text.getvalue()


def compute_targets(labels: Sequence[npt.NDArray[np.integer]], num_classes: int) -> npt.NDArray[np.float32]:
    """Turn N label lists of class indices into multi-hot targets (N, C) of 0 and 1."""
    targets = np.zeros((len(labels), num_classes), dtype=np.float32)
    for row, indices in enumerate(labels):
        targets[row, indices] = 1
    return targets
