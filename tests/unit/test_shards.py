import gc
import io
import tarfile
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import webdataset

from psla_fast.classes import read_classes
from psla_fast.fbank import FbankConfig
from psla_fast.shards import ShardError, Storage, open_shards
from psla_fast.shards.index import write_index
from psla_fast.shards.spec import make_key
from psla_fast.shards.sums import write_sums
from psla_fast.shards.writer import Origin, ShardWriter


def write_split(
    folder: Path, num_shards: int = 2, clips: int = 5, dtype: str = "float16"
) -> list[np.ndarray]:
    folder.mkdir(parents=True)
    (folder.parent / "classes.csv").write_text("index,mid,display_name\n0,/m/a,A\n1,/m/b,B\n2,/m/c,C\n")
    rng = np.random.default_rng(0)
    storage, written, statistics = Storage.of(dtype), [], []
    for number in range(num_shards):
        with ShardWriter(folder, number, storage, task="t") as writer:
            for clip in range(clips):
                fbank = rng.uniform(-15, 8, (int(rng.integers(1, 40)), 128)).astype(np.float32)
                labels = sorted(rng.choice(3, size=rng.integers(1, 4), replace=False))
                origin = Origin(f"clip{number}_{clip}", f"clip {number}/{clip}", f"a/{clip}.wav")
                writer.add(origin, fbank, labels)
                written.append(fbank)
            statistics.append(writer.close())
    classes = read_classes(folder.parent / "classes.csv")
    index = write_index(folder, statistics, FbankConfig(), storage, classes)
    write_sums(folder, index.num_shards, index.sums)
    return written


@pytest.mark.parametrize(("dtype", "error"), [("float16", 0.0041), ("uint8", 0.0549)])
def test_a_written_fbank_reads_back_within_the_storage_s_rounding(tmp_path: Path, dtype: str, error: float):
    written = write_split(tmp_path / "train", dtype=dtype)
    with open_shards(tmp_path / "train") as shards:
        assert len(shards) == len(written) == len(shards.keys)
        for clip_id, fbank in enumerate(written):
            assert shards.fbank(clip_id).shape == fbank.shape
            assert np.abs(shards.fbank(clip_id) - fbank).max() <= error


def test_targets_are_the_labels_as_multi_hot_rows(tmp_path: Path):
    write_split(tmp_path / "train")
    with open_shards(tmp_path / "train") as shards:
        ids = np.array([3, 0, 7, 3])
        for clip_id, row in zip(ids, shards.targets(ids), strict=True):
            assert list(np.flatnonzero(row)) == list(shards.labels(clip_id))


def test_the_same_clips_give_the_same_bytes(tmp_path: Path):
    for name in ("one", "two"):
        write_split(tmp_path / name / "train")
    for file in sorted((tmp_path / "one/train").iterdir()):
        assert file.read_bytes() == (tmp_path / "two/train" / file.name).read_bytes(), file.name


def test_the_tar_is_ustar_with_mtime_0_and_the_dali_index_points_at_its_payloads(tmp_path: Path):
    write_split(tmp_path / "train")
    raw = (tmp_path / "train/00000.tar").read_bytes()
    lines = (tmp_path / "train/00000.idx").read_text().splitlines()
    assert lines[0] == "v1.2 5"
    with tarfile.open(fileobj=io.BytesIO(raw), format=tarfile.USTAR_FORMAT) as tar:
        members = {member.name: member for member in tar.getmembers()}
    assert len(members) == 10
    assert all(member.mtime == 0 and not member.pax_headers for member in members.values())
    assert raw[257:265] == b"ustar\x0000"
    for line in lines[1:]:
        words = line.split(" ")
        for extension, offset, size, name in (words[:4], words[4:]):
            assert name.endswith("." + extension)
            assert members[name].offset_data == int(offset)
            assert members[name].size == int(size)


def test_plain_webdataset_reads_the_clips(tmp_path: Path):
    written = write_split(tmp_path / "train")
    urls = [str(tmp_path / f"train/0000{n}.tar") for n in range(2)]
    with warnings.catch_warnings():  # it leaves its tars to the garbage collector
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(webdataset.WebDataset(urls, shardshuffle=False))
        gc.collect()
    with open_shards(tmp_path / "train") as shards:
        assert [sample["__key__"] for sample in samples] == shards.keys
        for clip_id, sample in enumerate(samples):
            fbank = np.frombuffer(sample["fbank"], "<f2").reshape(-1, 128)
            assert np.array_equal(fbank, written[clip_id].astype(np.float16))
            assert np.array_equal(np.frombuffer(sample["labels"], "<i4"), shards.labels(clip_id))


def test_dali_reads_the_same_arrays(tmp_path: Path):
    fn = pytest.importorskip("nvidia.dali.fn", reason="DALI is not installed")
    from nvidia.dali import pipeline_def, types

    write_split(tmp_path / "train", num_shards=1)

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def pipeline():
        fbank, labels = fn.readers.webdataset(
            paths=[str(tmp_path / "train/00000.tar")],
            index_paths=[str(tmp_path / "train/00000.idx")],
            ext=["fbank", "labels"],
            dtypes=[types.DALIDataType.FLOAT16, types.DALIDataType.INT32],
            dont_use_mmap=True,
        )
        return fbank, labels

    pipe = pipeline()
    pipe.build()
    with open_shards(tmp_path / "train") as shards:
        for clip_id in range(len(shards)):
            fbank, labels = (np.asarray(out.at(0)) for out in pipe.run())
            assert np.array_equal(fbank.reshape(-1, 128).astype(np.float32), shards.fbank(clip_id))
            assert np.array_equal(labels, shards.labels(clip_id))


