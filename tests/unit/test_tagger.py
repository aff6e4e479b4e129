import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import psla_fast.tagger.feed
from psla_fast.checkpoint import load_checkpoint
from psla_fast.evaluate import evaluate_checkpoint
from psla_fast.models import Backbone, ModelConfig, TaggerNet, TimeGrid, register
from psla_fast.shards import open_shards
from psla_fast.tagger import Failure, Tagger, Tagging, Timeline, Windowing
from psla_fast.tagger.recordings import Recording
from psla_fast.tagger.scorer import Scorer
from psla_fast.tagger.windows import Window, cut_windows
from tests.makers import CLASSES
from tests.taggers import make_noise, save_model, write_noise

ROOT = Path(__file__).resolve().parents[2]


class Strided(torch.nn.Module):
    """Without padding: T' = ⌊(T - 43) / 32⌋."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 5, (8, 75), (8, 32))

    def extract_features(self, picture: torch.Tensor) -> torch.Tensor:
        return self.layer(picture)


class Resized(Strided):
    """Five steps of a clip of any length."""

    def extract_features(self, picture: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(super().extract_features(picture), (1, 5))


@register("tagger-strided", "tagger-resized")
def build_strided(config: ModelConfig, num_classes: int, num_mels: int) -> torch.nn.Module:
    module = Strided() if config.name == "tagger-strided" else Resized()
    return TaggerNet(Backbone(module, 5, num_mels), num_classes, config)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EfficientNet-B0 with 4 heads."""
    return save_model(tmp_path_factory.mktemp("net") / "b0.pt", "efficientnet_b0")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("net") / "tiny.pt")


def load(path: Path, **settings: Any) -> Tagger:
    return Tagger.from_checkpoint(path, device="cpu", precision="fp32", **settings)


def good(result: Any) -> Tagging:
    assert isinstance(result, Tagging)
    return result


@pytest.mark.parametrize("mask_padding", [False, True])
def test_a_file_gets_the_scores_that_evaluation_gives_its_packed_clip(
    synthetic_fsd50k: Path, packed: Path, tmp_path: Path, mask_padding: bool
):
    with open_shards(packed / "eval") as shards:
        frames = int(shards.index.num_frames.max())
        path = save_model(
            tmp_path / "b0.pt", "efficientnet_b0", frames, shards.classes, mask_padding=mask_padding
        )
        expected = evaluate_checkpoint(path, packed / "eval", 4, "fp32", "cpu")
        tagger = load(path)
        files = [synthetic_fsd50k / "FSD50K.eval_audio" / f"{key}.wav" for key in expected.keys]
        for number, file in enumerate(files):
            (window, _) = cut_windows(Recording("", file).blocks(16000), tagger.cut)
            assert isinstance(window, Window)
            stored = torch.from_numpy(shards.fbank(number))
            assert torch.equal(window.fbank.clamp(min=stored.min()).half(), stored.half())
            (scored,) = tagger.scorer.score([Window(0, stored)], tagger.cut)
            assert np.abs(scored.scores.numpy() - expected.scores[number]).max() < 1e-5
        taggings = tagger(files)
    assert np.abs(np.stack([t.scores for t in taggings]) - expected.scores).max() < 2e-3  # float16's rounding


def test_a_longer_sounds_score_is_the_highest_or_the_mean_of_its_windows(net: Path):
    sound = make_noise(4.3)
    highest, mean = load(net), load(net, windowing=Windowing(over="mean"))
    windows = [w for w in cut_windows([sound], highest.cut) if isinstance(w, Window)]
    assert len(windows) > 3
    each = np.stack([s.scores.numpy() for s in highest.scorer.score(windows, highest.cut)])
    assert np.abs(good(highest(sound, 16000)).scores - each.max(axis=0)).max() < 1e-5
    assert np.abs(good(mean(sound, 16000)).scores - each.mean(axis=0)).max() < 1e-5
    assert good(highest(sound, 16000)).seconds == pytest.approx(4.3)


