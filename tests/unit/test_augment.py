import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchaudio.functional import mask_along_axis_iid

from psla_fast.augment import (
    FILTER,
    FREQ_MASKS,
    GAIN,
    LOG_FLOOR,
    MOST_BANDS,
    NUM_UNIFORMS,
    PARTNER_GAIN,
    STYLE,
    TIME_MASKS,
    AugmentConfig,
    InputSpec,
    StoredBatch,
    augment,
    compute_filter_db,
    dequantise,
    draw_uniforms,
    fill_masks,
    freq_mixstyle,
    mask_spans,
    mix_targets,
    mixup_linear,
    mixup_power,
    pad_and_normalise,
    symmetric_beta,
)
from psla_fast.fbank import FbankConfig, compute_fbank
from psla_fast.shards.spec import Storage

PSLA_SPEC = InputSpec(clip_frames=40, num_mels=16, pad_value=0.0, mean=-4.6476, std=4.5699)
PLAIN = AugmentConfig(freq_mask_bins=0, time_mask_frames=0)
MASKED = AugmentConfig(freq_mask_bins=6, time_mask_frames=12)
EVERYTHING = replace(
    MASKED,
    gain_db=7.0,
    num_freq_masks=2,
    num_time_masks=3,
    freq_mixstyle=0.8,
    filter_augment_db=6.0,
    roll_frames=10,
)
HIGHEST = 1 - 2**-24  # of float32 below 1
LOWEST_STORED = -15.9375  # of float16 above the floor
Slab = dict[str, Tensor]


def log_mels(*shape: int, seed: int = 0) -> Tensor:
    """Log-mels as they are: from the floor to 12."""
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return (drawn * 36 - 24).clamp(min=LOG_FLOOR)


def make_slab(seed: int = 0) -> Slab:
    """Four clips and four rows of partners: clip 0 has a shorter partner, 1 a longer one, 2 and 3 none.

    Behind a row's frames lies garbage.
    """
    stored = log_mels(8, 40, 16, seed=seed).clamp(min=LOWEST_STORED).half()
    num_frames = torch.tensor([30, 12, 40, 7, 18, 25, 0, 0])
    for row, count in enumerate(num_frames):
        stored[row, count:] = torch.tensor([math.nan, math.inf, -math.inf, 6e4])[torch.arange(16) % 4]
    targets = torch.zeros(8, 5)
    for row, labels in enumerate(([0, 1], [2], [3], [4], [1, 2], [2, 4], [], [])):
        targets[row, labels] = 1
    return {
        "fbank": stored,
        "num_frames": num_frames,
        "targets": targets,
        "partner_row": torch.tensor([4, 5, 2, 3]),
        "lam": torch.tensor([0.3, 0.6, 1.0, 1.0]),
        "uniforms": draw_uniforms(seed=seed, epoch=0, step=0, global_batch=4),
    }


def as_batch(slab: Slab) -> StoredBatch:
    return StoredBatch(**{name: value for name, value in slab.items() if name != "uniforms"})


def run(slab: Slab, config: AugmentConfig, spec: InputSpec = PSLA_SPEC) -> tuple[Tensor, Tensor]:
    return augment(as_batch(slab), slab["uniforms"], config, spec)