@pytest.mark.parametrize("name", ["a b", "x/y", "dot.ted", "é", "", "n" * 200])
def test_a_key_is_fit_for_every_reader_and_unlike_its_neighbours(name: str):
    key = make_key(name)
    assert 0 < len(key) <= 80
    assert all(c.isascii() and (c.isalnum() or c in "-_") for c in key)
    assert key != make_key(name + " ")
    assert key != make_key(name.replace(" ", "_").replace("/", "_").replace(".", "_") + "_")


def test_a_plain_name_is_its_own_key():
    assert make_key("-abcDEF_12") == "-abcDEF_12"


def test_the_index_fingerprint_changes_with_the_clips(tmp_path: Path):
    write_split(tmp_path / "a/train")
    write_split(tmp_path / "b/train", clips=4)
    with open_shards(tmp_path / "a/train") as one, open_shards(tmp_path / "b/train") as other:
        assert one.fingerprint != other.fingerprint


def damaged(tmp_path: Path, name: str) -> Path:
    write_split(tmp_path / "train")
    return tmp_path / "train" / name


def test_a_flipped_byte_is_an_error_that_names_shard_key_and_offset(tmp_path: Path):
    tar = damaged(tmp_path, "00001.tar")
    with open_shards(tmp_path / "train") as shards:
        offset = int(shards.index.offset[6])
    raw = bytearray(tar.read_bytes())
    raw[offset + 3] ^= 1
    tar.write_bytes(raw)
    with open_shards(tmp_path / "train") as shards:
        with pytest.raises(ShardError, match=rf"00001\.tar, key clip1_1, offset {offset}: crc32 differs"):
            shards.fbank(6)
        assert shards.fbank(5).shape[1] == 128


def test_a_cut_shard_is_an_error_that_names_both_sizes(tmp_path: Path):
    tar = damaged(tmp_path, "00000.tar")
    size = tar.stat().st_size
    tar.write_bytes(tar.read_bytes()[:-1024])
    with (
        open_shards(tmp_path / "train") as shards,
        pytest.raises(ShardError, match=f"has {size - 1024} bytes, its index says {size}"),
    ):
        shards.fbank(0)


def test_a_deleted_shard_is_named(tmp_path: Path):
    damaged(tmp_path, "00000.tar").unlink()
    with (
        open_shards(tmp_path / "train") as shards,
        pytest.raises(ShardError, match=r"00000\.tar: No such file"),
    ):
        shards.fbank(0)


def test_garbage_for_an_index_is_one_clear_error(tmp_path: Path):
    damaged(tmp_path, "index.h5").write_bytes(b"garbage")
    with pytest.raises(ShardError, match=r"index\.h5 differs from its sum in SHA256SUMS"):
        open_shards(tmp_path / "train")
    write_sums(tmp_path / "train", 2, {})
    with pytest.raises(ShardError, match="index.h5 can't be read"):
        open_shards(tmp_path / "train")


def test_a_split_without_its_sums_is_not_complete(tmp_path: Path):
    damaged(tmp_path, "SHA256SUMS").unlink()
    with pytest.raises(ShardError, match="SHA256SUMS is not there: the split isn't packed to its end"):
        open_shards(tmp_path / "train")


def test_an_index_that_claims_more_than_it_holds_takes_no_memory(tmp_path: Path):
    with h5py.File(damaged(tmp_path, "index.h5"), "a") as file:
        del file["offset"]
        file.create_dataset("offset", shape=(10**12,), dtype="<i8", chunks=(1024,))
    write_sums(tmp_path / "train", 2, {})
    with pytest.raises(ShardError, match="offset is not whole"):
        open_shards(tmp_path / "train")


def test_a_class_list_in_another_order_is_refused(tmp_path: Path):
    write_split(tmp_path / "train")
    classes = tmp_path / "classes.csv"
    classes.write_text(classes.read_text().replace("0,/m/a,A\n1,/m/b,B", "0,/m/b,B\n1,/m/a,A"))
    with pytest.raises(ShardError, match=r"classes\.csv lists other classes, or in another order"):
        open_shards(tmp_path / "train")


def test_an_index_without_its_attributes_is_one_clear_error(tmp_path: Path):
    with h5py.File(damaged(tmp_path, "index.h5"), "a") as file:
        del file.attrs["mean"]
    write_sums(tmp_path / "train", 2, {})
    with pytest.raises(ShardError, match=r"index\.h5 is no index of a split: mean don't fit"):
        open_shards(tmp_path / "train")


def test_opening_the_folder_above_names_the_splits(tmp_path: Path):
    write_split(tmp_path / "train")
    with pytest.raises(ShardError, match="Pass one of its splits: train"):
        open_shards(tmp_path)


def test_a_clip_id_out_of_range_is_an_index_error(tmp_path: Path):
    write_split(tmp_path / "train")
    with open_shards(tmp_path / "train") as shards, pytest.raises(IndexError):
        shards.fbank(10)
