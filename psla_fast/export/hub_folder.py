"""The Hugging Face Hub's layout: a folder of config.json, model.safetensors and README.md, its card."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from psla_fast.checkpoint import HUB_CONFIG, HUB_WEIGHTS, Card, check_replaceable, save_safetensors
from psla_fast.files import write_atomically

README = "README.md"


def save_hub_folder(folder: Path, card: Card, state: Mapping[str, Tensor], epoch: int) -> None:
    """Write a folder that `load_checkpoint` and `HubTagger.from_pretrained` read; its config comes last.

    A README.md that is there stays as it is, as huggingface_hub has it. Raises ValueError for a file, and
    for a folder with another program's config.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file. Give a folder.")
    check_replaceable(folder / HUB_CONFIG)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HUB_CONFIG).unlink(missing_ok=True)  # it would tell of other weights
    if not (folder / README).exists():
        num_parameters = sum(value.numel() for value in state.values() if value.is_floating_point())
        write_atomically(folder / README, format_readme(card, num_parameters).encode())
    save_safetensors(folder / HUB_WEIGHTS, folder / HUB_CONFIG, card, state, epoch)


def format_readme(card: Card, num_parameters: int) -> str:
    """Say in Markdown what a model hears, which classes it names, and how to load it."""
    spec, fbank, model = card.input, card.fbank, card.model
    seconds = ((spec.clip_frames - 1) * fbank.frame_shift_ms + fbank.frame_length_ms) / 1000
    head = f"{model.num_heads} attention heads" if model.num_heads else "mean pooling"
    pooling = head if model.pooling == "attention" else f"{model.pooling} pooling"
    padding = f"{spec.pad_value:g}" + (", left out of the pooling" if model.mask_padding else "")
    rows = "\n".join(
        f"| {index} | {mid} | {name.replace('|', '&#124;')} |"
        for index, (mid, name) in enumerate(zip(card.classes.mids, card.classes.names, strict=True))
    )
    return f"""---
library_name: psla_fast
pipeline_tag: audio-classification
tags:
- audio-tagging
---

# An audio tagger of {len(card.classes)} classes

{model.name} with {pooling}, {num_parameters / 1e6:.1f}M numbers, trained with psla_fast. Every class gets
a score of its own, so several may sound at once.

## What it hears

- mono, {fbank.sample_rate} Hz, samples in [-1, 1], their mean subtracted
- Kaldi log-mel fbank: {fbank.num_mels} mels from {fbank.low_freq:g} Hz, windows of
  {fbank.frame_length_ms:g} ms every {fbank.frame_shift_ms:g} ms, pre-emphasis {fbank.preemphasis:g}
- trained on clips of {spec.clip_frames} frames ({seconds:.2f} s); shorter ones are padded with {padding}
- normalised: (log-mel - {spec.mean:.6g}) / {spec.std:.6g}

## How to load it

```python
import torch
from psla_fast.export import HubTagger

tagger = HubTagger.from_pretrained("this/folder")
waveform = torch.zeros(1, {round(seconds * fbank.sample_rate)})  # (clips, samples)
scores = tagger.score_waveforms(waveform)  # (clips, {len(card.classes)}), in the order of the classes
names = tagger.card.classes.names
```

`psla-fast evaluate`, `ensemble`, `average` and `export` take the folder as a checkpoint.

## Classes

| index | mid | name |
|---|---|---|
{rows}
"""
