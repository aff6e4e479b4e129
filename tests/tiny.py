"""A network without BatchNorm that trains in milliseconds, and runs with it, for the tests of training."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from psla_fast.distributed import World
from psla_fast.models import ModelConfig, register
from psla_fast.recipe import parse_recipes
from psla_fast.train.config import TrainConfig
from psla_fast.train.loop import Trainer
from tests.ranks import run_on_ranks


class TinyNet(nn.Module):
    """Two layers over mels, dropout, mean over time."""

    def __init__(self, num_mels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(num_mels, 16), nn.ReLU(), nn.Dropout(dropout))
        self.attention = nn.Linear(16, num_classes)

    def forward(self, fbank: Tensor) -> Tensor:
        return torch.sigmoid(self.attention(self.layers(fbank))).mean(dim=1)


@register("tiny")
def build_tiny(config: ModelConfig, num_classes: int, num_mels: int) -> nn.Module:
    return TinyNet(num_mels, num_classes, config.drop_connect)


def tiny_config(shards: Path, run: Path, *flags: str) -> TrainConfig:
    base = ["--data.shards", str(shards), "--run", str(run), "--model.name", "tiny", "--precision", "fp32"]
    base += ["--input.clip-frames", "100", "--optim.batch-size", "8", "--optim.epochs", "3"]
    base += ["--optim.warmup-steps", "4", "--optim.warmup-every-steps", "1", "--optim.lr", "0.01"]
    base += ["--wa.start", "2", "--wa.end", "3", "--log-every-steps", "1", "--augment.time-mask-frames", "30"]
    return parse_recipes(TrainConfig, [*base, *flags], "test")


def train_tiny(config: TrainConfig) -> Trainer:
    trainer = Trainer(config, World(0, 1, torch.device("cpu")))
    trainer.run()
    return trainer


def _train_rank(world: World, shards: Path, run: Path, flags: tuple[str, ...]) -> None:
    Trainer(tiny_config(shards, run, *flags), world).run()


def train_tiny_on_ranks(num_ranks: int, shards: Path, run: Path, *flags: str) -> None:
    run_on_ranks(num_ranks, _train_rank, shards, run, flags)


def step_rows(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("epoch", "step", "loss", "lr")} for row in rows if "step" in row]
