"""Views: one run -> what the page draws of it: curves, results, figures by class, confusions."""

import math
from typing import Any

import numpy as np

from psla_fast.report.confusion import choose_classes, compute_confusion, find_pairs
from psla_fast.report.log import step_curves
from psla_fast.report.numbers import plain, plain_list
from psla_fast.report.runs import KINDS, Run
from psla_fast.report.scored import Scored
from psla_fast.report.tables import result_of

MOST_PAIRS = 60
HEAT_CLASSES = 20
VAL_COLUMNS = {
    "map": 0,
    "auc": 1,
    "train_loss": 5,
    "val_loss": 6,
    "map_ensemble": 7,
    "auc_ensemble": 8,
    "lr": 9,
}


def view_run(run: Run, scored: Scored | None, role: str, group: int) -> dict[str, Any]:
    """Give a run's name, group and seed, its curves, results (mAP, AUC), AP by class and confusions."""
    results = {kind: result_of(run, kind, role) for kind in KINDS}
    view: dict[str, Any] = {
        "name": run.name,
        "group": group,
        "best_epoch": run.best_epoch,
        "epochs": epoch_curves(run, role),
        "steps": {name: plain_list(values) for name, values in step_curves(run.log).items()},
        "results": {kind: plain_list(pair) for kind, pair in results.items() if pair},
        "ap": {},
        "confusion": None,
    }
    if scored:
        view["ap"] = {kind: plain_list(values, 4) for kind, values in scored.average_precisions().items()}
        view["confusion"] = view_confusion(scored)
        view["main"] = scored.main
    return view


def epoch_curves(run: Run, role: str) -> dict[str, list[float | None]]:
    """Give each epoch's figures on a split, alone and ensembled, both losses and the learning rate.

    Those of val are result.csv's; those of eval the log's, null for epochs that it doesn't tell.
    """
    curves = {name: plain_list(run.table[:, column]) for name, column in VAL_COLUMNS.items()}
    if role == "eval":
        split = run.split_name(role)
        rows = [run.log.epochs.get(epoch, {}) for epoch in range(1, len(run.table) + 1)]
        for name, key in (
            ("map", f"{split}/mean_ap"),
            ("auc", f"{split}/mean_auc"),
            ("map_ensemble", f"{split}_ensemble/mean_ap"),
            ("auc_ensemble", f"{split}_ensemble/mean_auc"),
        ):
            curves[name] = plain_list(row.get(key) for row in rows)
    return curves


def view_confusion(scored: Scored) -> dict[str, Any]:
    """Give the pairs (labelled class, other class) that are confused most, and a heat map of theirs."""
    confusion = compute_confusion(scored.scores[scored.main], scored.targets)
    pairs = find_pairs(confusion, MOST_PAIRS)
    classes = choose_classes(confusion, pairs, HEAT_CLASSES)
    cells = confusion.scored[np.ix_(classes, classes)] if classes else np.empty((0, 0))
    return {
        "pairs": [
            {
                "labelled": a,
                "other": b,
                "score": plain(float(confusion.scored[a, b]), 4),
                "elsewhere": plain(float(confusion.elsewhere[a, b]), 4),
                "clips": int(confusion.num_clips[a, b]),
            }
            for a, b in pairs
        ],
        "classes": classes,
        "cells": [plain_list(row, 3) for row in cells],
        "highest": max(
            (float(confusion.scored[a, b]) for a, b in pairs if math.isfinite(confusion.scored[a, b])),
            default=0,
        ),
    }
