"""The command `pack SOURCE …`: a data set's own files -> shards; `pack merge`, `pack inspect` beside it."""

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from psla_fast.classes import Classes, find_classes
from psla_fast.commands.inspect import inspect
from psla_fast.pack import (
    FinishConfig,
    PackConfig,
    SplitSummary,
    WorkConfig,
    format_summaries,
    merge_parts,
    pack_splits,
)
from psla_fast.recipe import parse_flags
from psla_fast.sources import (
    Split,
    read_audioset,
    read_datafile,
    read_esc50,
    read_folder,
    read_fsd50k,
    read_hdf5,
    read_table,
)

Root = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ROOT")]
Out = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
Flat = tyro.conf.arg(name="")


@dataclass(frozen=True, kw_only=True)
class PackCommand:
    """What the commands of all sources take."""

    config: Annotated[PackConfig, Flat]
    work: Annotated[WorkConfig, Flat]


@dataclass(frozen=True)
class Fsd50kCommand(PackCommand):
    """Pack FSD50K: its splits train, val and eval. A killed pack goes on where it stopped."""

    root: Root
    """Folder that holds FSD50K.dev_audio, FSD50K.eval_audio and FSD50K.ground_truth."""
    out: Out
    """Folder for the shards: classes.csv and a folder a split."""

    def read(self) -> tuple[Classes, list[Split], Path]:
        """Give classes, splits and the folder that the splits' folders lie in."""
        return *read_fsd50k(self.root), self.out


@dataclass(frozen=True)
class AudiosetCommand(PackCommand):
    """Pack AudioSet, or another set of YouTube cuts with such CSVs, into one split."""

    out: Out
    """Folder of the split, for instance SHARDS/balanced; classes.csv goes beside it."""
    segments: tyro.conf.UseAppendAction[tuple[Path, ...]]
    """AudioSet's CSV: YTID, start_seconds, end_seconds, "mid,mid". Repeat the flag to join several."""
    audio: Path
    """Folder of the recordings, nested or not: ID.wav, YID.flac, ID_START.mp3, ID_START_END.opus …"""
    classes: str = "audioset"
    """Class list (class_labels_indices.csv); audioset is the packaged one."""
    full_length: bool = False
    """The files are whole videos: cut the clips out of them by the CSV's times."""

    def read(self) -> tuple[Classes, list[Split], Path]:
        """Give classes, the split and its folder's parent."""
        if not self.segments:
            raise ValueError("--segments is missing. Give AudioSet's CSV, for instance eval_segments.csv.")
        classes = find_classes(self.classes)
        split = read_audioset(self.segments, self.audio, classes, self.out.name, self.full_length)
        return classes, [split], self.out.parent


@dataclass(frozen=True)
class _ListCommand(PackCommand):
    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """The list to pack."""
    out: Out
    """Folder of the split, for instance SHARDS/train; classes.csv goes beside it."""
    classes: str
    """Class list (index,mid,display_name), or audioset or fsd50k for the packaged ones."""


@dataclass(frozen=True)
class DatafileCommand(_ListCommand):
    """Pack a PSLA datafile, {"data": [{"wav": path, "labels": "mid,mid"}, …]}, into one split."""

    def read(self) -> tuple[Classes, list[Split], Path]:
        """Give classes, the split and its folder's parent."""
        classes = find_classes(self.classes)
        return classes, [read_datafile(self.file, classes, self.out.name)], self.out.parent


@dataclass(frozen=True)
class Hdf5Command(_ListCommand):
    """Pack an HDF5 file of PANNs (int16 waveforms) or of PaSST and EfficientAT (mp3) into one split."""

    def read(self) -> tuple[Classes, list[Split], Path]:
        """Give classes, the split and its folder's parent."""
        classes = find_classes(self.classes)
        return classes, [read_hdf5(self.file, classes, self.out.name)], self.out.parent


@dataclass(frozen=True)
class TableCommand(_ListCommand):
    """Pack a CSV with the columns path,labels[,key,start,end] into one split."""

    def read(self) -> tuple[Classes, list[Split], Path]:
        """Give classes, the split and its folder's parent."""
        classes = find_classes(self.classes)
        return classes, [read_table(self.file, classes, self.out.name)], self.out.parent


@dataclass(frozen=True)
class Esc50Command(PackCommand):
    """Pack ESC-50: with --fold K train and val (fold K); without, foldK/train and foldK/val for each K."""

    root: Root
    """Folder that holds audio and meta/esc50.csv."""
    out: Out
    """Folder for the shards."""
    fold: int | None = None
    """Fold that is held out, 1 to 5; none: all five, for cross-validation."""

    def read(self) -> tuple[Classes, list[Split], Path]:
        """Give classes, splits and the folder that the splits' folders lie in."""
        return *read_esc50(self.root, self.fold), self.out


