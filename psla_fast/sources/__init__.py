"""Sources: each turns a data set's own files into Clips, split by split."""

from psla_fast.sources.audioset import read_audioset
from psla_fast.sources.base import Split
from psla_fast.sources.datafile import read_datafile, read_label_rows, read_wavs
from psla_fast.sources.esc50 import read_esc50
from psla_fast.sources.folder import read_folder
from psla_fast.sources.fsd50k import read_fsd50k
from psla_fast.sources.hdf5 import read_hdf5, read_hdf5_waveform
from psla_fast.sources.table import read_table

__all__ = [
    "Split",
    "read_audioset",
    "read_datafile",
    "read_esc50",
    "read_folder",
    "read_fsd50k",
    "read_hdf5",
    "read_hdf5_waveform",
    "read_label_rows",
    "read_table",
    "read_wavs",
]