def reference(slab: Slab, config: AugmentConfig, spec: InputSpec) -> npt.NDArray[np.float64]:
    """PSLA's way, clip by clip in numpy: mix, pad, mask, normalise, roll."""
    inputs = []
    rows = slab["fbank"].double().numpy()
    counts = slab["num_frames"].tolist()
    uniforms = slab["uniforms"].double().numpy()
    for clip, partner in enumerate(slab["partner_row"].tolist()):
        count, lam = counts[clip], float(slab["lam"][clip])
        own = rows[clip, :count]
        if partner == clip:
            mixed = own
        else:
            other = np.full_like(own, LOG_FLOOR)
            both = min(count, counts[partner])
            other[:both] = rows[partner, :both]
            mixed = np.log(lam**2 * np.exp(own) + (1 - lam) ** 2 * np.exp(other))
        picture = np.full((spec.clip_frames, spec.num_mels), spec.pad_value)
        picture[:count] = np.maximum(mixed, LOG_FLOOR)
        freq = [(1, config.freq_mask_bins, column) for column in FREQ_MASKS[: config.num_freq_masks]]
        time = [(0, config.time_mask_frames, column) for column in TIME_MASKS[: config.num_time_masks]]
        for axis, limit, column in freq + time:
            width, at = uniforms[clip, column] * limit, uniforms[clip, column + 1]
            start = int(at * (picture.shape[axis] - width))
            np.moveaxis(picture, axis, 0)[start : start + int(width)] = config.mask_value
        normalised = (picture - spec.mean) / spec.std
        if config.roll_frames:
            shift = int(uniforms[clip, 5] * 2 * config.roll_frames) - config.roll_frames
            normalised = np.roll(normalised, shift, axis=0)
        inputs.append(normalised)
    return np.stack(inputs)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("config", "spec"),
    [
        (PLAIN, PSLA_SPEC),
        (MASKED, PSLA_SPEC),
        (replace(MASKED, num_freq_masks=2, num_time_masks=8), PSLA_SPEC),
        (replace(MASKED, mask_value=-7.0, roll_frames=10), replace(PSLA_SPEC, pad_value=LOG_FLOOR, std=2.0)),
    ],
    ids=["mixup", "masks", "many masks", "masks and roll"],
)
def test_a_batch_goes_through_pslas_order(config: AugmentConfig, spec: InputSpec, seed: int) -> None:
    slab = make_slab(seed)
    x, _ = run(slab, config, spec)
    expected = reference(slab, config, spec)
    assert x.shape == (4, 40, 16)
    assert x.dtype == torch.float32
    assert np.abs(x.double().numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_an_unmixed_clip_is_in_training_exactly_what_it_is_in_evaluation(dtype: Any) -> None:
    storage = Storage.of(dtype)
    stored = torch.from_numpy(storage.encode(log_mels(4, 40, 16).numpy()))
    num_frames, rows = torch.tensor([40, 33, 1, 0]), torch.arange(4)
    x, targets = augment(
        StoredBatch(stored, num_frames, torch.eye(4), rows, torch.ones(4), storage.scale, storage.offset),
        torch.zeros(4, NUM_UNIFORMS),
        PLAIN,
        PSLA_SPEC,
    )
    evaluated = pad_and_normalise(
        dequantise(stored, num_frames, storage.scale, storage.offset), num_frames, PSLA_SPEC
    )
    assert torch.equal(x, evaluated)
    assert torch.equal(targets, torch.eye(4))


def test_power_mixing_is_the_log_of_the_sum_of_powers() -> None:
    a, b = log_mels(9, 40, 16, seed=1), log_mels(9, 40, 16, seed=2)
    lam = torch.linspace(0, 1, 9)
    x, y, weight = a.double(), b.double(), lam.double().view(-1, 1, 1)
    expected = (weight**2 * x.exp() + (1 - weight) ** 2 * y.exp()).log().clamp(min=LOG_FLOOR)
    assert (mixup_power(a, b, lam) - expected).abs().max() < 1e-5
    assert torch.equal(mixup_power(a, b, torch.ones(9)), a)
    assert torch.equal(mixup_power(a, b, torch.zeros(9)), b)


def test_power_mixing_has_the_energies_of_mixed_waveforms_and_linear_mixing_has_not() -> None:
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(160_000) / 16000
    first = 0.3 * torch.randn(160_000, generator=generator) * (1 + torch.sin(2 * math.pi * time))
    second = 0.01 * torch.randn(160_000, generator=generator)
    a, b = (compute_fbank(waveform, FbankConfig()).unsqueeze(0) for waveform in (first, second))
    for lam in (0.05, 0.3, 0.5, 0.8):
        mixed = compute_fbank(lam * first + (1 - lam) * second, FbankConfig()).unsqueeze(0)
        weight = torch.tensor([lam])

        def difference(log_mel: Tensor, mixed: Tensor = mixed) -> float:
            """Mean difference of log energies, averaged over time: cross terms vanish on average only."""
            energies = log_mel.double().exp().mean(dim=1).log() - mixed.double().exp().mean(dim=1).log()
            return energies.abs().mean().item()

        assert difference(mixup_power(a, b, weight)) < 0.05
        assert difference(mixup_linear(a, b, weight)) > 0.5


def test_linear_mixing_blends_log_mels() -> None:
    a, b, lam = log_mels(5, 40, 16, seed=1), log_mels(5, 40, 16, seed=2), torch.linspace(0, 1, 5)
    expected = torch.stack([torch.lerp(y, x, weight) for x, y, weight in zip(a, b, lam, strict=True)])
    assert (mixup_linear(a, b, lam) - expected).abs().max() < 1e-5
    slab = make_slab()
    blended, _ = run(slab, replace(PLAIN, mixup_domain="linear"))
    added, _ = run(slab, PLAIN)
    assert (blended[:2] - added[:2]).abs().max() > 0.1
    assert torch.equal(blended[2:], added[2:])


def test_labels_of_a_mixed_clip_are_weighted_and_a_shared_one_stays_1() -> None:
    slab = make_slab()
    _, targets = run(slab, MASKED)
    expected = torch.tensor([[0.3, 1, 0.7, 0, 0], [0, 0, 1, 0, 0.4], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]])
    assert torch.allclose(targets, expected, atol=1e-6)
    many = mix_targets(torch.ones(1000, 1), torch.ones(1000, 1), torch.rand(1000))
    assert torch.allclose(many, torch.ones(1000, 1), atol=1e-6)
    assert many.max() <= 1, "binary cross-entropy takes no target above 1"


