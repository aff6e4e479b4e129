"""What `psla-fast evaluate` measures by choice: a table of classes, intervals, decisions at thresholds."""

# N clips, C classes

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from psla_fast.checkpoint import load_checkpoint
from psla_fast.classes import Classes
from psla_fast.ensemble import refuse_shared_clips
from psla_fast.evaluate import Evaluation
from psla_fast.files import write_atomically
from psla_fast.metrics import (
    Bootstrap,
    bootstrap_metrics,
    compute_lwlrap,
    compute_thresholds,
    d_prime,
    measure_classes,
    measure_decisions,
)
from psla_fast.scores import read_scores
from psla_fast.shards import open_shards
from psla_fast.tagger.thresholds import read_thresholds


@dataclass(frozen=True)
class Measures:
    """What to measure: checked before a model scores for long; thresholds (C,) are those of `source`."""

    classes: Classes
    per_class: Path | None
    num_resamples: int
    thresholds: npt.NDArray[np.float32] | None
    source: Path | None


def prepare_measures(
    checkpoint: Path, data: str, per_class: Path | None, num_resamples: int, thresholds: Path | None
) -> Measures:
    """Check what is asked for, and read the thresholds; raises ValueError that says what is wrong.

    The file of the thresholds may have no clip in common with the packed split `data`.
    """
    if per_class and (per_class.is_dir() or not per_class.resolve().parent.is_dir()):
        raise ValueError(f"--per-class {per_class} can't be written: give a file in a folder that is there.")
    if num_resamples < 0 or num_resamples == 1:
        raise ValueError(f"--bootstrap is {num_resamples}; give 2 or more, for instance 1000, or 0 for none.")
    classes = load_checkpoint(checkpoint).card.classes
    found = None
    if thresholds is not None:
        found = read_thresholds(thresholds, classes)
        with open_shards(data) as shards:
            refuse_shared_clips(
                read_scores(thresholds).keys, shards.keys, f"--thresholds {thresholds} and {data}"
            )
    return Measures(classes, per_class, num_resamples, found, thresholds)


def print_measures(asked: Measures, result: Evaluation) -> None:
    """Measure what was asked for and print it, a line each; write the table of classes."""
    intervals = None
    if asked.num_resamples:
        intervals = bootstrap_metrics(result.scores, result.targets, asked.num_resamples)
        but = f", but {intervals.num_untold:,} that tell no class" if intervals.num_untold else ""
        print(
            f"{intervals.confidence:.0%} intervals from {asked.num_resamples:,} resamples of the clips{but}; "
            f"they lack {intervals.mean_left_out:.1f} classes on average: mAP {intervals.mean_ap}, "
            f"AUC {intervals.mean_auc}, d-prime {intervals.d_prime}, lwlrap {intervals.lwlrap}"
        )
    if asked.thresholds is not None:
        at = measure_decisions(result.scores, result.targets, asked.thresholds)
        means = f"precision {at.macro_precision:.4f}, recall {at.macro_recall:.4f}, F1 {at.macro_f1:.4f}"
        micro = f"{at.micro_precision:.4f}, {at.micro_recall:.4f}, {at.micro_f1:.4f}"
        print(
            f"at each class's best threshold on {asked.source}: {means} (means over classes; precision 0 for "
            f"{at.num_never_found} never found); {micro} over all labels together"
        )
    if asked.per_class:
        write_per_class(
            asked.per_class, asked.classes, result.scores, result.targets, asked.thresholds, intervals
        )
        print(f"each class is in {asked.per_class}")


def write_per_class(
    path: Path,
    classes: Classes,
    scores: npt.NDArray[np.floating],
    targets: npt.NDArray[np.generic],
    thresholds: npt.NDArray[np.floating] | None = None,
    intervals: Bootstrap | None = None,
) -> None:
    """Write a CSV with a row a class: positives, AP, AUC, d', lwlrap; precision, recall, F1 at a threshold.

    scores, targets (N, C). Without thresholds (C,) they are those with the best F1 on these very clips, and
    the columns' names say so. With intervals there are the AP's. What can't be told of a class stays empty.
    """
    figures, ranking = measure_classes(scores, targets), compute_lwlrap(scores, targets)
    best = "best_" if thresholds is None else ""
    chosen = compute_thresholds(scores, targets) if thresholds is None else thresholds
    decisions = measure_decisions(scores, targets, chosen)
    decided = {
        f"{best}threshold": chosen,
        f"{best}precision": decisions.precision,
        f"{best}recall": decisions.recall,
        f"{best}F1": decisions.f1,
    }
    if best:  # the best threshold of a class without positives is a guess
        decided = {name: np.where(figures.num_positive > 0, v, np.nan) for name, v in decided.items()}
    columns = {
        "AP": figures.average_precision,
        "AUC": figures.roc_auc,
        "d_prime": np.array([d_prime(auc) for auc in figures.roc_auc]),
        "lwlrap": ranking.class_lwlrap,
        **decided,
    }
    if intervals is not None:
        columns |= {"AP_low": intervals.class_ap[:, 0], "AP_high": intervals.class_ap[:, 1]}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", "mid", "display_name", "num_positive", *columns])
    for index, (mid, name) in enumerate(zip(classes.mids, classes.names, strict=True)):
        values = ["" if np.isnan(column[index]) else f"{column[index]:.6g}" for column in columns.values()]
        writer.writerow([index, mid, name, figures.num_positive[index], *values])
    write_atomically(path, text.getvalue().encode())
