"""Where images come from: one small module a source, behind `load` and, for the export alone, `load_test`."""

from pathlib import Path

from tuner import data_spec
from tuner.data_spec import DataSpec
from tuner.sources import arrays, decode, digits, folder, idx, torchvision
from tuner.sources.decode import Say
from tuner.sources.splits import Splits, refuse_few
from tuner.vae.data import Data, Split


def load(spec: DataSpec, kept: Path | None = None, say: Say = lambda text: None) -> Data:
    """The training and validation splits.

    What takes long is kept in the folder `kept`, and taken from there by the next call for the same; `say` is told how
    far it is. Raises Refused where images are missing, damaged, too few or too many: those of the test
    split, too, before hours of training.
    """
    splits = _read(spec, ("train", "validation"), kept, say)
    return Data(splits["train"], splits["validation"])


def load_test(spec: DataSpec, kept: Path | None = None) -> Split:
    """The test split: for the export alone, once. Raises as `load` does."""
    return _read(spec, ("test",), kept, lambda text: None)["test"]


def _read(spec: DataSpec, wanted: tuple[str, ...], kept: Path | None, say: Say) -> Splits:
    match spec:
        case data_spec.FolderSpec():
            return decode.read(folder.pictures(spec), spec, wanted, kept, say)
        case data_spec.ParquetSpec():
            from tuner.sources import parquet  # pyarrow, which no other source needs

            return decode.read(parquet.pictures(spec), spec, wanted, kept, say)
        case data_spec.DigitsSpec():
            splits = digits.read(spec)
        case data_spec.IdxSpec():
            splits = idx.read(spec)
        case data_spec.ArraysSpec():
            splits = arrays.read(spec)
        case data_spec.TorchvisionSpec() | data_spec.EmnistSpec():
            splits = torchvision.read(spec)
    refuse_few(splits, spec.place, by_hash=isinstance(spec, data_spec.ArraysSpec))
    return splits