def test_a_longer_partner_is_cut_and_a_shorter_one_is_silent_behind_its_end() -> None:
    slab = make_slab()
    x, _ = run(slab, PLAIN, replace(PSLA_SPEC, mean=0.0, std=1.0))
    rows = slab["fbank"].float()
    assert torch.equal(x[1, 12:], torch.zeros(28, 16)), "the partner's 25 frames don't lengthen the clip"
    assert (x[1, :12] - rows[1, :12]).abs().max() > 0.1
    alone = (rows[0, 18:30] + 2 * math.log(0.3)).clamp(min=LOG_FLOOR)
    assert (x[0, 18:30] - alone)[alone > -10].abs().max() < 0.01, "only the clip's own part is heard"


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 6e4])
def test_frames_behind_a_clip_are_the_pad_value_whatever_lies_in_the_slab(garbage: float) -> None:
    slab, other = make_slab(), make_slab()
    for row, count in enumerate(other["num_frames"]):
        other["fbank"][row, count:] = garbage
    spec = replace(PSLA_SPEC, pad_value=-3.0)
    x, _ = run(slab, PLAIN, spec)
    assert torch.equal(run(other, PLAIN, spec)[0], x)
    pad = torch.tensor((-3.0 + 4.6476) / 4.5699)
    for clip, count in enumerate((30, 12, 40, 7)):
        assert torch.allclose(x[clip, count:], pad)
        assert (x[clip, :count] != pad).all()
    stored, num_frames = other["fbank"][:4], other["num_frames"][:4]
    evaluated = pad_and_normalise(dequantise(stored, num_frames, 1.0, 0.0), num_frames, spec)
    for clip, count in enumerate((30, 12, 40, 7)):
        assert torch.allclose(evaluated[clip, count:], pad)
    assert torch.isfinite(evaluated).all()


def test_stored_bytes_are_scaled_and_shifted() -> None:
    storage = Storage.of("uint8")
    stored = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    fbank = dequantise(stored, torch.tensor([16]), storage.scale, storage.offset)
    assert fbank.dtype == torch.float32
    assert np.abs(fbank.numpy() - storage.decode(stored.numpy())).max() < 1e-5
    assert (fbank.min().item(), fbank.max().item()) == pytest.approx((LOG_FLOOR, 12.0), abs=1e-5)


def test_padding_and_masks_are_above_the_mean_where_pslas_values_are_kept() -> None:
    uniforms = torch.full((4, NUM_UNIFORMS), 0.5)
    x, _ = run({**make_slab(), "uniforms": uniforms}, MASKED)
    zero = torch.tensor(4.6476 / 4.5699)
    assert torch.allclose(x[:, 17:23], zero), "a time mask of 6 frames, from ⌊0.5 · (40 - 6)⌋ on"
    assert torch.allclose(x[:, :, 6:9], zero), "a frequency mask of 3 bins, from ⌊0.5 · (16 - 3)⌋ on"


def test_masks_are_torchaudios() -> None:
    for seed in range(20):
        uniforms = torch.empty(64, 4)
        torch.manual_seed(seed)
        for column in range(4):
            uniforms[:, column] = torch.rand(64)
        fbank = log_mels(64, 40, 16, seed=seed)
        torch.manual_seed(seed)
        expected = mask_along_axis_iid(fbank.mT, mask_param=6, mask_value=0.5, axis=1)
        expected = mask_along_axis_iid(expected, mask_param=12, mask_value=0.5, axis=2).mT
        assert torch.equal(mask_spans(fbank, uniforms, replace(MASKED, mask_value=0.5)), expected)