def test_folded_batch_norms_change_no_score(net: Path):
    model, scorer = load_checkpoint(net).build(), Scorer(load_checkpoint(net), "cpu", "fp32")
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in scorer.model.modules())
    half = Scorer(load_checkpoint(net), "cpu", "bf16")  # as evaluation has them, whose rounding they share
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in half.model.modules())
    x = torch.randn(3, 96, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert (model(x) - scorer.model(x)).abs().max() < 1e-5
        assert model(x).std() > 1e-3


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_sounds_come_in_order_and_one_that_fails_gives_its_reason(tmp_path: Path, net: Path, batch_size: int):
    files = [write_noise(tmp_path / f"{i}.wav", 0.4 + 0.6 * (i % 4), seed=i) for i in range(9)]
    files[3].write_bytes(b"no audio")
    files[6].unlink()
    soundfile.write(files[8], np.zeros(80000), 16000)  # silent, which shows at its end
    tagger = load(net, batch_size=batch_size)
    results = list(tagger.stream(files))
    assert [r.source for r in results] == [str(f) for f in files]
    failed = {i: r.reason.split(":")[0] for i, r in enumerate(results) if isinstance(r, Failure)}
    assert failed == {3: "undecodable", 6: "missing_audio", 8: "silent"}
    alone = load(net)
    for file, result in zip(files, results, strict=True):
        if isinstance(result, Tagging):
            assert np.abs(result.scores - good(alone(file)).scores).max() < 1e-5


def test_a_list_with_a_sound_that_fails_raises_its_reason(tmp_path: Path, tiny: Path):
    good_file = write_noise(tmp_path / "a.wav", 0.5)
    with pytest.raises(ValueError, match=r"missing_audio: .*b.wav is not there"):
        load(tiny)([good_file, tmp_path / "b.wav"])


def test_a_folder_stands_for_the_audio_in_it_and_its_folders_sorted(tmp_path: Path, tiny: Path):
    for name in ("b.wav", "a/z.flac", "a/c.WAV", ".hidden.wav"):
        write_noise(tmp_path / name, 0.2)
    (tmp_path / "notes.txt").write_text("no audio")
    taggings = load(tiny)(tmp_path)
    assert isinstance(taggings, list)
    assert [t.source for t in taggings] == [str(tmp_path / n) for n in ("a/c.WAV", "a/z.flac", "b.wav")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no audio file"):
        load(tiny)(tmp_path / "empty")


def test_arrays_tensors_and_bytes_are_tagged_like_their_file(tmp_path: Path, tiny: Path):
    tagger, sound = load(tiny), make_noise(2.0, 44100)
    ints = (sound * 32767).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", ints, 44100)
    expected = good(tagger(tmp_path / "a.wav")).scores
    floats = ints.astype(np.float64) / 32768
    stereo = np.stack([floats, floats], axis=1)
    for audio in (ints, floats, torch.from_numpy(floats), stereo, stereo.astype(np.float32)):
        assert np.abs(good(tagger(audio, 44100)).scores - expected).max() < 1e-6
    assert np.array_equal(good(tagger((tmp_path / "a.wav").read_bytes())).scores, expected)
    assert [t.source for t in tagger([floats, floats], 44100)] == ["array 0", "array 1"]


@pytest.mark.parametrize(
    ("array", "rate", "message"),
    [
        (np.zeros(100), 0, "array has no sample rate"),
        (np.zeros((2, 100)), 16000, r"give \(samples, channels\): transpose it"),
        (np.zeros((2, 2, 2)), 16000, r"has shape \(2, 2, 2\); give"),
        (np.zeros(100, np.int64), 16000, "holds int64; give floats"),
        (np.zeros(100), 16000, "silent: array: every sample is 0"),
        (np.zeros(0), 16000, "empty: array holds no sample"),
        (np.full(100, np.nan), 16000, "non_finite: array"),
        (np.ones(100), 5, "array has a sample rate of 5 Hz"),
    ],
)
def test_an_array_that_is_no_sound_is_refused(tiny: Path, array: Any, rate: int, message: str):
    with pytest.raises(ValueError, match=message):
        load(tiny)(array, rate)


def test_the_top_classes_and_those_above_their_thresholds_are_named(tiny: Path):
    scores = np.array([0.2, 0.9, 0.5, 0.5], np.float32)
    thresholds = np.array([0.1, 0.95, 0.4, 0.5], np.float32)
    tagging = Tagging("x", 1.0, scores, CLASSES, thresholds)
    assert [label.index for label in tagging.top(3)] == [1, 2, 3]
    assert tagging.top(1)[0][:3] == (1, "/m/05zppz", "Male speech, man speaking")
    assert len(tagging.top(99)) == 4
    assert [label.mid for label in tagging.labels] == ["/m/04rlf", "/m/09x0r"]
    with pytest.raises(ValueError, match="labels need thresholds"):
        _ = Tagging("x", 1.0, scores, CLASSES).labels
    tagged = good(load(tiny, thresholds=np.zeros(4))(make_noise(0.5), 16000))
    assert len(tagged.labels) == 4


@pytest.mark.parametrize(("seconds", "steps"), [(0.1, 1), (0.985, 4), (4.3, 14)])
def test_a_timeline_has_a_step_each_32_frames(net: Path, seconds: float, steps: int):
    tagger = load(net)
    timeline = tagger.timeline(make_noise(seconds), 16000)
    assert timeline.activity.shape == (4, steps)
    assert len(timeline.fbank) == tagger.card.fbank.num_frames(round(seconds * 16000))
    assert timeline.step_seconds == pytest.approx(0.32)
    assert timeline.fbank_step_seconds == pytest.approx(0.01)
    assert np.abs(timeline.scores - good(tagger(make_noise(seconds), 16000)).scores).max() < 1e-6


def test_where_scores_are_the_mean_of_the_activity_so_they_are_in_a_timeline(tmp_path: Path):
    tagger = load(save_model(tmp_path / "mean.pt", "efficientnet_b0", num_heads=0))
    timeline = tagger.timeline(make_noise(0.975), 16000)  # 96 frames
    assert timeline.activity.shape == (4, 3)
    assert np.abs(timeline.activity.mean(axis=1) - timeline.scores).max() < 1e-6


def test_a_network_without_activity_has_no_timeline(tiny: Path):
    with pytest.raises(ValueError, match="model 'tiny' gives no activity over time"):
        load(tiny).timeline(make_noise(0.5), 16000)


def test_a_network_without_even_time_steps_tags_and_has_no_timeline(tmp_path: Path):
    path = save_model(tmp_path / "resized.pt", "tagger-resized", 208)
    tagger = load(path)
    assert tagger.scorer.step_frames == 1
    assert good(tagger(make_noise(5), 16000)).scores.shape == (4,)
    with pytest.raises(ValueError, match="model 'tagger-resized' gives no activity over time"):
        tagger.timeline(make_noise(0.5), 16000)


@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.5])
def test_a_timeline_has_no_gap_where_a_network_drops_a_windows_end(tmp_path: Path, overlap: float):
    path = save_model(tmp_path / "strided.pt", "tagger-strided", 208)
    tagger = load(path, windowing=Windowing(overlap=overlap))
    assert tagger.scorer.grid == TimeGrid(32, -43)
    assert tagger.cut.hop_frames <= 160  # a window has five steps, not six
    for seconds in (5.0, 9.37):
        timeline = tagger.timeline(make_noise(seconds), 16000)
        assert np.isfinite(timeline.activity).all()
        assert abs(timeline.activity.shape[1] * 32 - len(timeline.fbank)) < 32 + 43


