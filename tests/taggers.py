"""Checkpoints of small networks, and sounds, for the tests of tagging."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import torch
from torch import nn

import tests.tiny  # noqa: F401 - registers tiny
from psla_fast.augment import InputSpec
from psla_fast.checkpoint import Card, save_checkpoint
from psla_fast.classes import Classes
from psla_fast.fbank import FbankConfig
from psla_fast.models import ModelConfig, build_model
from tests.makers import CLASSES


def save_model(
    path: Path, name: str = "tiny", clip_frames: int = 96, classes: Classes = CLASSES, **fields: Any
) -> Path:
    """A checkpoint of a network as it starts, but for BatchNorms that do something."""
    torch.manual_seed(0)
    config = ModelConfig(name, **fields)
    model = build_model(config, len(classes))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
            nn.init.normal_(module.running_mean, 0.0, 0.1)  # type: ignore[arg-type]
    card = Card(config, classes, InputSpec(clip_frames, 128, -15.94, -4.6476, 4.5699), FbankConfig())
    save_checkpoint(path, card, model.state_dict(), 1)
    return path


def make_noise(seconds: float, rate: int = 16000, seed: int = 0) -> npt.NDArray[np.float32]:
    """Noise (samples,) whose loudness swells and fades each second."""
    num_samples = round(seconds * rate)
    swell = 0.3 + 0.25 * np.sin(2 * np.pi * np.arange(num_samples) / rate)
    noise = np.random.default_rng(seed).uniform(-1, 1, num_samples)
    return (swell * noise).astype(np.float32)


def write_noise(path: Path, seconds: float, rate: int = 16000, seed: int = 0) -> Path:
    """A file of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, make_noise(seconds, rate, seed), rate)
    return path
