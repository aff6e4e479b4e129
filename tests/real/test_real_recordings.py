"""The whole way on real recordings in FSD50K's layout: `make test-real REAL=FOLDER`. About ten minutes."""

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from psla_fast.cli import main
from psla_fast.shards import open_shards

pytestmark = [pytest.mark.real, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def real_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not os.environ.get("REAL"):
        pytest.skip("REAL names no folder: make test-real REAL=FOLDER, an FSD50K or a part of it")
    shards = tmp_path_factory.mktemp("real") / "shards"
    main(["pack", "fsd50k", os.environ["REAL"], str(shards)])
    return shards


def test_a_real_recording_is_the_same_clip_in_every_format(real_shards: Path, tmp_path: Path):
    root = Path(os.environ["REAL"])
    rows, wavs = ["path,labels,key"], sorted((root / "FSD50K.eval_audio").glob("*.wav"))[:40]
    formats = {"flac": (None, 0.0), "wav": ("FLOAT", 0.0), "ogg": ("VORBIS", 1.5), "mp3": (None, 1.5)}
    classes = tmp_path / "classes.csv"
    classes.write_text("index,mid,display_name\n0,/m/a,A\n")
    for wav in wavs:
        samples, rate = soundfile.read(wav, dtype="float32")
        for ending, (subtype, _) in formats.items():
            path = tmp_path / "audio" / f"{wav.stem}.{ending}"
            path.parent.mkdir(exist_ok=True)
            soundfile.write(path, samples, rate, subtype=subtype)
            rows.append(f"audio/{path.name},/m/a,{wav.stem}.{ending}")
    (tmp_path / "clips.csv").write_text("\n".join(rows) + "\n")
    out = tmp_path / "shards" / "all"
    main(["pack", "table", str(tmp_path / "clips.csv"), "--classes", str(classes), str(out)])
    main(["verify", str(out)])
    with open_shards(out) as packed, open_shards(real_shards / "eval") as originals:
        by_name = {packed.read_origin(clip_id)[0]: clip_id for clip_id in range(len(packed))}
        for ending, (_, most) in formats.items():
            differences = []
            for wav in wavs:
                original = originals.fbank(originals.keys.index(wav.stem))
                fbank = packed.fbank(by_name[f"{wav.stem}.{ending}"])
                frames = min(len(original), len(fbank))
                loud = original[:frames] > -8  # coders drop what is masked
                if loud.any():
                    differences.append(np.abs(fbank[:frames] - original[:frames])[loud].mean())
            assert np.median(differences) <= most, ending


def train_small(shards: Path, run: Path, *flags: str) -> float:
    """Train small_cpu and return the best eval mAP of single, averaged, ensemble."""
    main(["train", "small_cpu", "--data.shards", str(shards), "--run", str(run), *flags])
    names = ("best_single_result.csv", "wa_result.csv", "ensemble_result.csv")
    return max(float(np.loadtxt(run / name)[2]) for name in names)


def test_imagenet_weights_reach_076(real_shards: Path, tmp_path: Path):
    assert train_small(real_shards, tmp_path / "run") >= 0.76


def test_b0_from_nothing_passes_the_prototype(real_shards: Path, tmp_path: Path):
    flags = ["--model.name", "efficientnet_b0", "--model.pretrained", "none"]
    assert train_small(real_shards, tmp_path / "run", *flags) > 0.24
