"""The command enhance: scores of the training clips + labels + ontology -> enhanced label sets."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from psla_fast.classes import Classes, find_classes
from psla_fast.distributed import DeviceName
from psla_fast.enhance import THRESHOLDS, Floats, Kind, Threshold, compute_thresholds, count_added, enhance
from psla_fast.evaluate import Precision, evaluate_checkpoint, save_evaluation
from psla_fast.files import replacing
from psla_fast.labels import LabelTable, read_labels, replace_labels, write_datafile, write_labels
from psla_fast.models.weights import compute_sha256
from psla_fast.ontology import PACKAGED, UNEXPANDED_FSD50K, Relations, find_relations, read_ontology
from psla_fast.recipe import parse_flags, read_recipe
from psla_fast.sampling import compute_sample_weights
from psla_fast.scores import read_origin, read_pieces
from psla_fast.shards import join, open_shards
from psla_fast.sources import read_wavs

TOP_PAIRS = 10


@dataclass(frozen=True)
class EnhanceCommand:
    """Add labels that annotators missed: a clip's labels' children and ancestors that a model scores highly.

    Give a run, whose model scores its training split first; or scores, with the labels they belong to.
    """

    run: Path | None = None
    """A trained run's folder: its averaged weights score its training split, into
    RUN/enhance/train_scores.h5."""
    scores: Path | None = None
    """Score file of the training clips, of `psla-fast evaluate CKPT SHARDS --split train`."""
    shards: str = ""
    """The packed training split, for instance SHARDS/train."""
    labels: Path | None = None
    """A label table (CSV key,mids) whose labels stand in for the packed split's."""
    datafile: Path | None = None
    """A PSLA datafile or label table in the place of a packed split; needs --classes."""
    classes: str = ""
    """Class list of the datafile (or audioset, fsd50k)."""
    ontology: Path = PACKAGED
    """Ontology in AudioSet's JSON format; AudioSet's own comes with the package."""
    threshold: Literal["mean", "median", "25", "10", "5", "all"] = "mean"
    """A class's threshold: mean, median or a percentile of the scores of the clips that carry it."""
    type: Kind = "both"
    """1: children of a clip's labels; 2: their ancestors; both, PSLA's."""
    out: Path | None = None
    """Folder of the enhanced sets; a run's are in RUN/enhance."""
    checkpoint: str = "wa.pt"
    """With --run: which of RUN/checkpoints scores."""
    batch_size: int = 32
    """With --run: clips scored at once."""
    precision: Precision = "auto"
    """With --run: autocast, as in training."""
    device: DeviceName = "auto"
    """auto takes the GPU where there is one."""


@dataclass(frozen=True)
class Source:
    """The labels to enhance, their classes, the audio's paths, and what the files are called."""

    name: str
    labels: LabelTable
    classes: Classes
    wavs: list[str]


def enhance_labels(arguments: list[str]) -> None:
    """Enhance a label set, write it in each form, and print what was added."""
    command = parse_flags(EnhanceCommand, arguments, "psla-fast enhance")
    if command.run:
        if command.scores or command.shards or command.datafile or command.labels or command.classes:
            raise ValueError("--run brings its own scores and labels. Leave the others out.")
        out = command.out or command.run / "enhance"
        source, scores = _score_run(command, command.run, out)
    else:
        if not command.scores or not command.out or bool(command.shards) == bool(command.datafile):
            raise ValueError("give --run RUN; or --scores, --out, and --shards or --datafile.")
        if (command.classes and command.shards) or (command.labels and command.datafile):
            raise ValueError("--classes is for --datafile, --labels for --shards. Leave it out.")
        out, scores = command.out, command.scores
        source = _open_split(command.shards, command.labels) if command.shards else _open_datafile(command)
    relations = find_relations(read_ontology(command.ontology), source.classes, UNEXPANDED_FSD50K)
    rows = {key: row for row, key in enumerate(source.labels.keys)}

    def pieces() -> Iterator[tuple[npt.NDArray[np.int64], Floats]]:
        return _match(scores, source, rows)

    found = compute_thresholds(pieces, source.labels, len(source.classes))
    for threshold in THRESHOLDS if command.threshold == "all" else (command.threshold,):
        enhanced = enhance(pieces, source.labels, relations, found[threshold], command.type)
        kind = {"1": "type1", "2": "type2", "both": "type1_2"}[command.type]
        stem = f"{source.name}_{kind}_{threshold}"
        _write(out / stem, enhanced, source)
        _print_added(stem, source, enhanced, relations, threshold)
    print(f"label tables (.csv), datafiles (.json) and sample weights (_weight.csv) are in {out}")