def test_the_widest_mask_is_one_below_its_limit() -> None:
    fbank = torch.ones(1, 40, 16)
    masked = mask_spans(fbank, torch.tensor([[HIGHEST, 0.0, HIGHEST, 0.0]]), MASKED)
    assert masked[0].eq(0).all(dim=1).sum() == 11
    assert masked[0].eq(0).all(dim=0).sum() == 5
    whole = mask_spans(fbank, torch.tensor([[0.0, 0.0, HIGHEST, 0.0]]), replace(MASKED, time_mask_frames=99))
    assert whole[0].eq(0).all(dim=1).sum() == 39, "a limit above the axis is cut to it"


@pytest.mark.parametrize(
    ("fraction", "longest"), [(1.0, 11), (0.3, 11), (0.25, 9), (0.1, 3), (0.06, 1), (0.01, 0)]
)
def test_the_time_masks_limit_is_at_most_its_fraction_of_the_batch(fraction: float, longest: int) -> None:
    config = replace(MASKED, time_mask_fraction=fraction)
    masked = mask_spans(torch.ones(1, 40, 16), torch.tensor([[HIGHEST, 0.0, HIGHEST, 0.0]]), config)
    assert masked[0].eq(0).all(dim=1).sum() == longest
    assert masked[0].eq(0).all(dim=0).sum() == 5, "the frequency mask's stays"


def test_a_fraction_that_cuts_nothing_gives_the_same_numbers() -> None:
    uniforms = draw_uniforms(seed=3, epoch=0, step=0, global_batch=4)
    fbank = log_mels(4, 40, 16)
    expected = mask_spans(fbank, uniforms, MASKED)
    assert torch.equal(mask_spans(fbank, uniforms, replace(MASKED, time_mask_fraction=0.3)), expected)
    whole, half = (
        mask_spans(fbank, uniforms, replace(MASKED, time_mask_frames=frames, time_mask_fraction=fraction))
        for frames, fraction in ((20, 1.0), (99, 0.5))
    )
    assert torch.equal(whole, half)
    assert not torch.equal(whole, expected)


def test_noise_is_uniform_up_to_the_clips_own_amplitude() -> None:
    slab, config = make_slab(), replace(PLAIN, noise=0.4)
    slab["uniforms"][:, 4] = torch.tensor([0.0, 0.25, 0.5, HIGHEST])
    clean, _ = run(slab, PLAIN)
    torch.manual_seed(0)
    noisy, _ = run(slab, config)
    added = noisy - clean
    assert (added >= -1e-6).all()
    for clip, amplitude in enumerate((0.0, 0.1, 0.2, 0.4)):
        assert added[clip].max() <= amplitude + 1e-6
        assert added[clip].mean().item() == pytest.approx(amplitude / 2, rel=0.1)
    torch.manual_seed(0)
    assert torch.equal(run(slab, config)[0], noisy)
    assert not torch.equal(run(slab, config)[0], noisy)


@pytest.mark.parametrize("uniform", [0.0, 0.3, 0.5, HIGHEST])
def test_a_roll_turns_the_clip_by_up_to_its_limit(uniform: float) -> None:
    slab = make_slab()
    slab["uniforms"][:, 5] = uniform
    shift = math.floor(uniform * 20) - 10
    assert -10 <= shift <= 9
    still, _ = run(slab, MASKED)
    rolled, _ = run(slab, replace(MASKED, roll_frames=10))
    assert torch.equal(rolled, torch.roll(still, shift, dims=1))
    assert torch.equal(rolled, still) == (shift == 0)


def test_uniforms_are_a_function_of_seed_epoch_and_step() -> None:
    drawn = {
        (seed, epoch, step): draw_uniforms(seed, epoch, step, global_batch=64)
        for seed in (0, 1)
        for epoch in (0, 1)
        for step in (0, 1)
    }
    for key, uniforms in drawn.items():
        assert uniforms.shape == (64, NUM_UNIFORMS)
        assert uniforms.dtype == torch.float32
        assert torch.equal(uniforms, draw_uniforms(*key, global_batch=64))
        assert not any(torch.equal(uniforms, other) for name, other in drawn.items() if name != key)
    many = draw_uniforms(0, 0, 0, global_batch=20_000)
    assert many.min() >= 0
    assert many.max() < 1
    assert torch.allclose(many.mean(dim=0), torch.full((NUM_UNIFORMS,), 0.5), atol=0.01)
    assert torch.allclose(torch.corrcoef(many.T), torch.eye(NUM_UNIFORMS), atol=0.03)


