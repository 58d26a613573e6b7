"""A folder of images and a description of their preprocessing -> `Dataset`.

`transform.json` or `transform.yaml` in the folder says what the network was trained with:

    {"size": [224, 224], "resize_short_side": 256, "crop": "center", "color": "RGB", "scale": 255,
     "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "layout": "NCHW"}

1. convert to `color`; 2. resize the short side (without `resize_short_side`, the whole image to `size`), bilinear;
3. cut out the center; 4. divide by `scale`, subtract `mean`, divide by `std`.
Labels are numbers of subfolders in sorted order, or `labels.csv` with rows `file,label`. Order is that of the paths.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octoc.data import Dataset
from octoc.errors import DataError, reason
from octoc.samples import Samples

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".gif", ".tif", ".tiff"}
_CHANNELS = {"RGB": 3, "BGR": 3, "L": 1}
_KEPT = 512 * 1024**2  # bytes of decoded samples that are kept; more are decoded each time
_EXAMPLE = '{"size": [224, 224], "resize_short_side": 256, "crop": "center", "mean": [...], "std": [...]}'


@dataclass(frozen=True)
class Transform:
    """From an image to an input of the network.

    Args:
        size: height and width of the result, in pixels.
        resize_short_side: pixels of the short side before the crop; None resizes to `size`, whatever the proportions.
        crop: "center"; only with `resize_short_side`.
        color: RGB, BGR or L (gray).
        scale: what pixels from 0 to 255 are divided by.
        mean: one for each channel, in units after `scale`.
        std: one for each channel, in units after `scale`.
        layout: NCHW or NHWC.
    """

    size: tuple[int, int]
    resize_short_side: int | None = None
    crop: str = "center"
    color: str = "RGB"
    scale: float = 255.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    layout: str = "NCHW"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        channels = _CHANNELS[self.color]
        return (channels, *self.size) if self.layout == "NCHW" else (*self.size, channels)

    def __call__(self, path: Path) -> NDArray[np.float32]:
        """The sample of an image file.

        Raises:
            DataError: the file is no image, or is smaller than the crop.
        """
        from PIL import Image

        try:
            with Image.open(path) as image:
                converted = image.convert("L" if self.color == "L" else "RGB")
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise DataError(f"image {path} cannot be read: {reason(error)}") from error
        pixels: NDArray[Any] = np.asarray(
            self._framed(converted, path), dtype=np.float32
        )  # [height, width(, channels)]
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        pixels = pixels[:, :, ::-1] if self.color == "BGR" else pixels
        pixels = pixels / np.float32(self.scale)
        pixels = pixels - np.asarray(self.mean or (0.0,), np.float32)
        pixels = pixels / np.asarray(self.std or (1.0,), np.float32)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1) if self.layout == "NCHW" else pixels)

    def _framed(self, image: Any, path: Path) -> Any:
        from PIL import Image

        height, width = self.size
        if self.resize_short_side is None:
            return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)
        ratio = self.resize_short_side / min(image.size)
        resized = tuple(max(1, round(side * ratio)) for side in image.size)
        image = image if image.size == resized else image.resize(resized, Image.Resampling.BILINEAR)
        if image.width < width or image.height < height:
            raise DataError(f"image {path} is {image.width}x{image.height} after resizing, less than {width}x{height}")
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))


@dataclass(frozen=True)
class Images:
    """Samples that are decoded when they are asked for."""

    paths: tuple[Path, ...]
    transform: Transform

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.paths), *self.transform.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: Any, /) -> NDArray[Any]:
        chosen = np.arange(len(self.paths))[rows]
        if chosen.ndim == 0:
            return self.transform(self.paths[int(chosen)])
        samples = np.empty((len(chosen), *self.transform.shape), np.float32)
        for i, row in enumerate(chosen):
            samples[i] = self.transform(self.paths[row])
        return samples


def load_folder(folder: Path) -> Dataset:
    """Reads a folder of images; decoded at once where all of them fit in 512 MiB.

    Raises:
        DataError: no images, no or a wrong description, labels that fit no image, an unreadable image.
    """
    transform = read_transform(folder)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if _is_image(path, folder))
    if not names:
        raise DataError(f"{folder} holds no image ({', '.join(sorted(_SUFFIXES))})")
    labels = _labels_of_file(folder, names) if (folder / "labels.csv").exists() else _labels_of_folders(folder, names)
    images = Images(tuple(folder / name for name in names), transform)
    small = 4 * int(np.prod(images.shape, dtype=np.int64)) <= _KEPT
    samples: Samples = images[:] if small else images
    return Dataset((samples,), labels, str(folder))


def read_transform(folder: Path) -> Transform:
    """The description in a folder.

    Raises:
        DataError: there is none, or it has unknown keys or values.
    """
    path = next(
        (folder / n for n in ("transform.json", "transform.yaml", "transform.yml") if (folder / n).exists()), None
    )
    if path is None:
        raise DataError(f"{folder} has no transform.json; write the network's preprocessing there, such as {_EXAMPLE}")
    try:
        content = _parsed(path)
    except ValueError as error:
        raise DataError(f"{path} cannot be read: {reason(error)}") from error
    if not isinstance(content, Mapping):
        raise DataError(f"{path} holds {type(content).__name__}, not keys and values such as {_EXAMPLE}")
    known = [field.name for field in fields(Transform)]
    if unknown := [str(key) for key in content if key not in known]:
        raise DataError(f"{path}: unknown key {', '.join(unknown)}; there are {', '.join(known)}")
    return _transform(content, path)


def _parsed(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _transform(content: Mapping[str, Any], path: Path) -> Transform:
    color = content.get("color", "RGB")
    channels = _CHANNELS.get(color) if isinstance(color, str) else None
    size = content.get("size")
    side, scale = content.get("resize_short_side"), content.get("scale", 255)
    rules = {
        "size": (
            isinstance(size, list) and len(size) == 2 and all(_is_positive(s, int) for s in size),
            "[height, width]",
        ),
        "resize_short_side": (side is None or _is_positive(side, int), "a positive number of pixels"),
        "crop": (content.get("crop", "center") == "center", "center"),
        "color": (channels is not None, "RGB, BGR or L"),
        "scale": (_is_positive(scale, int | float), "a positive number"),
        "mean": (_is_per_channel(content.get("mean"), channels, positive=False), "one number for each channel"),
        "std": (_is_per_channel(content.get("std"), channels, positive=True), "one positive number for each channel"),
        "layout": (content.get("layout", "NCHW") in ("NCHW", "NHWC"), "NCHW or NHWC"),
    }
    for key, (good, meaning) in rules.items():
        if not good:
            raise DataError(f"{path}: {key} is {content.get(key)!r}, and must be {meaning}")
    given = dict(content)
    for key in ("size", "mean", "std"):
        if key in given:
            given[key] = tuple(given[key] or ())
    return Transform(**given)


def _is_positive(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value < float("inf")


def _is_per_channel(values: Any, channels: int | None, positive: bool) -> bool:
    if values is None:
        return True
    if not isinstance(values, list) or len(values) != channels:
        return False
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and np.isfinite(v) for v in values)
    return numbers and (not positive or all(v > 0 for v in values))


def _is_image(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.suffix.lower() in _SUFFIXES and not hidden and path.is_file()


def _labels_of_folders(folder: Path, names: list[str]) -> NDArray[np.int64] | None:
    parents = [name.split("/")[0] if "/" in name else None for name in names]
    if all(parent is None for parent in parents):
        return None
    if loose := [name for name, parent in zip(names, parents, strict=True) if parent is None]:
        raise DataError(
            f"{folder}: {len(loose)} images ({loose[0]} ...) lie beside the folders that name their classes"
        )
    numbers = {name: i for i, name in enumerate(sorted({str(parent) for parent in parents}))}
    return np.array([numbers[str(parent)] for parent in parents], np.int64)


def _labels_of_file(folder: Path, names: list[str]) -> NDArray[np.int64]:
    path = folder / "labels.csv"
    labels: dict[str, int] = {}
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {reason(error)}") from error
    for line, row in enumerate(rows, 1):
        cells = [cell.strip() for cell in row]
        if not any(cells) or (line == 1 and len(cells) == 2 and cells[1] == "label"):
            continue
        if len(cells) != 2 or not cells[1].isascii() or not cells[1].isdigit():
            raise DataError(f"{path}, line {line}: {','.join(row)!r} is not file,label with a class number from 0")
        labels[Path(cells[0]).as_posix()] = int(cells[1])
    if absent := sorted(labels.keys() - set(names)):
        raise DataError(f"{path} names {len(absent)} images that are not there, the first {absent[0]}")
    if unnamed := [name for name in names if name not in labels]:
        raise DataError(f"{path} names no label for {len(unnamed)} images, the first {unnamed[0]}")
    return np.array([labels[name] for name in names], np.int64)
