"""HubTagger: a folder of the Hugging Face Hub, or a repository on it, as a network: extra `export`."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import Tensor, nn

from psla_fast.checkpoint import HUB_CONFIG, Card, read_safetensors
from psla_fast.export.hub_folder import format_readme, save_hub_folder
from psla_fast.export.scorer import FbankScorer, WaveformScorer
from psla_fast.models import build_model
from psla_fast.models.weights import fit_weights


class HubTagger(nn.Module, PyTorchModelHubMixin):
    """A model and its card: `from_pretrained(folder or repository)` loads, `save_pretrained` writes them."""

    def __init__(self, **config: Any) -> None:
        """Build the model of a config.json, its weights random; ValueError where that is no model's card."""
        super().__init__()
        self.card = Card.from_plain(config, Path(HUB_CONFIG))
        self.epoch = int(config.get("epoch", 0))
        settings = replace(self.card.model, pretrained="none")
        self.model = build_model(settings, len(self.card.classes), self.card.input.num_mels)

    def forward(self, fbank: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """Score normalised log-mels (B, T, F), as the model does: (B, C)."""
        scores: Tensor = self.model(fbank) if num_frames is None else self.model(fbank, num_frames)
        return scores

    @torch.no_grad()
    def score_waveforms(self, waveform: Tensor) -> Tensor:
        """Score waveforms (B, S) in [-1, 1] at the card's sample rate, whole: (B, C).

        Shorter ones than the clips of training are padded as there. The scores are where the model is, and
        the waveforms may be elsewhere.
        """
        device = next(self.model.parameters()).device
        scores: Tensor = self._scorer.to(device)(waveform.to(device))
        return scores

    @cached_property  # past nn.Module's own attributes: state_dict holds the model once
    def _scorer(self) -> WaveformScorer:
        return WaveformScorer(FbankScorer(self.model, self.card.input), self.card.fbank)

    def _save_pretrained(self, save_directory: Path) -> None:
        save_hub_folder(save_directory, self.card, self.model.state_dict(), self.epoch)

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        fit_weights(model.model, read_safetensors(Path(model_file)), model_file)
        return model.to(map_location).eval()

    @classmethod
    def _load_as_pickle(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        raise ValueError(f"{model_file} is a pickle. Export the model again: psla-fast export --format hub.")

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Give what README.md says."""
        return ModelCard(format_readme(self.card, sum(value.numel() for value in self.model.parameters())))
