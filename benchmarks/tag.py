"""Tagging 10 s wavs by EfficientNet-B2 with 527 classes: upstream's way, ours, the model alone; cold start.

Upstream's way is a file at a time: soundfile, torchaudio's resample, its Kaldi fbank, the float32 model as it
is. Ours is Tagger.stream. The model alone has ready batches. A cold start is a new process's first answer.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter

import soundfile
import torch
import torchaudio
from record import interleave, paired_ratio, print_table, read_environment, summarise, write_record
from step_upstream import UpstreamTagger
from stream_upstream import compute_psla_fbank
from synthetic import make_classes, make_wavs

from psla_fast.augment import InputSpec
from psla_fast.checkpoint import Card, save_checkpoint
from psla_fast.errors import exit_on_user_error
from psla_fast.evaluate import Precision
from psla_fast.fbank import PSLA_MEAN, PSLA_STD, FbankConfig
from psla_fast.models import ModelConfig, build_model
from psla_fast.recipe import parse_flags
from psla_fast.tagger import Tagger, Tagging
from psla_fast.tagger.windows import make_window

ROOT = Path(__file__).resolve().parent.parent
WAV_RATE, WAV_SECONDS, CLIP_FRAMES, NUM_HEADS = 44100, 10, 1056, 4
OURS, ALONE, UPSTREAM, SINGLE, OURS_FP32 = (
    "ours",
    "model alone",
    "upstream",
    "ours, a file a call",
    "ours, fp32",
)


@dataclass(frozen=True)
class TagBenchmark:
    """Measure tagging."""

    num_files: int = 48
    """Wavs of 10 s a trial; upstream's way and a file a call get a quarter of them."""
    batch_size: int = 16
    """Windows scored at once."""
    model: str = "efficientnet_b2"
    """The model."""
    precision: Precision = "auto"
    """Of ours and of the model alone."""
    trials: int = 5
    """Rounds, after one to warm up; as many cold starts."""
    tiny: bool = False
    """A run of seconds, for CI; its numbers mean nothing and are not kept."""


def write_checkpoint(folder: Path, name: str) -> Path:
    """Write a checkpoint of the model as it starts."""
    config, classes = ModelConfig(name, num_heads=4), make_classes(folder)
    card = Card(config, classes, InputSpec(CLIP_FRAMES, 128, 0.0, PSLA_MEAN, PSLA_STD), FbankConfig())
    save_checkpoint(folder / "model.pt", card, build_model(config, len(classes)).state_dict(), epoch=0)
    return folder / "model.pt"


def rate(run: Callable[[], int]) -> Callable[[], float]:
    """Give seconds of audio a second of what returns how many files it tagged."""

    def measure() -> float:
        start = perf_counter()
        return run() * WAV_SECONDS / (perf_counter() - start)

    return measure


def tag_upstream(model: torch.nn.Module, device: torch.device, wavs: list[Path]) -> int:
    """Tag file after file upstream's way."""
    for wav in wavs:
        samples, _ = soundfile.read(wav, dtype="float32")
        waveform = torchaudio.functional.resample(torch.from_numpy(samples), WAV_RATE, 16000)
        fbank = compute_psla_fbank(waveform - waveform.mean())
        padded = torch.nn.functional.pad(fbank, (0, 0, 0, CLIP_FRAMES - len(fbank)))
        with torch.no_grad():
            model(((padded - PSLA_MEAN) / PSLA_STD)[None].to(device)).cpu()
    return len(wavs)


def measure(config: TagBenchmark, checkpoint: Path, wavs: list[Path]) -> dict[str, list[float]]:
    """Seconds of audio a second by contestant and round."""
    tagger = Tagger.from_checkpoint(checkpoint, "auto", config.precision, config.batch_size)
    fp32 = Tagger.from_checkpoint(checkpoint, "auto", "fp32", config.batch_size)
    device, few = tagger.scorer.device, wavs[: max(1, len(wavs) // 4)]
    upstream = UpstreamTagger(config.model.replace("_", "-"), len(tagger.classes)).to(device).eval()
    batch = [make_window(0, torch.randn(10 * 16000).numpy(), FbankConfig())] * config.batch_size
    runs: dict[str, Callable[[], int]] = {
        UPSTREAM: lambda: tag_upstream(upstream, device, few),
        OURS: lambda: sum(isinstance(result, Tagging) for result in tagger.stream(wavs)),
        "ours, fp32": lambda: sum(isinstance(result, Tagging) for result in fp32.stream(wavs)),
        "ours, a file a call": lambda: sum(isinstance(tagger(wav), Tagging) for wav in few),
        ALONE: lambda: sum(len(tagger.scorer.score(batch, tagger.cut)) for _ in range(2)),
    }
    return interleave({name: rate(run) for name, run in runs.items()}, config.trials)


def start_cold(checkpoint: Path, wav: Path) -> float:
    """Seconds from starting `psla-fast tag WAV` to its end."""
    start = perf_counter()
    command = [sys.executable, str(ROOT / "tools/tag.py"), str(wav), "--checkpoint", str(checkpoint)]
    subprocess.run(command, check=True, capture_output=True)
    return perf_counter() - start


def main() -> None:
    """Measure, print the tables, write the record."""
    config = parse_flags(TagBenchmark, sys.argv[1:], "benchmarks/tag.py")
    environment = read_environment()
    if config.tiny:
        config = replace(config, num_files=4, batch_size=2, model="efficientnet_b0", trials=1)
    with tempfile.TemporaryDirectory(prefix="psla_fast_tag_") as temporary:
        folder = Path(temporary)
        checkpoint = write_checkpoint(folder, config.model)
        wavs = make_wavs(folder, config.num_files, WAV_RATE)
        cold = [start_cold(checkpoint, wavs[0]) for _ in range(config.trials + 1)][1:]
        rates = measure(config, checkpoint, wavs)
    shares = {name: paired_ratio(values, rates[UPSTREAM])["median"] for name, values in rates.items()}
    print_table(
        [f"{config.model}, batches of {config.batch_size}", "× real time", "p10", "p90", "/ upstream"],
        [[name, *summarise(values).values(), f"{shares[name]:.2f}"] for name, values in rates.items()],
    )
    print_table(["cold start", "s", "p10", "p90"], [["psla-fast tag WAV", *summarise(cold).values()]])
    ratios = {f"{name}/upstream": share for name, share in shares.items() if name != UPSTREAM}
    record = {
        "benchmark": "tag",
        "ratios": {**ratios, "ours/model alone": paired_ratio(rates[OURS], rates[ALONE])["median"]},
        "audio_seconds_per_second": {name: summarise(values) for name, values in rates.items()},
        "cold_start_seconds": summarise(cold),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "config": asdict(config),
        "environment": environment,
    }
    write_record(record, keep=not config.tiny)


if __name__ == "__main__":
    with exit_on_user_error("benchmarks/tag.py"):
        main()
