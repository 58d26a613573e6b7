from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from octoc import images
from octoc.data import load_data, split_calibration
from octoc.errors import DataError

PLAIN: dict[str, Any] = {"size": [4, 6]}


def _folder(path: Path, files: list[str], transform: Any = PLAIN, shape: tuple[int, ...] = (4, 6, 3)) -> Path:
    """Images of different values, so that order shows."""
    for i, name in enumerate(files):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, shape, np.uint8)
        Image.fromarray(pixels).save(path / name)
    if transform is not None:
        (path / "transform.json").write_text(json.dumps(transform))
    return path


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), np.float32)


def test_folders_name_the_classes_in_sorted_order(tmp_path: Path) -> None:
    folder = _folder(tmp_path, ["dog/b.png", "cat/z.png", "dog/a.png", "ant/.hidden.png"])
    data = load_data(folder)
    assert data.labels is not None
    assert list(data.labels) == [0, 1, 1]
    for i, name in enumerate(["cat/z.png", "dog/a.png", "dog/b.png"]):
        expected = _pixels(folder / name).transpose(2, 0, 1) / 255
        np.testing.assert_allclose(data.inputs[0][i], expected, rtol=1e-6)


def test_a_file_of_labels_names_the_class_of_each_image(tmp_path: Path) -> None:
    folder = _folder(tmp_path, ["a.png", "b.png"])
    (folder / "labels.csv").write_text("file,label\nb.png,7\na.png,3\n")
    labels = load_data(folder).labels
    assert labels is not None
    assert list(labels) == [3, 7]


def test_images_without_labels_have_none(tmp_path: Path) -> None:
    assert load_data(_folder(tmp_path, ["a.png", "b.png"])).labels is None


def test_mean_and_deviation_are_in_units_after_scaling_and_layout_is_kept(tmp_path: Path) -> None:
    transform = {**PLAIN, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.25, 1], "scale": 127.5, "layout": "NHWC"}
    folder = _folder(tmp_path, ["a.png"], transform)
    expected = (_pixels(folder / "a.png") / 127.5 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 1]
    np.testing.assert_allclose(load_data(folder).inputs[0][0], expected, rtol=1e-5, atol=1e-6)


def test_bgr_is_rgb_reversed_and_gray_has_one_channel(tmp_path: Path) -> None:
    rgb = load_data(_folder(tmp_path, ["a.png"])).inputs[0][:]
    bgr = load_data(_folder(tmp_path, [], {**PLAIN, "color": "BGR"})).inputs[0][:]
    np.testing.assert_array_equal(bgr, rgb[:, ::-1])
    assert load_data(_folder(tmp_path, [], {**PLAIN, "color": "L"})).inputs[0].shape == (1, 1, 4, 6)


def test_the_short_side_is_resized_and_the_center_cut_out(tmp_path: Path) -> None:
    transform = {"size": [4, 4], "resize_short_side": 8, "crop": "center"}
    folder = _folder(tmp_path, ["a.png"], transform, shape=(16, 32, 3))
    resized = Image.open(folder / "a.png").resize((16, 8), Image.Resampling.BILINEAR)
    expected = np.asarray(resized, np.float32)[2:6, 6:10].transpose(2, 0, 1) / 255
    np.testing.assert_allclose(load_data(folder).inputs[0][0], expected, rtol=1e-6)


def test_a_yaml_description_is_read(tmp_path: Path) -> None:
    folder = _folder(tmp_path, ["a.png"], None)
    (folder / "transform.yaml").write_text("size: [2, 3]\ncolor: L\n")
    assert load_data(folder).inputs[0].shape == (1, 1, 2, 3)


