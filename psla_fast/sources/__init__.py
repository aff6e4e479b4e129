"""Sources: each turns a data set's own files into Clips, split by split."""

from psla_fast.sources.base import Split
from psla_fast.sources.fsd50k import read_fsd50k

__all__ = ["Split", "read_fsd50k"]
