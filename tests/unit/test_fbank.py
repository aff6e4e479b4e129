import math
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchaudio.compliance import kaldi

from psla_fast.fbank import LOG_FLOOR_POWER, FbankConfig, compute_fbank

PSLA = FbankConfig()
SECOND = 16000


def kaldi_fbank(waveform: Tensor, config: FbankConfig = PSLA) -> Tensor:
    """PSLA's call of the reference, with a config's values."""
    return kaldi.fbank(
        waveform.unsqueeze(0),
        htk_compat=True,
        sample_frequency=config.sample_rate,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=config.num_mels,
        dither=0.0,
        frame_shift=config.frame_shift_ms,
        frame_length=config.frame_length_ms,
        low_freq=config.low_freq,
        preemphasis_coefficient=config.preemphasis,
    )


def noise(num_samples: int, amplitude: float, seed: int = 0) -> Tensor:
    return amplitude * torch.randn(num_samples, generator=torch.Generator().manual_seed(seed))


def tone(hertz: float, num_samples: int = 2 * SECOND) -> Tensor:
    return 0.5 * torch.sin(2 * math.pi * hertz * torch.arange(num_samples) / SECOND)


def click(num_samples: int = SECOND) -> Tensor:
    return torch.zeros(num_samples).index_fill_(0, torch.tensor([5000]), 1.0)


SIGNALS: dict[str, Callable[[], Tensor]] = {
    "noise": lambda: noise(2 * SECOND, 0.1),
    "noise at the floor": lambda: noise(2 * SECOND, 1e-5),
    "noise far above 1": lambda: noise(2 * SECOND, 30.0),
    "silence": lambda: torch.zeros(SECOND),
    "a constant": lambda: torch.full((SECOND,), 0.3),
    "clipped noise": lambda: noise(2 * SECOND, 3.0).clamp(-1, 1),
    "a square wave": lambda: tone(440).sign(),
    "a click": click,
    "30 s": lambda: noise(30 * SECOND, 0.1),
    "one frame": lambda: noise(400, 0.1),
    "a sample less than two frames": lambda: noise(559, 0.1),
    "two frames": lambda: noise(560, 0.1),
    **{f"{hertz} Hz": lambda hertz=hertz: tone(hertz) for hertz in (25, 100, 440, 1000, 4000, 7950)},
}


@pytest.mark.parametrize("name", SIGNALS)
def test_an_fbank_equals_kaldis_to_1e_5(name: str) -> None:
    waveform = SIGNALS[name]()
    ours, reference = compute_fbank(waveform, PSLA), kaldi_fbank(waveform)
    assert ours.shape == reference.shape
    assert (ours - reference).abs().max() <= 1e-5


OTHER_CONFIGS = {
    "64 mels": FbankConfig(num_mels=64),
    "12.5 ms shift": FbankConfig(frame_shift_ms=12.5),
    "a window of 512 samples": FbankConfig(frame_length_ms=32.0),
    "32 kHz": FbankConfig(sample_rate=32000),
    "22.05 kHz": FbankConfig(sample_rate=22050, num_mels=40),
    "less pre-emphasis, from 300 Hz on": FbankConfig(preemphasis=0.9, low_freq=300.0),
}


@pytest.mark.parametrize("name", OTHER_CONFIGS)
def test_other_settings_equal_kaldis_too(name: str) -> None:
    config = OTHER_CONFIGS[name]
    waveform = noise(config.sample_rate, 0.1)
    ours, reference = compute_fbank(waveform, config), kaldi_fbank(waveform, config)
    assert ours.shape == reference.shape
    assert (ours - reference).abs().max() <= 1e-5


def test_float64_is_kept_and_equals_kaldis_to_1e_9() -> None:
    waveform = tone(7950, SECOND).double()
    ours = compute_fbank(waveform, PSLA)
    assert ours.dtype == torch.float64
    assert (ours - kaldi_fbank(waveform)).abs().max() <= 1e-9


def test_a_batch_equals_its_waveforms_one_by_one() -> None:
    batch = torch.stack([noise(SECOND, 0.1, seed) for seed in range(6)])
    one_by_one = torch.stack([compute_fbank(waveform, PSLA) for waveform in batch])
    assert (compute_fbank(batch, PSLA) - one_by_one).abs().max() <= 1e-5
    nested = compute_fbank(batch.view(2, 3, -1), PSLA)
    assert nested.shape == (2, 3, 98, 128)
    assert (nested.flatten(0, 1) - one_by_one).abs().max() <= 1e-5


@pytest.mark.parametrize("num_samples", [1, 2, 160, 399])
def test_a_waveform_shorter_than_a_window_is_one_frame_padded_with_zeros(num_samples: int) -> None:
    waveform = noise(num_samples, 0.1)
    padded = torch.cat([waveform, torch.zeros(400 - num_samples)])
    fbank = compute_fbank(waveform, PSLA)
    assert fbank.shape == (1, 128)
    assert torch.equal(fbank, compute_fbank(padded, PSLA))
    assert (fbank - kaldi_fbank(padded)).abs().max() <= 1e-5