def test_many_images_are_decoded_when_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _folder(tmp_path, [f"{c}/{i}.png" for c in "ab" for i in range(5)])
    kept = load_data(folder)
    monkeypatch.setattr(images, "_KEPT", 100)
    lazy = load_data(folder)
    assert isinstance(lazy.inputs[0], images.Images)
    for eager, late in zip(split_calibration(kept, None, 0), split_calibration(lazy, None, 0), strict=True):
        for (a, y), (b, z) in zip(eager.batches(3), late.batches(3), strict=True):
            np.testing.assert_array_equal(a[0], b[0])
            np.testing.assert_array_equal(y, z)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_an_unreadable_image_is_named(tmp_path: Path, content: bytes) -> None:
    folder = _folder(tmp_path, ["a.png", "b.png"])
    (folder / "b.png").write_bytes(content)
    with pytest.raises(DataError, match=r"image .*b\.png cannot be read"):
        load_data(folder)


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    folder = _folder(tmp_path, ["a.png"], {"size": [64, 64]}, shape=(64, 64, 3))
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:2000])
    with pytest.raises(DataError, match=r"image .*a\.png cannot be read"):
        load_data(folder)


def test_an_image_smaller_than_the_crop_is_named(tmp_path: Path) -> None:
    folder = _folder(tmp_path, ["a.png"], {"size": [4, 8], "resize_short_side": 4})
    with pytest.raises(DataError, match=r"image .*a\.png is 6x4 after resizing, less than 8x4"):
        load_data(folder)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (None, r"has no transform\.json; write"),
        ({**PLAIN, "resize": 3}, "unknown key resize; there are size, resize_short_side"),
        ({}, r"size is None, and must be \[height, width\]"),
        ({"size": [4]}, "size is"),
        ({"size": [0, 4]}, "size is"),
        ({"size": [True, 4]}, "size is"),
        ({**PLAIN, "mean": [0.5]}, "mean is .* one number for each channel"),
        ({**PLAIN, "std": [0, 1, 1]}, "std is .* one positive number"),
        ({**PLAIN, "mean": ["a", "b", "c"]}, "mean is"),
        ({**PLAIN, "scale": 0}, "scale is 0"),
        ({**PLAIN, "color": "CMYK"}, "color is 'CMYK', and must be RGB, BGR or L"),
        ({**PLAIN, "color": ["RGB"]}, "color is"),
        ({**PLAIN, "crop": "random"}, "crop is 'random', and must be center"),
        ({**PLAIN, "layout": "HWC"}, "layout is 'HWC'"),
        ({**PLAIN, "resize_short_side": -1}, "resize_short_side is -1"),
        ([1], "holds list"),
    ],
)
def test_a_wrong_description_is_refused_with_what_it_must_be(tmp_path: Path, transform: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(_folder(tmp_path, ["a.png"], transform))


@pytest.mark.parametrize(
    ("name", "content"), [("transform.json", "{"), ("transform.yaml", "size: [1\n"), ("transform.json", "\xff")]
)
def test_a_description_that_is_no_json_or_yaml_is_refused(tmp_path: Path, name: str, content: str) -> None:
    folder = _folder(tmp_path, ["a.png"], None)
    (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match="cannot be read") as caught:
        load_data(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a.png,1\n", "names no label for 1 images, the first b.png"),
        ("a.png,1\nb.png,2\nc.png,3\n", "names 1 images that are not there, the first c.png"),
        ("a.png,1\nb.png,cat\n", "line 2: 'b.png,cat' is not file,label"),
        ("a.png,1\nb.png,-2\n", "line 2"),
        ("a.png\n", "line 1"),
    ],
)
def test_a_wrong_file_of_labels_is_refused_by_its_line(tmp_path: Path, content: str, message: str) -> None:
    folder = _folder(tmp_path, ["a.png", "b.png"])
    (folder / "labels.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        load_data(folder)


def test_a_folder_without_images_and_loose_images_beside_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no image"):
        load_data(_folder(tmp_path / "empty", []) if (tmp_path / "empty").mkdir() is None else tmp_path)
    with pytest.raises(DataError, match="lie beside the folders that name their classes"):
        load_data(_folder(tmp_path / "mixed", ["a.png", "cat/b.png"]))