def test_a_timeline_is_of_one_sound_and_many_are_streamed(tmp_path: Path, net: Path):
    write_noise(tmp_path / "a.wav", 0.5)
    tagger = load(net)
    with pytest.raises(ValueError, match="timeline takes one sound"):
        tagger.timeline(tmp_path)
    (found,) = tagger.stream_timelines(tmp_path)
    assert isinstance(found, Timeline)


def test_stopping_early_leaves_no_thread(tmp_path: Path, tiny: Path):
    files = [write_noise(tmp_path / f"{i}.wav", 20) for i in range(4)]
    before = threading.active_count()
    results = load(tiny, batch_size=2).stream(files)
    next(results)
    assert threading.active_count() > before
    results.close()
    assert threading.active_count() == before


def test_a_fault_of_ours_in_a_decoding_thread_is_raised(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(psla_fast.tagger.feed, "cut_windows", fail)
    with pytest.raises(ZeroDivisionError, match="a fault"):
        load(tiny)(make_noise(0.5), 16000)


def test_a_window_too_short_for_the_network_is_refused(tmp_path: Path):
    path = save_model(tmp_path / "strided.pt", "tagger-strided", 208)
    with pytest.raises(ValueError, match=r"a window of 0.5 seconds is not for this network \(.*longer one"):
        load(path, windowing=Windowing(seconds=0.5))
    assert load(path, windowing=Windowing(seconds=1)).cut.clip_frames == 100


def test_settings_out_of_range_are_refused(tiny: Path):
    with pytest.raises(ValueError, match="batch_size is 0; give 1 or more"):
        load(tiny, batch_size=0)


LONG = """
import resource, sys
from pathlib import Path
from psla_fast.tagger import Tagger, Windowing
import tests.tiny
tagger = Tagger.from_checkpoint(sys.argv[1], "cpu", "fp32", windowing=Windowing(overlap=0))
for path in sys.argv[2:]:
    tagger(Path(path))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_a_long_file_is_tagged_in_constant_memory(tmp_path: Path, tiny: Path):
    minute = (make_noise(60) * 32767).astype(np.int16)
    for name, minutes in (("short.wav", 2), ("long.wav", 20)):
        with soundfile.SoundFile(tmp_path / name, "w", 16000, 1, "PCM_16") as file:
            for _ in range(minutes):
                file.write(minute)
    command = [sys.executable, "-c", LONG, str(tiny), str(tmp_path / "short.wav"), str(tmp_path / "long.wav")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    short, long = map(int, done.stdout.split())
    assert long - short < 25  # MB; its samples alone have 77, its fbank 61


def test_a_process_of_torchrun_tags_alone(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert good(load(tiny)(make_noise(0.5), 16000)).seconds == 0.5
    assert not torch.distributed.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(tiny: Path):
    with pytest.raises(ValueError, match="this torch sees no CUDA device. Use --device cpu"):
        Tagger.from_checkpoint(tiny, device="cuda")