def _score_run(command: EnhanceCommand, run: Path, out: Path) -> tuple[Source, Path]:
    """Score a run's training split, unless that was done, with the labels that it was trained on."""
    if not (run / "config.toml").is_file():
        raise ValueError(f"{run} is no run: it has no config.toml. Give a folder that training wrote.")
    settings = read_recipe(str(run / "config.toml"))
    if not settings.get("data.shards") or not settings.get("data.train"):
        raise ValueError(f"{run}/config.toml doesn't name the run's shards. Restore it.")
    data = join(settings["data.shards"], settings["data.train"])
    labels = settings.get("data.labels", "")
    checkpoint, scores = run / "checkpoints" / command.checkpoint, out / "train_scores.h5"
    if not checkpoint.is_file():
        raise ValueError(f"{checkpoint} not found. Finish the run, or choose another --checkpoint.")
    source = _open_split(data, Path(labels) if labels else None)
    with open_shards(data) as shards:
        origin = f"{compute_sha256(checkpoint)} {shards.fingerprint} {command.precision}"
    if read_origin(scores) == origin:
        print(f"{scores} has the scores of {checkpoint} already", flush=True)
    else:
        evaluation = evaluate_checkpoint(
            checkpoint, data, command.batch_size, command.precision, command.device
        )
        save_evaluation(scores, evaluation, origin)
        print(f"scored {len(evaluation.keys)} clips of {data} with {checkpoint} into {scores}", flush=True)
    return source, scores


def _open_split(data: str, labels: Path | None) -> Source:
    with open_shards(data) as shards:
        if labels:
            replace_labels(shards, read_labels(labels, shards.classes))
        table = LabelTable(Path(data), shards.keys, shards.index.indptr, shards.index.indices)
        return Source(shards.folder.name, table, shards.classes, list(shards.read_sources()))


def _open_datafile(command: EnhanceCommand) -> Source:
    assert command.datafile
    if not command.classes:
        raise ValueError("--classes is missing. Give the datafile's class list, or audioset or fsd50k.")
    classes = find_classes(command.classes)
    table = read_labels(command.datafile, classes)
    is_json = command.datafile.suffix.lower() == ".json"
    wavs = list(read_wavs(command.datafile)) if is_json else [f"{key}.wav" for key in table.keys]
    return Source(command.datafile.stem, table, classes, wavs)


def _match(
    scores: Path, source: Source, rows: dict[str, int]
) -> Iterator[tuple[npt.NDArray[np.int64], Floats]]:
    """Give pieces of a score file with the rows of the label set they belong to; every row must come."""
    num_found, unknown = 0, []
    for keys, piece in read_pieces(scores, source.classes.mids):
        unknown += [key for key in keys if key not in rows]
        if not np.isfinite(piece).all():
            bad = keys[int(np.argmin(np.isfinite(piece).all(axis=1)))]
            raise ValueError(f"{scores}: a score of {bad} isn't finite. Score the split again.")
        num_found += len(keys)
        if not unknown:
            yield np.array([rows[key] for key in keys], dtype=np.int64), piece
    missing = len(rows) - (num_found - len(unknown))
    if unknown or missing:
        example = f"; {unknown[0]} is no clip of it" if unknown else ""
        raise ValueError(
            f"{scores}: {missing} clips of {source.labels.path} have no scores, {len(unknown)} scores are of "
            f"other clips{example}. Score just these clips."
        )


def _write(path: Path, enhanced: LabelTable, source: Source) -> None:
    write_labels(path.with_name(f"{path.name}.csv"), enhanced, source.classes)
    write_datafile(path.with_name(f"{path.name}.json"), enhanced, source.classes, source.wavs)
    weights = compute_sample_weights(enhanced.indptr, enhanced.indices, len(source.classes))
    with replacing(path.with_name(f"{path.name}_weight.csv")) as temporary:
        np.savetxt(temporary, weights, delimiter=",")


def _print_added(
    stem: str, source: Source, enhanced: LabelTable, relations: Relations, threshold: Threshold
) -> None:
    added = count_added(source.labels, enhanced, relations)
    before, names = len(source.labels.indices), source.classes.names

    def share(count: int) -> str:
        return f"{count:,} ({100 * count / max(before, 1):.2f} %)"

    print(
        f"{stem}: {share(added.num_labels)} labels added to {before:,}, in {added.num_clips:,} of "
        f"{len(source.labels):,} clips; type I {share(added.num_type1)}, type II {share(added.num_type2)}"
    )
    _print_pairs(added.pairs.most_common(TOP_PAIRS), names)


def _print_pairs(pairs: Iterable[tuple[tuple[int, int], int]], names: tuple[str, ...]) -> None:
    for (had, got), count in pairs:
        print(f"  {count:>7,}  {names[had]} -> {names[got]}")
