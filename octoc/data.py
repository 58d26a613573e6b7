"""Samples and labels: what a network is calibrated and judged on.

| source | what it holds |
|---|---|
| `.npz` | `x`, or `x0`, `x1` ... for several inputs, samples first, as the network takes them; labels `y` or none |
| `.npy` | one input, read lazily; no labels |
| a folder of images | `images.py` |
| `package.module:function` | batches: x, (x, y) or ((x0, x1), y); arrays or tensors |
| arrays or tensors themselves | one batch of that form |

Nothing is unpickled and nothing is scaled in silence: float64 and float16 become float32, integers become the network's
integers where they fit, and every other difference is an error.

Labels of one axis that are whole numbers from 0 to classes - 1 are class numbers, stored as integers or as floats,
where the network has more than one output. Other floats are no classes: without a metric, the cosine is counted.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from octoc.errors import DataError, reason
from octoc.reference import call, is_reference
from octoc.samples import Array, Samples, cast, fitted, taken

if TYPE_CHECKING:
    from octoc.model import InputSpec

ACCEPTED = "a .npz with x and y, a .npy, a folder of images, or package.module:function"
_CALIBRATION_SHARE = 0.2
_CALIBRATION_MOST = 512
_HASHED = 64  # samples read together to be compared


@dataclass(frozen=True)
class Dataset:
    """Samples and labels.

    Args:
        inputs: one for each input of the network, samples first.
        labels: [n, ...], or None.
        source: as the user typed it.
    """

    inputs: tuple[Samples, ...]
    labels: Array | None
    source: str

    def __len__(self) -> int:
        return len(self.inputs[0])

    def batches(self, size: int) -> Iterator[tuple[tuple[Array, ...], Array | None]]:
        """Inputs and labels of up to `size` samples at a time, in order."""
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            yield tuple(np.asarray(x[rows]) for x in self.inputs), None if self.labels is None else self.labels[rows]

    def take(self, indices: Sequence[int] | Array) -> Dataset:
        """The samples of some indices, in their order; arrays are copied, lazy samples stay lazy."""
        chosen = np.asarray(indices, dtype=np.int64)
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, inputs=tuple(taken(x, chosen) for x in self.inputs), labels=labels)

    def split(self, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
        """Two disjoint parts that make up the whole, each in the original order.

        Args:
            fraction: share of the first part; each part gets at least one sample.
            seed: the same seed gives the same parts. Each class of integer labels is cut in the same proportion.

        Raises:
            DataError: fewer than two samples.
        """
        count = len(self)
        if count < 2:
            raise DataError(f"{self.source} has {count} sample(s); two disjoint parts need at least 2")
        first = min(max(round(fraction * count), 1), count - 1)
        generator = np.random.default_rng(seed)
        order = generator.permutation(count)
        place = np.empty(count)  # where a sample stands within its class, from 0 to 1
        for members in _classes(self.labels, order):
            place[members] = (np.arange(len(members)) + 0.5) / len(members)
        ranked = order[np.argsort(place[order], kind="stable")]
        return self.take(np.sort(ranked[:first])), self.take(np.sort(ranked[first:]))

    def check(self, inputs: Sequence[InputSpec]) -> Dataset:
        """The same samples in the network's dtypes.

        Args:
            inputs: what the network takes.

        Raises:
            DataError: number, shape, dtype or values do not fit; the message has the numbers and the way out.
        """
        if len(self.inputs) != len(inputs):
            wanted = ", ".join(spec.name for spec in inputs)
            raise DataError(
                f"{self.source} has {len(self.inputs)} input(s); the network takes {len(inputs)} ({wanted}); "
                "give x, or x0, x1 ... in that order"
            )
        names = ["x"] if len(inputs) == 1 else [f"x{i}" for i in range(len(inputs))]
        cast = tuple(
            fitted(x, spec, f"{self.source}: {name}") for x, spec, name in zip(self.inputs, inputs, names, strict=True)
        )
        return replace(self, inputs=cast)


def load_data(source: Any, inputs: Sequence[InputSpec] | None = None, name: str = "the data") -> Dataset:
    """Reads samples, and labels where there are any.

    Args:
        source: one of the table above, or a `Dataset`.
        inputs: what the network takes; checked where given.
        name: of samples that have no file.

    Raises:
        UsageError: no such module or function.
        DataError: the source cannot be read, is empty, or does not fit the network.
    """
    if not isinstance(source, str | Path):
        data = source if isinstance(source, Dataset) else Dataset(*_batch(source), name)
        data = _checked(data)
        return data if inputs is None else data.check(inputs)
    path, text = Path(source), str(source)
    if path.is_dir():
        from octoc.images import load_folder

        data = load_folder(path)
    elif path.suffix.lower() in _FILES:
        data = _read_file(path)
    elif is_reference(text):
        data = _from_function(text)
    elif path.exists():
        raise DataError(f"{text} is not a kind of data that octoc reads; give {ACCEPTED}")
    else:
        raise DataError(f"{text}: no such file or folder; data is {ACCEPTED}")
    data = _checked(data)
    return data if inputs is None else data.check(inputs)


def split_calibration(data: Dataset, calibration: Dataset | None, seed: int) -> tuple[Dataset, Dataset]:
    """What to calibrate on and what to count quality on, never a sample in both: samples are compared byte by byte.

    Args:
        data: what quality is counted on. Without other samples, a fifth of it and at most 512 samples go to
            calibration: ranges and Hessians of vision networks settle within some hundred samples.
        calibration: samples to calibrate on, of which those in `data` are left out. The same samples as in `data`
            count as none.
        seed: of the split.

    Raises:
        DataError: fewer than two samples to split, or all of `calibration` is a part of `data`.
    """
    if calibration is not None:
        counted, known = _digests(data), _digests(calibration)
        evaluated = set(counted)
        rest = [i for i, digest in enumerate(known) if digest not in evaluated]
        if len(rest) == len(calibration):
            return calibration, data
        if rest:
            return calibration.take(rest), data
        if not evaluated <= set(known):
            raise DataError(
                f"all {len(calibration)} samples of {calibration.source} are in {data.source} too, where quality is "
                "counted; give others, or none and a part is split off"
            )
    return data.split(min(_CALIBRATION_SHARE, _CALIBRATION_MOST / max(len(data), 1)), seed)


def _digests(data: Dataset) -> list[bytes]:
    """SHA-256 of each sample, all its inputs together; few samples are in memory at a time."""
    found: list[bytes] = []
    for inputs, _ in data.batches(_HASHED):
        for rows in zip(*inputs, strict=True):
            digest = hashlib.sha256()
            for row in rows:
                digest.update(np.ascontiguousarray(row).tobytes())
            found.append(digest.digest())
    return found


def _read_file(path: Path) -> Dataset:
    if not path.is_file():
        raise DataError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"{path}: the file is empty")
    try:
        return _FILES[path.suffix.lower()](path)
    except (OSError, ValueError, EOFError, KeyError, SyntaxError, zipfile.BadZipFile, NotImplementedError) as error:
        if any(words in str(error) for words in ("allow_pickle", "pickled", "Python objects")):
            raise DataError(
                f"{path} holds Python objects, and reading them would run code; save arrays of numbers with np.savez"
            ) from error
        raise DataError(f"{path} ({size} bytes) is damaged or no {path.suffix} file: {reason(error)}") from error


def _read_npz(path: Path) -> Dataset:
    # checked first: given another kind of file, np.load would return something that is no archive
    if not zipfile.is_zipfile(path):
        _read_array(path)  # raises for a pickle
        raise ValueError("not a zip archive")
    with np.load(path, allow_pickle=False) as archive:
        names = sorted(archive.files)
        several = [f"x{i}" for i in range(len(names))]
        wanted = ["x"] if "x" in names else [name for name in several if name in names]
        if not wanted or set(names) - {*wanted, "y"} or (wanted != ["x"] and wanted != several[: len(wanted)]):
            raise DataError(
                f"{path} has {', '.join(names) or 'no array'}; octoc reads x (or x0, x1 ... for several inputs) and y"
            )
        inputs = tuple(np.asarray(archive[name]) for name in wanted)
        return Dataset(inputs, np.asarray(archive["y"]) if "y" in names else None, str(path))


def _read_npy(path: Path) -> Dataset:
    return Dataset((_read_array(path),), None, str(path))


def _read_array(path: Path) -> Array:
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            pickled = path.read_bytes()[:1] == b"\x80"
            raise ValueError("a pickled object" if pickled else "no NumPy header")
    found: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    return found


_FILES = {".npz": _read_npz, ".npy": _read_npy}


def _from_function(source: str) -> Dataset:
    """Data of a function that yields batches. All of it is kept: a generator must end."""
    produced = call(source, DataError)
    if not isinstance(produced, Iterable):
        raise DataError(f"{source} returned {type(produced).__name__}; it must yield batches: x, (x, y), ((x0, x1), y)")
    columns: list[tuple[Array, ...]] = []
    labels: list[Array] = []
    try:
        for batch in produced:
            xs, y = _batch(batch)
            if columns and (
                [x.shape[1:] for x in xs] != [x.shape[1:] for x in columns[0]] or bool(labels) != (y is not None)
            ):
                raise DataError(f"{source}: batch {len(columns)} is not of the form of the first: {_shapes(xs)}")
            if any(x.ndim == 0 for x in xs):
                raise DataError(f"{source}: batch {len(columns)} has a number where samples are due")
            columns.append(xs)
            if y is not None:
                labels.append(y)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{source}: batch {len(columns)} failed: {reason(error)}") from error
    if not columns:
        raise DataError(f"{source} yields no batch")
    inputs = tuple(np.concatenate(column) for column in zip(*columns, strict=True))
    return Dataset(inputs, np.concatenate([np.atleast_1d(y) for y in labels]) if labels else None, source)


def _batch(batch: Any) -> tuple[tuple[Array, ...], Array | None]:
    """Inputs and labels of x, (x, y) or ((x0, x1), y)."""
    if not isinstance(batch, tuple | list):
        return (_array(batch),), None
    if len(batch) != 2:
        raise DataError(f"a batch is x, (x, y) or ((x0, x1), y), and one has {len(batch)} parts")
    xs, y = batch
    inputs = tuple(_array(x) for x in xs) if isinstance(xs, tuple | list) else (_array(xs),)
    return inputs, None if y is None else _array(y)


def _array(value: Any) -> Array:
    """An array of an array or tensor, on whatever device it is."""
    return np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)


def _shapes(xs: Iterable[Array]) -> str:
    return ", ".join(str(list(x.shape)) for x in xs)


def _checked(data: Dataset) -> Dataset:
    """Data whose parts fit one another; floats are float32."""
    for i, x in enumerate(data.inputs):
        if len(x.shape) == 0:
            raise DataError(f"{data.source}: input {i} is one number, not samples")
        if len(x) == 0:
            raise DataError(f"{data.source} has no samples: input {i} is {list(x.shape)}")
        if len(x) != len(data):
            raise DataError(f"{data.source}: input {i} has {len(x)} samples, input 0 has {len(data)}")
        if x.dtype.kind not in "fiub":
            raise DataError(f"{data.source}: input {i} is {x.dtype}, not numbers")
    labels = data.labels
    if labels is not None:
        if labels.ndim == 0 or len(labels) != len(data):
            count = "one number" if labels.ndim == 0 else f"{len(labels)} labels"
            raise DataError(f"{data.source}: y has {count} for {len(data)} samples")
        if labels.dtype.kind not in "fiub":
            raise DataError(f"{data.source}: y is {labels.dtype}, not numbers; give class numbers from 0")
    inputs = tuple(x if x.dtype.kind != "f" else cast(x, np.dtype(np.float32)) for x in data.inputs)
    return replace(data, inputs=inputs)


def _classes(labels: Array | None, order: Array) -> list[Array]:
    """The samples of each class in the given order; one class where labels are no class numbers."""
    if labels is None or labels.ndim != 1 or labels.dtype.kind not in "iu":
        return [order]
    ordered = labels[order]
    by_class = order[np.argsort(ordered, kind="stable")]
    cuts = np.cumsum(np.unique(ordered, return_counts=True)[1])[:-1]
    return list(np.split(by_class, cuts))
