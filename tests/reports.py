"""Run folders written by the trainer's own code but without training, for the tests of psla_fast.report."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from psla_fast.augment import InputSpec
from psla_fast.checkpoint import Card, save_checkpoint
from psla_fast.classes import Classes
from psla_fast.fbank import FbankConfig
from psla_fast.metrics import compute_metrics
from psla_fast.scores import add_epoch_scores
from psla_fast.train.results import EpochResult, RunFolder
from tests.tiny import tiny_config

HOSTILE = Classes(
    ("/m/a", "/m/b", "/m/c", "/m/d", "/m/e"),
    (
        "<script>window.hit=1</script>",
        "<img src=x onerror=window.hit=2>",
        "</script><script>window.hit=3</script>",
        "\"quoted\" 'twice' & <!-- ",
        "Plain_name",
    ),
)


def make_classes(num_classes: int) -> Classes:
    """Class i is `Class i`, /m/i."""
    numbers = range(num_classes)
    return Classes(tuple(f"/m/{n}" for n in numbers), tuple(f"Class {n}" for n in numbers))


def make_targets(num_clips: int, num_classes: int) -> np.ndarray:
    """Targets (N, C): clip n has class n mod C - 1, every third one the next class, too; no clip the last."""
    targets = np.zeros((num_clips, num_classes), np.uint8)
    clips = np.arange(num_clips)
    targets[clips, clips % (num_classes - 1)] = 1
    targets[clips[::3], (clips[::3] + 1) % (num_classes - 1)] = 1
    return targets


def write_run(
    path: Path,
    *flags: str,
    classes: Classes | None = None,
    clips: int = 24,
    splits: tuple[str, ...] = ("val", "eval"),
    epochs: int = 3,
    shards: Path = Path("gone"),
) -> Path:
    """A run of 3 epochs of which some are done; its scores get better from epoch to epoch, by its seed."""
    config = tiny_config(shards, path, *flags)
    classes = classes or make_classes(5)
    folder, rng = RunFolder(path), np.random.default_rng(config.seed)
    folder.start(config)
    targets = torch.from_numpy(make_targets(clips, len(classes)).astype(np.float32))
    sums = {name: torch.zeros(targets.shape) for name in splits}
    rows: list[list[float]] = []
    card = Card(config.model, classes, InputSpec(100, 128, 0.0, -4.6, 4.6), FbankConfig())
    for epoch in range(1, epochs + 1):
        for step in (1, 2, 3, 4):
            measured: dict[str, Any] = {"loss": 1 / (epoch + step / 4), "lr": 0.01}
            measured |= {"clips_per_second": 100.0 + step, "loader_wait": 0.01 * step}
            folder.log({"epoch": epoch, "step": step, **measured})
        noise = {name: torch.from_numpy(rng.random(targets.shape).astype(np.float32)) for name in splits}
        scores = {name: 0.2 * epoch * targets + (1 - 0.2 * epoch) * noise[name] for name in splits}
        single, ensemble = [], []
        for name in splits:
            sums[name] += scores[name]
            mean = sums[name] / epoch
            single.append(compute_metrics(scores[name].numpy(), targets.numpy()))
            ensemble.append(compute_metrics(mean.numpy(), targets.numpy()))
            keys = [f"clip{number:04d}" for number in range(clips)]
            arrays = scores[name].numpy(), mean.numpy(), targets.numpy()
            add_epoch_scores(folder.scores / f"{name}.h5", epoch, keys, *arrays)
        result = EpochResult(single[0], ensemble[0], 1 / epoch, 1.5 / epoch, 0.01)
        rows.append(result.row())
        folder.write_table("result.csv", rows)
        folder.write_summary("best_single_result.csv", single)
        folder.write_summary("ensemble_result.csv", ensemble)
        folder.log_epoch(epoch, result, list(splits), single, ensemble)
        save_checkpoint(folder.checkpoints / "best.pt", card, {"bias": torch.zeros(1)}, epoch)
    if epochs == config.optim.epochs:
        folder.write_summary("wa_result.csv", ensemble)
    return path


def read_data(page: str) -> dict[str, Any]:
    """The JSON that a page embeds."""
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match
    data: dict[str, Any] = json.loads(match[1])
    return data
