import json
import shutil
import tracemalloc
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio.compliance.kaldi

from psla_fast.audio import read_waveform
from psla_fast.clip import Clip, Rejected
from psla_fast.pack import PackConfig, WorkConfig, pack_splits
from psla_fast.pack.table import ClipTable
from psla_fast.shards import open_shards
from psla_fast.sources import Split, read_fsd50k
from tests.makers import read_tree

LENIENT = PackConfig(max_rejected_fraction=0.2)
ONE = WorkConfig(workers=1)


def copy_of(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "data"))


def rejected(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


def test_every_clip_is_packed_with_its_labels_and_the_kaldi_fbank(synthetic_fsd50k: Path, packed: Path):
    classes, splits = read_fsd50k(synthetic_fsd50k)
    for split in splits:
        by_name = {clip.name: clip for clip in split.read()}
        with open_shards(packed / split.name) as shards:
            assert shards.classes == classes
            assert sorted(shards.keys) == sorted(by_name)
            for clip_id in range(0, len(shards), 7):
                clip = by_name[shards.keys[clip_id]]
                assert tuple(shards.labels(clip_id)) == clip.labels
                waveform = torch.from_numpy(read_waveform(split.root / clip.source))
                expected = torchaudio.compliance.kaldi.fbank(
                    waveform[None],
                    htk_compat=True,
                    sample_frequency=16000,
                    use_energy=False,
                    window_type="hanning",
                    num_mel_bins=128,
                    dither=0.0,
                    frame_shift=10,
                )
                assert np.abs(shards.fbank(clip_id) - expected.numpy()).max() < 0.0041  # float16's rounding


def test_mean_and_std_are_those_of_all_stored_values(packed: Path):
    with open_shards(packed / "train") as shards:
        values = np.concatenate([shards.fbank(i).ravel() for i in range(len(shards))]).astype(np.float64)
        assert shards.mean == pytest.approx(values.mean(), abs=1e-9)
        assert shards.std == pytest.approx(values.std(), abs=1e-9)


def test_the_number_of_workers_does_not_change_a_byte(synthetic_fsd50k: Path, packed: Path, tmp_path: Path):
    pack_splits(*read_fsd50k(synthetic_fsd50k), tmp_path / "two", PackConfig(), WorkConfig(workers=2))
    assert read_tree(tmp_path / "two") == read_tree(packed)


def test_a_resumed_pack_redoes_only_what_is_missing(synthetic_fsd50k: Path, packed: Path, tmp_path: Path):
    out = Path(shutil.copytree(packed, tmp_path / "out"))
    (out / "train/00001.json").unlink()  # as if killed before the statistics were written
    (out / "train/00002.tar").write_bytes(b"half")
    (out / "train/00003.tar.tmp").write_bytes(b"left over")
    (out / "train/index.h5").unlink()
    kept = (out / "train/00000.tar").stat().st_mtime_ns
    pack_splits(*read_fsd50k(synthetic_fsd50k), out, PackConfig(), ONE)
    (out / "train/00003.tar.tmp").unlink(missing_ok=True)
    assert read_tree(out) == read_tree(packed)
    assert (out / "train/00000.tar").stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [({"dtype": "uint8"}, "dtype was float16, is uint8"), ({"seed": 5}, "seed was 0, is 5")],
)
def test_other_settings_for_a_packed_folder_are_refused(
    synthetic_fsd50k: Path, packed: Path, change: dict[str, object], message: str
):
    before = read_tree(packed)
    with pytest.raises(ValueError, match=message):
        pack_splits(*read_fsd50k(synthetic_fsd50k), packed, replace(PackConfig(), **change), ONE)
    assert read_tree(packed) == before


def test_another_list_of_clips_for_a_packed_folder_is_refused(synthetic_fsd50k: Path, packed: Path):
    classes, splits = read_fsd50k(synthetic_fsd50k)
    fewer = [replace(split, read=lambda split=split: islice(split.read(), 1, None)) for split in splits]
    with pytest.raises(
        ValueError, match=r"its list had 64 rows, has 63; for instance \S+ is packed, but not in the list"
    ):
        pack_splits(classes, fewer, packed, PackConfig(), ONE)