@pytest.mark.parametrize("num_samples", [1, 399, 400, 401, 559, 560, 561, 720, 15999, 16000, 16001])
@pytest.mark.parametrize("config", [PSLA, FbankConfig(frame_shift_ms=12.5, frame_length_ms=32.0)])
def test_num_frames_tells_the_frames_of_an_fbank(config: FbankConfig, num_samples: int) -> None:
    assert len(compute_fbank(noise(num_samples, 0.1), config)) == config.num_frames(num_samples)


def test_ten_seconds_are_998_frames_and_thirty_2998() -> None:
    assert (PSLA.num_frames(10 * SECOND), PSLA.num_frames(30 * SECOND)) == (998, 2998)


def test_silence_is_the_floor_and_nothing_is_below_it() -> None:
    floor = torch.tensor(LOG_FLOOR_POWER).log()
    assert torch.equal(compute_fbank(torch.zeros(SECOND), PSLA), floor.expand(98, 128))
    assert compute_fbank(noise(SECOND, 1e-5), PSLA).min() == floor


def test_float16_and_bfloat16_are_lifted_to_float32() -> None:
    waveform = noise(SECOND, 0.1)
    for dtype in (torch.float16, torch.bfloat16):
        fbank = compute_fbank(waveform.to(dtype), PSLA)
        assert fbank.dtype == torch.float32
        assert torch.equal(fbank, compute_fbank(waveform.to(dtype).float(), PSLA))


def test_the_input_is_left_as_it_was_and_a_second_call_gives_the_same() -> None:
    waveform = noise(SECOND, 0.1)
    before = waveform.clone()
    first = compute_fbank(waveform, PSLA)
    assert torch.equal(waveform, before)
    assert torch.equal(compute_fbank(waveform, PSLA), first)


def test_another_config_does_not_get_the_window_of_the_one_before() -> None:
    waveform = noise(SECOND, 0.1)
    compute_fbank(waveform, PSLA)
    low = compute_fbank(waveform, replace(PSLA, low_freq=300.0))
    assert not torch.allclose(low, compute_fbank(waveform, PSLA), atol=0.1)


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_an_empty_waveform_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="0 samples"):
        compute_fbank(torch.zeros(shape), PSLA)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8, torch.bool])
def test_integer_waveforms_are_refused_by_their_type(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=str(dtype)):
        compute_fbank(torch.ones(SECOND, dtype=dtype), PSLA)


def test_a_waveform_of_many_chunks_equals_kaldis_and_its_rows_are_those_of_a_batch() -> None:
    batch = torch.stack([noise(12 * SECOND + 77, 0.1, seed) for seed in range(5)])
    fbanks = compute_fbank(batch, PSLA)
    for waveform, fbank in zip(batch, fbanks, strict=True):
        assert (fbank - kaldi_fbank(waveform)).abs().max() <= 1e-5
        assert (fbank - compute_fbank(waveform, PSLA)).abs().max() <= 1e-5


def test_threads_and_repetition_do_not_change_a_bit() -> None:
    waveform = noise(30 * SECOND + 5, 0.1)
    num_threads = torch.get_num_threads()
    try:
        fbanks = []
        for threads in (1, 2, 4, 1):
            torch.set_num_threads(threads)
            fbanks.append(compute_fbank(waveform, PSLA))
    finally:
        torch.set_num_threads(num_threads)
    assert all(torch.equal(fbank, fbanks[0]) for fbank in fbanks)


def test_a_slice_of_a_tensor_and_one_with_a_gradient_are_taken() -> None:
    stereo = torch.stack([noise(SECOND, 0.1, 1), noise(SECOND, 0.1, 2)], dim=1)
    fbank = compute_fbank(stereo[:, 1], PSLA)
    assert torch.equal(fbank, compute_fbank(stereo[:, 1].contiguous(), PSLA))
    assert torch.equal(fbank, compute_fbank(stereo[:, 1].clone().requires_grad_(), PSLA))


@pytest.mark.parametrize("config", [FbankConfig(num_mels=4), FbankConfig(num_mels=257, low_freq=0.0)])
def test_4_mels_and_more_mels_than_bins_equal_kaldis(config: FbankConfig) -> None:
    waveform = noise(SECOND, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = kaldi_fbank(waveform, config)
    assert (compute_fbank(waveform, config) - reference).abs().max() <= 1e-5


def test_fewer_mels_than_kaldis_banks_need_are_refused() -> None:
    with pytest.raises(ValueError, match="3 mels"):
        FbankConfig(num_mels=3)