def test_pslas_uniforms_are_what_they_were_before_others_were_drawn() -> None:
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([3, 4, 5, 1])))
    expected = torch.from_numpy(rng.random((24, 6), dtype=np.float32))
    assert torch.equal(draw_uniforms(seed=3, epoch=4, step=5, global_batch=24)[:, :6], expected)


@pytest.mark.parametrize("domain", ["power", "linear"])
def test_pslas_augmentation_reads_no_other_uniform(domain: Any) -> None:
    slab, config = make_slab(), replace(MASKED, roll_frames=10, mixup_domain=domain)
    expected, _ = run(slab, config)
    slab["uniforms"][:, 6:] = math.nan
    assert torch.equal(run(slab, config)[0], expected)


def test_clip_and_partner_each_get_a_gain_of_their_own_before_they_are_mixed() -> None:
    slab, spec = make_slab(), replace(PSLA_SPEC, pad_value=-3.0, mean=0.0, std=1.0)
    slab["uniforms"][:, GAIN] = torch.tensor([0.0, 0.75, HIGHEST, 0.25])
    slab["uniforms"][:, PARTNER_GAIN] = torch.tensor([0.75, 0.25, 0.0, 0.0])
    own_db, partner_db = [-10.0, 5.0, 10.0, -5.0], [5.0, -5.0]
    x, _ = run(slab, replace(PLAIN, gain_db=10.0), spec)
    rows = dequantise(slab["fbank"], slab["num_frames"], 1.0, 0.0)
    for clip, count in enumerate((30, 12, 40, 7)):
        assert (x[clip, count:] == -3).all(), "padding has no gain"
        own = rows[clip, :count]
        expected = (own + own_db[clip] * math.log(10) / 10).clamp(min=LOG_FLOOR)
        expected[own <= LOG_FLOOR] = LOG_FLOOR
        if clip < 2:
            other = rows[4 + clip, :count]
            partner = (other + partner_db[clip] * math.log(10) / 10).clamp(min=LOG_FLOOR)
            partner[other <= LOG_FLOOR] = LOG_FLOOR
            expected = mixup_power(expected[None], partner[None], slab["lam"][clip : clip + 1])[0]
        assert torch.allclose(x[clip, :count], expected, atol=1e-5)
        assert (x[clip, :count] >= LOG_FLOOR - 1e-6).all()


def test_a_gain_in_log_mels_is_that_of_the_waveform() -> None:
    waveform = 0.01 * torch.randn(16_000, generator=torch.Generator().manual_seed(0))
    quiet, loud = (compute_fbank(waveform * gain, FbankConfig()) for gain in (1, 10 ** (6 / 20)))
    frames, mels = quiet.shape
    uniforms = torch.full((1, NUM_UNIFORMS), 0.75)  # half of 12 dB
    batch = StoredBatch(
        quiet[None], torch.tensor([frames]), torch.ones(1, 1), torch.tensor([0]), torch.ones(1)
    )
    spec = InputSpec(frames, mels, pad_value=0.0, mean=0.0, std=1.0)
    x, _ = augment(batch, uniforms, replace(PLAIN, gain_db=12.0), spec)
    heard = quiet > LOG_FLOOR
    assert heard.float().mean() > 0.9
    assert (x[0] - loud)[heard].abs().max() < 1e-3


def test_filters_are_constant_over_time_and_leave_padding_and_silence() -> None:
    slab, spec = make_slab(), replace(PSLA_SPEC, pad_value=-3.0, mean=0.0, std=1.0)
    slab["lam"][:], slab["partner_row"] = 1.0, torch.arange(4)
    plain, _ = run(slab, PLAIN, spec)
    x, _ = run(slab, replace(PLAIN, filter_augment_db=6.0), spec)
    filters = compute_filter_db(slab["uniforms"][:, FILTER:], 16, 6.0) * math.log(10) / 10
    for clip, count in enumerate((30, 12, 40, 7)):
        assert (x[clip, count:] == -3).all()
        heard = (plain[clip, :count] > LOG_FLOOR) & (x[clip, :count] > LOG_FLOOR)
        added = (x - plain)[clip, :count]
        assert torch.allclose(added[heard], filters[clip].expand_as(added)[heard], atol=1e-5)
        assert heard.float().mean() > 0.5
        assert (x[clip, :count][plain[clip, :count] == LOG_FLOOR] == LOG_FLOOR).all()
    assert filters.std(dim=1).min() > 0.01