def test_unusable_clips_are_counted_by_reason_and_the_rest_is_packed(synthetic_fsd50k: Path, tmp_path: Path):
    root = copy_of(synthetic_fsd50k, tmp_path)
    audio = root / "FSD50K.dev_audio"
    names = [path.stem for path in sorted(audio.iterdir())][:4]
    (audio / f"{names[0]}.wav").write_bytes(b"not audio at all")
    soundfile.write(audio / f"{names[1]}.wav", np.zeros(0), 44100)
    soundfile.write(audio / f"{names[2]}.wav", np.full(1000, 0.25), 44100)
    (audio / f"{names[3]}.wav").unlink()
    summaries = pack_splits(*read_fsd50k(root), tmp_path / "out", LENIENT, ONE)
    reasons = dict(summaries[0].rejected)
    assert reasons == {"undecodable": 1, "empty": 1, "dc_only": 1, "missing_audio": 1}
    listed = {row["key"]: row for row in rejected(tmp_path / "out/train")}
    assert sorted(listed) == names
    assert all(str(tmp_path) not in json.dumps(row) for row in listed.values())
    with open_shards(tmp_path / "out/train") as shards:
        assert len(shards) == summaries[0].num_clips
        assert not set(shards.keys) & set(names)


def test_mended_recordings_are_packed_when_the_rejected_are_tried_again(
    synthetic_fsd50k: Path, packed: Path, tmp_path: Path
):
    root = copy_of(synthetic_fsd50k, tmp_path)
    broken = sorted((root / "FSD50K.dev_audio").iterdir())[0]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:20])
    with pytest.raises(ValueError, match=r"1 of 64 clips rejected \(1 undecodable\)"):
        pack_splits(*read_fsd50k(root), tmp_path / "out", PackConfig(), ONE)
    broken.write_bytes(whole)
    with pytest.raises(ValueError, match="add --retry-rejected"):
        pack_splits(*read_fsd50k(root), tmp_path / "out", PackConfig(), ONE)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")}
    pack_splits(*read_fsd50k(root), tmp_path / "out", PackConfig(), replace(ONE, retry_rejected=True))
    assert read_tree(tmp_path / "out") == read_tree(packed)
    redone = [path for path, time in kept.items() if path.stat().st_mtime_ns != time]
    assert len(redone) == 1


def test_exchanged_recordings_are_refused_by_name(synthetic_fsd50k: Path, tmp_path: Path):
    root = copy_of(synthetic_fsd50k, tmp_path)
    pack_splits(*read_fsd50k(root), tmp_path / "out", PackConfig(), ONE)
    before = read_tree(tmp_path / "out")
    other = sorted((root / "FSD50K.dev_audio").iterdir())[0]
    soundfile.write(other, np.random.default_rng(0).uniform(-0.5, 0.5, 4410), 44100)
    with pytest.raises(
        ValueError, match=rf"packed from other recordings: \S+{other.name} had \d+ bytes, has 8864"
    ):
        pack_splits(*read_fsd50k(root), tmp_path / "out", PackConfig(), ONE)
    assert read_tree(tmp_path / "out") == before


def test_a_relabelled_clip_is_refused_by_name(synthetic_fsd50k: Path, packed: Path):
    classes, splits = read_fsd50k(synthetic_fsd50k)

    def relabelled(split=splits[0]):
        first, *others = split.read()
        yield replace(first, labels=(0,) if first.labels != (0,) else (1,))
        yield from others

    changed = [replace(splits[0], read=relabelled), *splits[1:]]
    with pytest.raises(ValueError, match=r"for instance \S+ has other labels"):
        pack_splits(classes, changed, packed, PackConfig(), ONE)


