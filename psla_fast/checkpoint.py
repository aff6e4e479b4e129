"""Checkpoints: a model with all that is needed to use it, in one file of tensors and plain values.

Or as safetensors with the plain values beside it as JSON, or as a folder of the Hugging Face Hub.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from psla_fast.augment import InputSpec
from psla_fast.classes import Classes
from psla_fast.fbank import FbankConfig
from psla_fast.files import replacing, write_atomically
from psla_fast.models import ModelConfig, build_model
from psla_fast.models.weights import fit_weights, read_torch_file

CHECKPOINT_VERSION = 1
HUB_WEIGHTS, HUB_CONFIG = "model.safetensors", "config.json"


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
        model = build_model(ModelConfig(**fields), len(self.card.classes), self.card.input.num_mels)
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
    """Read a checkpoint: FILE.pt, FILE.safetensors with FILE.json beside it, or a folder of the Hub.

    Raises ValueError for what is something else, damaged, or of another version.
    """
    if path.is_dir():
        return _load_safetensors(path / HUB_WEIGHTS, path / HUB_CONFIG)
    if path.suffix == ".safetensors":
        return _load_safetensors(path, path.with_suffix(".json"))
    content = read_torch_file(path)
    card = Card.from_plain(content, path)
    try:
        return Checkpoint(card, content["model"], content["epoch"], content["extra"])
    except KeyError as error:
        raise ValueError(
            f"{path} was written by another version of psla_fast ({error}). Use that one."
        ) from error


def save_safetensors(
    weights: Path, config: Path, card: Card, state: Mapping[str, Tensor], epoch: int
) -> None:
    """Write weights as safetensors, and the card and the epoch as JSON: last, so that it tells of both.

    Tensors that share memory are written one by one. The file holds a checksum of its tensors besides. Raises
    ValueError for a `config` that is there and is no card.
    """
    from safetensors.torch import save

    check_replaceable(config)
    whole = {
        name: value.detach().cpu().contiguous().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    config.unlink(missing_ok=True)  # it would tell of other weights
    # no other entry: their order would be another in each file
    write_atomically(weights, save(whole, {"sha256_of_tensors": _hash_tensors(whole)}))
    plain = json.dumps({**card.to_plain(), "epoch": epoch}, indent=2, ensure_ascii=False)
    write_atomically(config, f"{plain}\n".encode())


def check_replaceable(config: Path) -> None:
    """Raise ValueError where a file is in a card's place that isn't one: it is someone's own."""
    if not config.exists():
        return
    try:
        plain = json.loads(config.read_bytes())
    except (ValueError, IsADirectoryError):  # ValueError: also what isn't UTF-8
        plain = None
    if not isinstance(plain, dict) or not {"version", "model_config"} <= plain.keys():
        raise ValueError(
            f"{config}, where the model's card goes, is there and is no card. Move it, or give another name."
        )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file's tensors; raises ValueError where it isn't whole.

    The file's own checksum is compared where it has one, as those of `save_safetensors` do.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path} not found. Pass FILE.safetensors, or a folder that holds {HUB_WEIGHTS}.")
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            wanted = (file.metadata() or {}).get("sha256_of_tensors")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({str(error)[:120]}).") from error
    if wanted is not None and wanted != _hash_tensors(state):
        raise ValueError(f"{path} is damaged: its tensors differ from their checksum. Export it again.")
    return state


def _load_safetensors(weights: Path, config: Path) -> Checkpoint:
    if not config.is_file():
        raise ValueError(f"{config} not found. It belongs beside {weights.name}, and says what that is.")
    state = read_safetensors(weights)
    try:
        plain = json.loads(config.read_bytes())
    except ValueError as error:  # also what isn't UTF-8
        raise ValueError(f"{config} is not JSON ({error}). Export it again.") from error
    if not isinstance(plain, dict):
        raise ValueError(f"{config} holds a {type(plain).__name__}, not a psla_fast model's card.")
    card, epoch = Card.from_plain(plain, config), plain.get("epoch", 0)
    if not isinstance(epoch, int):
        raise ValueError(f"{config}: epoch is {epoch!r}; give a number. Or export it again.")
    return Checkpoint(card, state, epoch, {})


def _hash_tensors(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, in the names' order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
