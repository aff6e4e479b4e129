from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch

from psla_fast.augment import InputSpec
from psla_fast.fbank import FbankConfig, compute_fbank
from psla_fast.models import TimeGrid
from psla_fast.tagger import Windowing
from psla_fast.tagger.tally import MOST_COLUMNS, Overview, Stitch
from psla_fast.tagger.windows import Cut, Window, cut_windows

FBANK = FbankConfig(num_mels=8)
Waveform = npt.NDArray[np.float32]


def make_cut(clip_frames: int = 96, overlap: float = 0.5, step_frames: int = 32) -> Cut:
    spec = InputSpec(clip_frames, 8, 0.0, 0.0, 1.0)
    return Cut.of(Windowing(overlap=overlap), spec, FBANK, TimeGrid(step_frames, step_frames - 1))


def noise(num_samples: int) -> Waveform:
    return np.random.default_rng(0).uniform(-0.5, 0.5, num_samples).astype(np.float32)


def in_blocks(waveform: Waveform, size: int) -> Iterator[Waveform]:
    return (waveform[start : start + size] for start in range(0, len(waveform), size))


def cut_all(waveform: Waveform, cut: Cut, block: int = 5000) -> tuple[list[Window], int]:
    *windows, num_samples = cut_windows(in_blocks(waveform, block), cut)
    assert isinstance(num_samples, int)
    return [window for window in windows if isinstance(window, Window)], num_samples


@pytest.mark.parametrize("num_samples", [1, 399, 400, 5000, 15600, 15759])
def test_what_fits_one_window_is_one_with_the_fbank_of_a_clip(num_samples: int):
    waveform = noise(num_samples)
    (window,), counted = cut_all(waveform, make_cut())
    centred = waveform - float(waveform.mean(dtype=np.float64))
    assert torch.equal(window.fbank, compute_fbank(torch.from_numpy(centred), FBANK))
    assert window.start_frame == 0
    assert counted == num_samples


@pytest.mark.parametrize("num_samples", [15760, 16000, 23000, 30961, 100_003])
@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.9])
def test_windows_cover_every_frame_at_whole_time_steps(num_samples: int, overlap: float):
    waveform, cut = noise(num_samples), make_cut(overlap=overlap)
    windows, _ = cut_all(waveform, cut)
    seen = np.zeros(FBANK.num_frames(num_samples), int)
    for window in windows:
        assert window.start_frame % 32 == 0
        seen[window.start_frame : window.start_frame + len(window.fbank)] += 1
    assert seen.min() >= 1
    assert all(len(window.fbank) == 96 for window in windows[:-1])
    assert 96 - 32 < len(windows[-1].fbank) <= 96
    starts = np.diff([window.start_frame for window in windows])
    assert (starts > 0).all()
    assert (starts[:-1] == cut.hop_frames).all()


def test_each_window_is_a_clip_of_its_own_with_its_own_mean():
    waveform = noise(48000) + np.linspace(0, 0.4, 48000, dtype=np.float32)
    cut = make_cut()
    for window in cut_all(waveform, cut)[0]:
        part = waveform[window.start_frame * 160 :][: cut.clip_samples]
        clip = torch.from_numpy(part - float(part.mean(dtype=np.float64)))
        assert torch.equal(window.fbank, compute_fbank(clip, FBANK))


@pytest.mark.parametrize("block", [1, 7, 160, 4096, 10**6])
def test_windows_are_the_same_in_blocks_of_any_size(block: int):
    waveform = noise(20_000 if block < 100 else 60_000)
    windows, _ = cut_all(waveform, make_cut(), block)
    expected, _ = cut_all(waveform, make_cut(), len(waveform))
    assert [w.start_frame for w in windows] == [w.start_frame for w in expected]
    assert all(torch.equal(a.fbank, b.fbank) for a, b in zip(windows, expected, strict=True))


def test_a_hop_is_rounded_down_to_time_steps_and_is_one_at_least():
    assert [make_cut(overlap=x).hop_frames for x in (0.0, 0.3, 0.5, 0.9)] == [96, 64, 32, 32]
    assert make_cut(clip_frames=20, step_frames=32).hop_frames == 20
    assert make_cut(320, 0.9, 16).hop_frames == 32  # 320 · (1 - .9) / 16 is 1.9999999999999996


def test_tiny_blocks_are_appended_to_a_long_window_in_large_ones(monkeypatch: pytest.MonkeyPatch):
    copied, concatenate = 0, np.concatenate

    def count(arrays: list[Waveform]) -> Waveform:
        nonlocal copied
        copied += sum(map(len, arrays))
        return concatenate(arrays)

    monkeypatch.setattr(np, "concatenate", count)
    waveform = noise(480_000)
    cut_all(waveform, make_cut(2400), 371)
    assert copied < 8 * len(waveform)  # block by block, it is 600 times


def test_a_window_is_padded_to_the_smallest_bucket_that_holds_it():
    spec = InputSpec(96, 8, 0.0, 0.0, 1.0, (40, 96))
    assert [Cut.of(Windowing(), spec, FBANK, TimeGrid(32, 31)).shape(n) for n in (1, 40, 41, 96)] == [
        40,
        40,
        96,
        96,
    ]
    longer = Cut.of(Windowing(seconds=2), spec, FBANK, TimeGrid(32, 31))
    assert (longer.clip_frames, longer.shapes) == (200, (200,))


@pytest.mark.parametrize(
    ("field", "value"), [("seconds", 0.0), ("seconds", 1e6), ("overlap", 1.0), ("overlap", -0.1)]
)
def test_a_window_or_overlap_out_of_range_is_refused(field: str, value: float):
    with pytest.raises(ValueError, match="can't be cut; give"):
        Windowing(**{field: value})


def test_stitched_activity_is_the_mean_where_windows_overlap():
    stitch = Stitch()
    stitch.add(0, np.full((2, 3), 1.0, np.float32))
    stitch.add(2, np.full((2, 3), 0.0, np.float32))
    stitch.add(4, np.full((2, 90), 0.5, np.float32))
    activity = stitch.activity
    assert activity.shape == (2, 94)
    assert activity[1, :6].tolist() == [1.0, 1.0, 0.5, 0.0, 0.25, 0.5]


def test_an_overview_of_any_length_holds_means_of_frames_in_order():
    frames = np.random.default_rng(0).uniform(-15, 5, (3 * MOST_COLUMNS + 5, 2)).astype(np.float32)
    overview = Overview(2)
    for start in range(0, len(frames), 500):
        overview.add(start, frames[start : start + 1000])  # windows overlap by half
    assert overview.factor == 4
    expected = np.add.reduceat(frames, np.arange(0, len(frames), 4)) / 4
    expected[-1] = frames[-1]  # the only one of its column
    assert np.allclose(overview.fbank, expected, atol=1e-4)