def test_more_rejected_than_allowed_is_an_error_before_anything_is_packed(
    synthetic_fsd50k: Path, tmp_path: Path
):
    root = copy_of(synthetic_fsd50k, tmp_path)
    for path in sorted((root / "FSD50K.dev_audio").iterdir())[:4]:
        path.unlink()
    with pytest.raises(ValueError, match=r"split train: 4 of \d+ clips rejected"):
        pack_splits(*read_fsd50k(root), tmp_path / "out", PackConfig(), ONE)
    assert len(rejected(tmp_path / "out/train")) == 4
    assert not list((tmp_path / "out").rglob("*.tar"))


def test_a_clip_shorter_than_one_window_becomes_one_frame_and_is_counted(
    synthetic_fsd50k: Path, tmp_path: Path
):
    root = copy_of(synthetic_fsd50k, tmp_path)
    path = sorted((root / "FSD50K.dev_audio").iterdir())[0]
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 800), 44100)
    summary = pack_splits(*read_fsd50k(root), tmp_path / "out", PackConfig(), ONE)[0]
    assert summary.num_short == 1
    with open_shards(tmp_path / "out/train") as shards:
        assert shards.fbank(shards.keys.index(path.stem)).shape == (1, 128)


def test_a_wrong_folder_is_one_clear_line(tmp_path: Path):
    with pytest.raises(ValueError, match=r"vocabulary\.csv not found in .*FSD50K\.dev_audio"):
        read_fsd50k(tmp_path)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{name},Tone,/demo/nothing,train", "unknown_label"),
        ("{other},Tone,/demo/tone,train", "duplicate_name"),
        ("{name},,,train", "no_label"),
        ("nowhere,Tone,/demo/tone,train", "missing_audio"),
    ],
)
def test_a_bad_row_is_rejected_by_its_reason(synthetic_fsd50k: Path, tmp_path: Path, row: str, reason: str):
    root = copy_of(synthetic_fsd50k, tmp_path)
    truth = root / "FSD50K.ground_truth/dev.csv"
    lines = truth.read_text().splitlines()
    name, other = (lines[n].split(",")[0] for n in (1, 2))
    lines[1] = row.format(name=name, other=other)
    truth.write_text("\n".join([lines[0], *lines[2:], lines[1]]) + "\n")
    rows = [row for split in read_fsd50k(root)[1] for row in iter(ClipTable(split))]
    bad = [row.reason.split(":")[0] for row in rows if isinstance(row, Rejected)]
    bad += ["missing_audio" for row in rows if isinstance(row, Clip) and not row.found]
    assert bad == [reason]


def test_a_table_that_is_no_csv_in_utf8_is_named(synthetic_fsd50k: Path, tmp_path: Path):
    root = copy_of(synthetic_fsd50k, tmp_path)
    truth = root / "FSD50K.ground_truth/dev.csv"
    for content in (
        b'fname,labels,mids,split\n1,"' + b"x" * 200_000,
        b"fname,labels,mids,split\n\xff\xfe,a,b,c\n",
    ):
        truth.write_bytes(content)
        with pytest.raises(ValueError, match=r"dev\.csv, line \d+: not a CSV file in UTF-8"):
            read_fsd50k(root)


def test_a_table_with_other_columns_or_splits_is_refused(synthetic_fsd50k: Path, tmp_path: Path):
    root = copy_of(synthetic_fsd50k, tmp_path)
    truth = root / "FSD50K.ground_truth/dev.csv"
    text = truth.read_text()
    truth.write_text(text.replace("fname,labels", "file,labels"))
    with pytest.raises(ValueError, match="columns are"):
        read_fsd50k(root)
    truth.write_text(text.replace(",train\n", ",test\n", 1))
    with pytest.raises(ValueError, match="split is 'test'"):
        read_fsd50k(root)


def test_a_list_of_many_clips_takes_few_bytes_each():
    def read():
        for number in range(30_000):
            yield Clip(f"id{number:09d}", f"part{number % 9}/id{number:09d}.wav", (number % 527, 526))

    tracemalloc.start()
    try:
        table = ClipTable(Split("train", Path("/"), read))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 300 * len(table)  # 2M clips under 600 MB
    assert table[29_999] == Clip("id000029999", "part2/id000029999.wav", (29_999 % 527, 526))
