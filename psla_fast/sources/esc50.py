"""ESC-50: meta/esc50.csv and its audio folder -> classes and the clips of train and val, by fold."""

from collections.abc import Callable, Iterator
from pathlib import Path

from psla_fast.classes import Classes, shorten
from psla_fast.clip import Clip, Rejected
from psla_fast.sources.base import Split
from psla_fast.sources.rows import get_stem, make_row, read_columns

COLUMNS = ("filename", "fold", "target", "category")


def read_esc50(root: Path, fold: int | None = None) -> tuple[Classes, list[Split]]:
    """Read ESC-50's classes (by target number) and clips from the folder that holds meta/esc50.csv.

    fold k: val is fold k, train the others. None: fold1/train, fold1/val, fold2/train, … for every fold.
    Raises ValueError where the table or the audio folder is missing, a target isn't always the same category,
    targets aren't 0…C-1, or the fold isn't there.
    """
    table = root / "meta" / "esc50.csv"
    if not table.is_file() or not (root / "audio").is_dir():
        raise ValueError(f"meta/esc50.csv or audio not found in {root}. Pass the folder that holds both.")
    category_by_target: dict[int, str] = {}
    folds: set[int] = set()
    for line, _, row_fold, target, category in _read_rows(table):
        if category_by_target.setdefault(target, category) != category:
            known = category_by_target[target]
            raise ValueError(
                f"{table}, line {line}: target {target} is {shorten(category)!r} here and {shorten(known)!r} "
                "above. Restore the official file."
            )
        folds.add(row_fold)
    if not folds or sorted(category_by_target) != list(range(len(category_by_target))):
        raise ValueError(f"{table}: targets are not 0, 1, 2, …. Restore the official file.")
    categories = tuple(category_by_target[target] for target in range(len(category_by_target)))
    try:
        classes = Classes(categories, categories)
    except ValueError as error:
        raise ValueError(f"{table}: {error}") from error
    if fold is None:
        parts = [(f"fold{k}/{name}", name, k) for k in sorted(folds) for name in ("train", "val")]
    elif fold in folds:
        parts = [(name, name, fold) for name in ("train", "val")]
    else:
        raise ValueError(f"{table} has no fold {fold}, only {', '.join(map(str, sorted(folds)))}.")
    return classes, [
        Split(split, root, _open_rows(root, name == "val", k), scanned=True) for split, name, k in parts
    ]


def _open_rows(root: Path, is_val: bool, fold: int) -> Callable[[], Iterator[Clip | Rejected]]:
    def read() -> Iterator[Clip | Rejected]:
        there = {entry.name for entry in (root / "audio").iterdir()}

        def build(filename: str, target: int) -> Clip:
            return Clip(get_stem(filename), f"audio/{filename}", (target,), found=filename in there)

        for _, filename, row_fold, target, _ in _read_rows(root / "meta" / "esc50.csv"):
            if (row_fold == fold) == is_val:
                yield make_row(get_stem(filename), f"audio/{filename}", build, filename, target)

    return read


def _read_rows(table: Path) -> Iterator[tuple[int, str, int, int, str]]:
    """Yield (line, filename, fold, target, category)."""
    for line, (filename, fold, target, category) in read_columns(table, COLUMNS):
        if not all(number.isdecimal() and len(number) < 6 for number in (fold, target)):
            got = f"fold {shorten(fold)!r} and target {shorten(target)!r}"
            raise ValueError(f"{table}, line {line}: got {got}, expected numbers. Restore the official file.")
        yield line, filename, int(fold), int(target), category.strip()