def test_filters_have_3_to_6_bands_alike_often_and_gains_over_their_whole_range() -> None:
    uniforms = draw_uniforms(0, 0, 0, global_batch=4000)[:, FILTER:]
    assert uniforms.shape[1] == 2 + 2 * MOST_BANDS
    drawn = compute_filter_db(uniforms, 128, 6.0)
    bends = (drawn.diff(dim=1).diff(dim=1).abs() > 1e-3).sum(dim=1)  # a bend shows in one or two places
    assert bends.max() <= 2 * (MOST_BANDS - 1)
    assert bends.min() >= 1
    num_bands = (uniforms[:, 0] * 4).floor()
    assert [int((num_bands == count).sum()) for count in range(4)] == pytest.approx([1000] * 4, rel=0.1)
    for end in (0, -1):
        assert stats.kstest(drawn[:, end].numpy(), stats.uniform(-6, 12).cdf).pvalue > 1e-3


def test_style_is_mixed_with_the_neighbours_at_its_rate() -> None:
    slab, spec = make_slab(), replace(PSLA_SPEC, pad_value=-3.0)
    plain, _ = run(slab, PLAIN, spec)
    slab["uniforms"][:, STYLE] = torch.tensor([0.39, 0.41, 0.0, HIGHEST])
    x, _ = run(slab, replace(PLAIN, freq_mixstyle=0.4), spec)
    is_changed = [not torch.equal(x[clip], plain[clip]) for clip in range(4)]
    assert is_changed == [True, False, True, False]
    assert torch.equal(x[0, 30:], plain[0, 30:]), "padding has no style"
    always, _ = run(slab, replace(PLAIN, freq_mixstyle=1.0), spec)
    assert not any(torch.equal(always[clip], plain[clip]) for clip in range(4))


