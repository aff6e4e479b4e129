"""Train with waveforms mixed as upstream does, their fbank computed on the fly; all else is psla_fast.train.

`python benchmarks/waveform_mixup.py FSD50K RECIPE… [--flag value]…`: FSD50K is the folder that was packed.
"""

# B clips of a batch, S samples, T frames, F mels, C classes

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from psla_fast.augment import mix_targets
from psla_fast.distributed import end_world, start_world
from psla_fast.errors import exit_on_user_error
from psla_fast.fbank import compute_fbank
from psla_fast.pack import PackConfig
from psla_fast.pack.recordings import read_recording
from psla_fast.recipe import parse_recipes
from psla_fast.shards import Shards
from psla_fast.shards.spec import make_key
from psla_fast.sources import read_fsd50k
from psla_fast.stream import Batch, BatchPlan, BatchShape, StreamConfig
from psla_fast.train.config import TrainConfig
from psla_fast.train.loop import Trainer

LARGEST_STEP = 0.02  # log-mel: float16 rounds to 0.004 at -15.94, and another order of sums adds to that


class WaveformStream:
    """A stream whose clips are mixed as waveforms: its rows have no partners, and their targets are mixed."""

    def __init__(
        self,
        root: Path,
        shards: Shards,
        config: StreamConfig,
        shapes: Sequence[BatchShape],
        device: torch.device,
    ) -> None:
        """Decode all clips; ValueError where one is missing or isn't what was packed. `config` is unused."""
        self._shards, self._device = shards, device
        self._waveforms = read_waveforms(root, shards)
        most = max(shape.num_frames for shape in shapes)
        self.largest_difference = 0.0
        for clip_id in range(len(shards)):
            stored = torch.from_numpy(shards.fbank(clip_id)[:most])
            fbank = self._compute_fbank(self._waveforms[clip_id], most)
            if stored.shape != fbank.shape:
                raise ValueError(f"{shards.keys[clip_id]}: {root} has another length than {shards.location}.")
            self.largest_difference = max(self.largest_difference, float((stored - fbank).abs().max()))
        print(
            f"waveforms' fbanks differ from the shards' by {self.largest_difference:.4f} at most", flush=True
        )
        if self.largest_difference > LARGEST_STEP and shards.storage.dtype == "float16":
            raise ValueError(f"{root} isn't what {shards.location} was packed from. Pass that folder.")

    def batches(self, plans: Iterator[BatchPlan]) -> Iterator[Batch]:
        """Yield a batch for each plan: rows already mixed, each its own partner."""
        for plan in plans:
            yield self._mix(plan)

    def close(self) -> None:
        """Let the waveforms go."""
        self._waveforms = []

    def _mix(self, plan: BatchPlan) -> Batch:
        batch_size, most = len(plan.clip_ids), plan.shape.num_frames
        num_mels, storage = self._shards.fbank_config.num_mels, self._shards.storage
        stored = np.zeros((batch_size, most, num_mels), dtype=storage.numpy)
        num_frames = torch.zeros(batch_size, dtype=torch.int64)
        partner_ids = np.where(plan.partner_ids >= 0, plan.partner_ids, plan.clip_ids)
        for row, (clip_id, partner_id) in enumerate(zip(plan.clip_ids, partner_ids, strict=True)):
            waveform = self._waveforms[clip_id]
            if plan.partner_ids[row] >= 0:
                waveform = mix_waveforms(waveform, self._waveforms[partner_id], float(plan.lam[row]))
            fbank = self._compute_fbank(waveform, most)
            stored[row, : len(fbank)], num_frames[row] = storage.encode(fbank.numpy()), len(fbank)
        lam = torch.from_numpy(plan.lam)
        targets, partners = (torch.from_numpy(self._shards.targets(i)) for i in (plan.clip_ids, partner_ids))
        mixed = mix_targets(targets, partners, lam)
        rows = (torch.from_numpy(stored), num_frames, mixed, torch.arange(batch_size), torch.ones(batch_size))
        return Batch(plan.clip_ids, *(tensor.to(self._device) for tensor in rows))

    def _compute_fbank(self, waveform: Tensor, most: int) -> Tensor:
        """Compute the first frames (≤ most, F) of a waveform's fbank."""
        config = self._shards.fbank_config
        samples = config.window_samples + (most - 1) * config.shift_samples
        return compute_fbank(waveform[:samples], config)


def mix_waveforms(waveform: Tensor, partner: Tensor, lam: float) -> Tensor:
    """PSLA's mix λ·x1 + (1-λ)·x2 of two waveforms (S,), x2 cut or zero-padded; its mean is subtracted."""
    partner = torch.nn.functional.pad(partner, (0, len(waveform) - len(partner)))  # a negative pad cuts
    mixed = lam * waveform + (1 - lam) * partner
    return mixed - mixed.mean()


def read_waveforms(root: Path, shards: Shards) -> list[Tensor]:
    """Read the waveforms (S,) of all clips by clip id, as pack did."""
    config = PackConfig(fbank=shards.fbank_config)
    split = next(split for split in read_fsd50k(root)[1] if split.name == Path(shards.location).name)
    clips = {make_key(clip.name): clip for clip in split.read()}
    if missing := [key for key in shards.keys if key not in clips]:
        raise ValueError(
            f"{root} has no clip {missing[0]} ({len(missing)} are missing). Pass what was packed."
        )
    return [torch.from_numpy(read_recording(split.root, clips[key], config)) for key in shards.keys]


def main() -> None:
    """Train as told; a run that was stopped (its last line is then an error) goes on."""
    root, *arguments = sys.argv[1:]
    config = parse_recipes(TrainConfig, arguments, "benchmarks/waveform_mixup.py")
    if config.augment.gain_db > 0:
        raise ValueError("augment.gain_db acts on clips before they are mixed. Leave it out.")
    world = start_world(config.device)
    Trainer(config, world, partial(WaveformStream, Path(root))).run()
    end_world()


if __name__ == "__main__":
    with exit_on_user_error("benchmarks/waveform_mixup.py"):
        main()
