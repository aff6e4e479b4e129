"""The command average: checkpoints of one model -> one with the mean of all weights, or of the best's."""

import re
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import tyro

from psla_fast.checkpoint import load_checkpoint, save_checkpoint
from psla_fast.distributed import DeviceName
from psla_fast.ensemble import Scoring, check_members
from psla_fast.evaluate import Precision
from psla_fast.recipe import parse_flags
from psla_fast.shards import exists_split, join, open_shards
from psla_fast.soup import BatchNormAnew, GreedySoup, SamplingKind, refuse_eval_of_runs
from psla_fast.train.averaging import average_checkpoints


@dataclass(frozen=True)
class AverageCommand:
    """Average the weights of checkpoints of one model into one checkpoint.

    Integers, such as BatchNorm's counts of batches, are those of the checkpoint that is added last.
    """

    out: Path
    """Checkpoint to write."""
    checkpoints: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Checkpoints, for instance RUN/checkpoints/epoch_0*.pt; none with --run."""
    run: Path | None = None
    """Folder of a run whose epochs are averaged."""
    epochs: str = ""
    """Its epochs, for instance 31-40, both included."""
    batch_norm_clips: int = 0
    """Training clips on which BatchNorm's statistics of the averaged weights are measured anew; 0: they are
    averaged like the weights."""
    shards: str = ""
    """Where those clips are: the folder that pack wrote, of which the split train is taken, or a split."""
    sampling: SamplingKind = "balanced"
    """How those clips are drawn: as in the training. shuffle: none is more likely than others."""
    soup: bool = False
    """Greedy soup: from the best checkpoint to the worst, one is kept where the mean scores no worse with
    it."""
    data: str = ""
    """The packed validation split that decides about the soup, for instance SHARDS/val."""
    batch_size: int = 32
    """Clips scored at once, 1 or more."""
    precision: Precision = "auto"
    """Autocast, as in training."""
    device: DeviceName = "auto"
    """auto takes the GPU where there is one."""


def average(arguments: list[str]) -> None:
    """Average checkpoints' weights."""
    command = parse_flags(AverageCommand, arguments, "psla-fast average")
    paths, scoring = _check(command), Scoring(command.batch_size, command.precision, command.device)
    anew, num_averaged = None, len(paths)
    with ExitStack() as stack:
        if command.batch_norm_clips:
            train = stack.enter_context(open_shards(_find_training_split(command.shards)))
            card = load_checkpoint(paths[0]).card
            anew = BatchNormAnew(card, train, command.batch_norm_clips, scoring, command.sampling)
        if command.soup:
            validation = stack.enter_context(open_shards(command.data))
            refuse_eval_of_runs(command.data, validation, paths, "--data")
            soup = GreedySoup(paths, validation, scoring, anew)
            num_averaged = _choose(soup)
            card, state, epoch = soup.card, soup.state, soup.epoch
        else:
            card, state, epoch = average_checkpoints(paths)
            state = anew.measure(state) if anew else state
    save_checkpoint(command.out, card, state, epoch)
    left_out = f" of {len(paths)}" if command.soup else ""
    what = "checkpoint" if len(paths) == 1 else "checkpoints"
    print(f"averaged {num_averaged}{left_out} {what} into {command.out}")
    if anew and command.soup and num_averaged == 1:
        print("BatchNorm's statistics are the checkpoint's own: nothing was averaged")
    elif anew:
        print(f"BatchNorm's statistics are of {anew.num_clips} {command.sampling} draws of {train.location}")


def _check(command: AverageCommand) -> list[Path]:
    """Give the checkpoints to average; raises ValueError for flags that don't go together."""
    if command.out.is_dir():
        raise ValueError(f"--out {command.out} is a folder; give a file.")
    if command.batch_norm_clips < 0:
        raise ValueError(f"--batch-norm-clips is {command.batch_norm_clips}; give 1 or more, or 0 for none.")
    if bool(command.batch_norm_clips) != bool(command.shards):
        raise ValueError("--batch-norm-clips N and --shards SHARDS go together. Give both, or neither.")
    if command.soup != bool(command.data):
        raise ValueError("--soup and --data SHARDS/val go together. Give both, or neither.")
    if bool(command.run) != bool(command.epochs) or bool(command.run) == bool(command.checkpoints):
        raise ValueError("give checkpoints, or --run RUN and --epochs 31-40; one of both.")
    _check_writable(command.out)
    return find_epochs(command.run, command.epochs) if command.run else check_members(command.checkpoints)


def _check_writable(out: Path) -> None:
    """Raise ValueError unless the nearest folder of `out` that is there takes files."""
    try:
        folder = next(parent for parent in out.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--out {out} can't be written ({error.strerror}); give another folder.") from error


def find_epochs(run: Path, epochs: str) -> list[Path]:
    """Give the checkpoints of a run's epochs, such as 31-40; raises ValueError that names missing ones."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", epochs)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(f"--epochs is {epochs!r}; give a range such as 31-40.")
    files = {path.stem.removeprefix("epoch_"): path for path in (run / "checkpoints").glob("epoch_*.pt")}
    paths = {int(number): path for number, path in files.items() if number.isdecimal() and path.is_file()}
    chosen = sorted(epoch for epoch in paths if first <= epoch <= last)
    if len(chosen) <= last - first:
        missing = [(a + 1, b - 1) for a, b in pairwise([first - 1, *chosen, last + 1]) if b - a > 1]
        raise ValueError(
            f"{run / 'checkpoints'} has no checkpoint of epoch {show_ranges(missing)}; there is "
            f"{show_ranges(find_ranges(paths)) or 'none'}. Runs keep them with --keep-epochs True."
        )
    return [paths[epoch] for epoch in chosen]


def find_ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Give the ranges that numbers make up, in order, both ends included."""
    ranges: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1] = ranges[-1][0], number
        else:
            ranges.append((number, number))
    return ranges


def show_ranges(ranges: Iterable[tuple[int, int]]) -> str:
    """Write ranges as `1-3, 7`."""
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in ranges)


def _find_training_split(shards: str) -> str:
    inside = join(shards, "train")
    return inside if not (Path(shards) / "index.h5").is_file() and exists_split(inside) else shards


def _choose(soup: GreedySoup) -> int:
    """Make the soup, each decision printed as it falls; returns how many checkpoints are in it."""
    scored = soup.score_members()
    for mean_ap, path in scored:
        print(f"val mAP {mean_ap:.6f}  {path}", flush=True)
    num_kept = 0
    for decision in soup.choose(scored):
        num_kept += decision.kept
        with_it = "best" if not num_kept - decision.kept else ("kept" if decision.kept else "left out")
        print(f"soup mAP {decision.mean_ap:.6f} with {decision.path}: {with_it}", flush=True)
    return num_kept