def test_a_clip_keeps_its_style_where_its_neighbour_is_missing_or_empty() -> None:
    fbank, num_frames = log_mels(5, 20, 4), torch.tensor([20, 0, 20, 10, 20])
    mixed = freq_mixstyle(fbank, num_frames, torch.full((5,), 0.3))
    assert torch.equal(mixed[0], fbank[0])
    assert torch.equal(mixed[4], fbank[4])
    assert not torch.equal(mixed[2], fbank[2])
    garbage = torch.where(torch.arange(20)[:, None] < num_frames[:, None, None], fbank, 1e4)
    again = freq_mixstyle(garbage, num_frames, torch.full((5,), 0.3))
    assert torch.equal(again[2], mixed[2]), "frames behind a clip's end have no part in its style"


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0, 2.0, 10.0])
def test_lambdas_of_styles_are_drawn_from_a_symmetric_beta(alpha: float) -> None:
    uniforms = draw_uniforms(0, 0, 0, global_batch=50_000)[:, STYLE + 1 : STYLE + 3]
    lam = symmetric_beta(uniforms, alpha).double().numpy()
    assert stats.kstest(lam, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert lam.std() == pytest.approx(stats.beta(alpha, alpha).std(), rel=0.02)


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
@pytest.mark.parametrize(
    "change",
    [
        {"gain_db": 3.0},
        {"mixup_domain": "linear"},
        {"freq_mask_bins": 3},
        {"num_freq_masks": 2},
        {"time_mask_frames": 30},
        {"num_time_masks": 2},
        {"time_mask_fraction": 0.1},
        {"mask_value": -4.0},
        {"freq_mixstyle": 0.9},
        {"freq_mixstyle_alpha": 2.0},
        {"filter_augment_db": 3.0},
        {"noise": 0.1},
        {"roll_frames": 7},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_setting_changes_the_input_of_the_model(change: dict[str, Any], dtype: Any) -> None:
    storage, slab = Storage.of(dtype), make_slab()
    rows = dequantise(slab["fbank"], slab["num_frames"], 1.0, 0.0)
    encoded = torch.from_numpy(storage.encode(rows.numpy()))
    batch = as_batch(slab)._replace(fbank=encoded, scale=storage.scale, offset=storage.offset)
    base = MASKED if "freq_mixstyle_alpha" not in change else replace(MASKED, freq_mixstyle=1.0)
    before, after = (
        augment(batch, slab["uniforms"], config, PSLA_SPEC)[0] for config in (base, replace(base, **change))
    )
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_compiled_function_is_one_graph_and_gives_the_same(backend: str) -> None:
    torch.compiler.reset()
    compiled: Callable[..., tuple[Tensor, Tensor]] = torch.compile(augment, backend=backend, fullgraph=True)
    config = EVERYTHING
    for seed in range(2):
        slab = make_slab(seed)
        expected = run(slab, config)
        got = compiled(as_batch(slab), slab["uniforms"], config, PSLA_SPEC)
        assert torch.allclose(got[0], expected[0], atol=1e-5)
        assert torch.equal(got[1], expected[1])
    for frames in (40, 33, 27):  # buckets of other lengths
        batch, uniforms = as_batch(make_slab()), make_slab()["uniforms"]
        batch = batch._replace(fbank=batch.fbank[:, :frames], num_frames=batch.num_frames.clamp(max=frames))
        short = replace(config, time_mask_fraction=0.25)
        got, wanted = (f(batch, uniforms, short, PSLA_SPEC)[0] for f in (compiled, augment))
        assert torch.allclose(got, wanted, atol=1e-5)
    with_noise = replace(config, noise=0.1)
    noisy, _ = compiled(as_batch(make_slab()), make_slab()["uniforms"], with_noise, PSLA_SPEC)
    assert torch.isfinite(noisy).all()


@pytest.mark.parametrize(
    "field", ["gain_db", "freq_mask_bins", "time_mask_frames", "filter_augment_db", "noise", "roll_frames"]
)
def test_a_negative_setting_is_refused_by_its_flag(field: str) -> None:
    with pytest.raises(ValueError, match=f"augment.{field} is -1"):
        AugmentConfig(**{field: -1})


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.01, math.nan])
def test_a_fraction_out_of_range_is_refused_by_its_flag(fraction: float) -> None:
    with pytest.raises(
        ValueError, match=f"augment.time_mask_fraction is {fraction}; give a fraction above 0"
    ):
        AugmentConfig(time_mask_fraction=fraction)


@pytest.mark.parametrize("field", ["num_freq_masks", "num_time_masks"])
@pytest.mark.parametrize("count", [0, -1, 9])
def test_a_number_of_masks_out_of_range_is_refused_by_its_flag(field: str, count: int) -> None:
    with pytest.raises(ValueError, match=f"augment.{field} is {count}; give 1 to 8, or augment"):
        AugmentConfig(**{field: count})


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_a_rate_of_freq_mixstyle_out_of_range_is_refused_by_its_flag(value: float) -> None:
    with pytest.raises(ValueError, match=f"augment.freq_mixstyle is {value}; give a probability"):
        AugmentConfig(freq_mixstyle=value)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_an_alpha_out_of_range_is_refused_by_its_flag(value: float) -> None:
    with pytest.raises(ValueError, match=f"augment.freq_mixstyle_alpha is {value}; give a number above 0"):
        AugmentConfig(freq_mixstyle_alpha=value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gain_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=f"augment.gain_db is {value}; give 0 or more"):
        AugmentConfig(gain_db=value)


def test_masks_and_padding_at_the_mean_are_0_after_normalising() -> None:
    spec = InputSpec(40, 128, -4.0, -4.0, 2.0)
    config = fill_masks(AugmentConfig(mask_value="mean", freq_mask_bins=0, time_mask_frames=30), spec)
    assert config.mask_value == -4.0
    assert fill_masks(AugmentConfig(mask_value=1.5), spec).mask_value == 1.5
    stored = torch.full((1, 40, 128), 3.0)
    batch = StoredBatch(stored, torch.tensor([35]), torch.zeros(1, 2), torch.tensor([0]), torch.ones(1))
    uniforms = torch.zeros(1, NUM_UNIFORMS)
    uniforms[:, 2] = 0.99  # ⌊0.99 · 30⌋ frames from 0 on
    x, _ = augment(batch, uniforms, config, spec)
    assert x[0, :29].abs().max() == 0
    assert x[0, 35:].abs().max() == 0
    assert (x[0, 29:35] == 3.5).all()
