"""Checkpoints: a model with all that is needed to use it, in one file of tensors and plain values."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from psla_fast.augment import InputSpec
from psla_fast.classes import Classes
from psla_fast.fbank import FbankConfig
from psla_fast.files import replacing
from psla_fast.models import ModelConfig, build_model
from psla_fast.models.weights import fit_weights, read_torch_file

CHECKPOINT_VERSION = 1


@dataclass(frozen=True)
class Card:
    """What a checkpoint says of its model: how to build it, what it hears, and what its outputs mean."""

    model: ModelConfig
    classes: Classes
    input: InputSpec
    fbank: FbankConfig

    def to_plain(self) -> dict[str, Any]:
        """Turn into nested plain values, as checkpoints and config files hold them."""
        return {
            "version": CHECKPOINT_VERSION,
            "model_config": asdict(self.model),
            "classes": {"mids": list(self.classes.mids), "names": list(self.classes.names)},
            "input": asdict(self.input),
            "fbank": asdict(self.fbank),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], source: Path) -> Self:
        """Turn back; raises ValueError that names `source` for what isn't a card, or of another version."""
        if plain.get("version") != CHECKPOINT_VERSION or "model_config" not in plain:
            found = plain.get("version", "no version")
            raise ValueError(
                f"{source} is not a psla_fast checkpoint ({found}). Pass a file of RUN/checkpoints."
            )
        try:
            return cls(
                ModelConfig(**plain["model_config"]),
                Classes(tuple(plain["classes"]["mids"]), tuple(plain["classes"]["names"])),
                InputSpec(**{**plain["input"], "buckets": tuple(plain["input"].get("buckets", ()))}),
                FbankConfig(**plain["fbank"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{source} was written by another version of psla_fast ({error}). Use that one."
            ) from error


@dataclass(frozen=True)
class Checkpoint:
    """A file's card and weights, and the epoch after which they were saved (0: not from training)."""

    card: Card
    state: dict[str, Tensor]
    epoch: int
    extra: dict[str, Any]

    def build(self) -> nn.Module:
        """Build the model with these weights, in eval mode."""
        fields = {**asdict(self.card.model), "pretrained": "none"}
        model = build_model(ModelConfig(**fields), len(self.card.classes))
        fit_weights(model, self.state, "the checkpoint")
        return model.eval()


def save_checkpoint(
    path: Path, card: Card, state: Mapping[str, Tensor], epoch: int, extra: dict[str, Any] | None = None
) -> None:
    """Write a checkpoint atomically; `extra` takes tensors and plain values, for resuming."""
    content = {
        **card.to_plain(),
        "model": {name: value.detach().cpu() for name, value in state.items()},
        "epoch": epoch,
        "extra": extra or {},
    }
    with replacing(path) as temporary:
        torch.save(content, temporary)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; raises ValueError for a file that is something else or of another version."""
    content = read_torch_file(path)
    card = Card.from_plain(content, path)
    try:
        return Checkpoint(card, content["model"], content["epoch"], content["extra"])
    except KeyError as error:
        raise ValueError(
            f"{path} was written by another version of psla_fast ({error}). Use that one."
        ) from error