@dataclass(frozen=True)
class FolderCommand(PackCommand):
    """Pack a folder of audio files per class: ROOT/CLASS/…, or ROOT/{train,val,eval}/CLASS/…."""

    root: Root
    """Folder that holds a folder a class."""
    out: Out
    """Folder for the shards: classes.csv and a folder a split."""
    val_fraction: float = 0.1
    """Share of each class's files that go to val, where ROOT isn't split already; 0: none."""

    def read(self) -> tuple[Classes, list[Split], Path]:
        """Give classes, splits and the folder that the splits' folders lie in."""
        return *read_folder(self.root, self.val_fraction), self.out


@dataclass(frozen=True)
class MergeCommand:
    """Complete what parts (--part i/n) have packed: index, rejected clips, checksums."""

    out: Out
    """Folder of a split, or the one that holds the splits' folders."""
    config: Annotated[FinishConfig, Flat]


SOURCES: dict[str, tuple[Any, str]] = {
    "fsd50k": (Fsd50kCommand, "fsd50k ROOT OUT: the official folder"),
    "audioset": (AudiosetCommand, "audioset --segments CSV --audio DIR OUT/SPLIT"),
    "datafile": (DatafileCommand, "datafile JSON --classes CSV OUT/SPLIT: PSLA's datafile"),
    "hdf5": (Hdf5Command, "hdf5 FILE --classes CSV OUT/SPLIT: of PANNs, PaSST or EfficientAT"),
    "esc50": (Esc50Command, "esc50 ROOT OUT [--fold 1]"),
    "table": (TableCommand, "table CSV --classes CSV OUT/SPLIT: path,labels[,key,start,end]"),
    "folder": (FolderCommand, "folder ROOT OUT: a folder a class"),
}
OTHERS: dict[str, tuple[Callable[[list[str]], None], str]] = {}


def pack(arguments: list[str]) -> None:
    """Pack a data set, or do one of the things beside it."""
    word = arguments[0] if arguments else "--help"
    if word in ("-h", "--help"):
        print("usage: psla-fast pack SOURCE …   (each takes --help)\n")
        for name, (_, text) in {**SOURCES, **OTHERS}.items():
            print(f"  {name:<9} {text}")
        if not arguments:
            raise SystemExit(2)
        return
    if word in OTHERS:
        OTHERS[word][0](arguments[1:])
        return
    if word not in SOURCES:
        raise ValueError(f"{word!r} is no source. Give one of {', '.join([*SOURCES, *OTHERS])}.")
    command = parse_flags(SOURCES[word][0], arguments[1:], f"psla-fast pack {word}")
    run_pack(command, arguments)


def run_pack(command: Any, arguments: list[str]) -> None:
    """Pack by a parsed command; `arguments`, its words, go to pack.log so that it can be repeated."""
    logger = logging.getLogger("psla_fast.pack")
    logger.handlers = [logging.StreamHandler(sys.stdout)]
    logger.setLevel(logging.INFO)
    command = replace(command, out=Path(os.path.abspath(command.out)))  # "." has no name for a split
    classes, splits, out = command.read()
    words = {"arguments": arguments, "folder": os.getcwd()}
    summaries = pack_splits(classes, splits, out, command.config, command.work, words)
    if summaries:
        _print_summaries(summaries, classes, out)
        return
    print(f"part {command.work.part} is packed. When all are: psla-fast pack merge {command.out}")


def repeat_pack(arguments: list[str], folder: str, split: Path) -> None:
    """Run a pack again as pack.log noted it, into the place where its split lies now."""
    before, split = os.getcwd(), Path(os.path.abspath(split))
    if Path(folder).is_dir():  # else it has to do with absolute paths
        os.chdir(folder)
    try:
        command = parse_flags(SOURCES[arguments[0]][0], arguments[1:], f"psla-fast pack {arguments[0]}")
        _, splits, out = command.read()
        depth = len(Path(splits[0].name).parts) if out == command.out else 0
        moved = split.parents[depth - 1] if depth else split
        work = replace(command.work, part="1/1", retry_rejected=False, engine="loky", address="")
        run_pack(replace(command, out=moved, work=work), arguments)
    finally:
        os.chdir(before)


def merge(arguments: list[str]) -> None:
    """Complete the splits that parts have packed."""
    command = parse_flags(MergeCommand, arguments, "psla-fast pack merge")
    command = replace(command, out=Path(os.path.abspath(command.out)))
    classes, summaries = merge_parts(command.out, command.config)
    _print_summaries(summaries, classes, command.out)


def _print_summaries(summaries: list[SplitSummary], classes: Classes, out: Path) -> None:
    print(format_summaries(summaries, len(classes)))
    print(f"shards are in {out}")


OTHERS.update(
    merge=(merge, "merge OUT: completes what --part i/n have packed"),
    inspect=(inspect, "inspect SHARDS [KEY]: what a split or a clip holds, its fbank as PNG"),
)
