"""Compressed constants: the evaluator's dense values and the raw codes equal coremltools' own references."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreml_packages import build, convert, ct, feeds_of, mb, run
from torch import nn

from octoc.runtime.coreml import open_session
from octoc.runtime.mil.compressed import read_constants, read_stored
from octoc.runtime.mil.storage import unpack_bits

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import coremltools.optimize.coreml as cto
    from coremltools.converters.mil.mil import types


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.linear = nn.Linear(16, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.relu(self.conv(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def float_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return convert(Net(), (torch.randn(1, 8, 5, 5),), tmp_path_factory.mktemp("float"))


def _linear(**options: Any) -> Callable[[Any], Any]:
    config = cto.OptimizationConfig(cto.OpLinearQuantizerConfig(weight_threshold=0, **options))
    return lambda model: cto.linear_quantize_weights(model, config)


def _palette(**options: Any) -> Callable[[Any], Any]:
    config = cto.OptimizationConfig(cto.OpPalettizerConfig(weight_threshold=0, **options))
    return lambda model: cto.palettize_weights(model, config)


def _prune(model: Any) -> Any:
    config = cto.OptimizationConfig(cto.OpMagnitudePrunerConfig(target_sparsity=0.5, weight_threshold=0))
    return cto.prune_weights(model, config)


def _pruned_then(options: Callable[..., Callable[[Any], Any]], **more: Any) -> Callable[[Any], Any]:
    config_of = {_linear: cto.OpLinearQuantizerConfig, _palette: cto.OpPalettizerConfig}
    compress = {_linear: cto.linear_quantize_weights, _palette: cto.palettize_weights}[options]
    config = cto.OptimizationConfig(config_of[options](weight_threshold=0, **more))
    return lambda model: compress(_prune(model), config, joint_compression=True)


COMPRESSIONS: dict[str, Callable[[Any], Any]] = {
    "int8 symmetric": _linear(mode="linear_symmetric"),
    "uint8 asymmetric": _linear(mode="linear", dtype="uint8"),
    "int4 per block": _linear(mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=4),
    "uint4 per tensor": _linear(mode="linear", dtype="uint4", granularity="per_tensor"),
    **{f"{bits}-bit palette": _palette(mode="uniform", nbits=bits) for bits in (1, 2, 3, 4, 6, 8)},
    "grouped palette": _palette(mode="uniform", nbits=3, granularity="per_grouped_channel", group_size=4),
    "vector palette": _palette(mode="kmeans", nbits=4, cluster_dim=2),
    "scaled palette": _palette(mode="uniform", nbits=4, enable_per_channel_scale=True),
    "pruned": _prune,
    "pruned int8": _pruned_then(_linear, mode="linear_symmetric"),
    "pruned palette": _pruned_then(_palette, mode="uniform", nbits=4),
}


def _dense(var: Any) -> Any:
    """A constant's value by coremltools' own `decompress`, through chained constexpr operations."""
    if var.val is not None:
        return var.val
    decompress = type(var.op).decompress
    given = {name: _dense(source) for name, source in var.op.inputs.items()}
    value = decompress(**{name: given.get(name) for name in inspect.signature(decompress).parameters})
    return value[var.op_output_idx] if isinstance(value, tuple) else value


def _reference_weights(model: Any) -> list[np.ndarray]:
    """Dense weights of the conv and the linear."""
    operations = model._mil_program.functions["main"].operations
    return [np.asarray(_dense(op.weight), np.float32) for op in operations if op.op_type in ("conv", "linear")]


@pytest.mark.parametrize("name", COMPRESSIONS)
@pytest.mark.filterwarnings("ignore")
def test_a_compressed_package_computes_with_the_weights_of_the_reference(
    name: str, float_package: Path, tmp_path: Path
) -> None:
    model = ct.models.MLModel(str(float_package), skip_model_load=True)
    small = COMPRESSIONS[name](model)
    path = tmp_path / "small.mlpackage"
    small.save(str(path))
    conv, linear = _reference_weights(small)

    session = open_session(path)
    x = torch.randn(1, 8, 5, 5)
    feeds = feeds_of(session, [x])
    stored = read_stored(path)
    biases = {
        value.shape[0]: torch.from_numpy(value.copy()) for value in stored.values() if value.shape in ((16,), (24,))
    }
    hidden = torch.relu(nn.functional.conv2d(x, torch.from_numpy(conv), biases.get(16), padding=1)).mean((2, 3))
    wanted = nn.functional.linear(hidden, torch.from_numpy(linear), biases.get(24))
    (got,) = session.run(feeds).values()
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=1e-5)

    dense = [v for r in session.trace(feeds) if r.kind.startswith("constexpr") for v in r.outputs.values()]
    for weight in (conv, linear):
        assert any(value.shape == weight.shape and np.array_equal(value, weight) for value in dense)


@pytest.mark.filterwarnings("ignore")
def test_the_raw_fields_are_the_codes_scales_and_tables_of_the_file(float_package: Path, tmp_path: Path) -> None:
    model = ct.models.MLModel(str(float_package), skip_model_load=True)
    for number, (compress, kind, roles) in enumerate(
        [
            (COMPRESSIONS["int4 per block"], "constexpr_blockwise_shift_scale", {"codes", "scale"}),
            (COMPRESSIONS["3-bit palette"], "constexpr_lut_to_dense", {"codes", "table"}),
            (COMPRESSIONS["pruned"], "constexpr_sparse_to_dense", {"values", "mask"}),
        ]
    ):
        small = compress(model)
        path = tmp_path / f"{number}.mlpackage"
        small.save(str(path))
        found = read_constants(path)
        operations = {
            output.name: op
            for op in small._mil_program.functions["main"].operations
            if op.op_type == kind
            for output in op.outputs
        }
        assert set(operations) <= set(found)
        for name, op in operations.items():
            assert found[name].kind == kind
            assert set(found[name].fields) >= roles
            if "codes" in roles:
                codes = op.inputs["data" if "data" in op.inputs else "indices"].val
                np.testing.assert_array_equal(found[name].fields["codes"], codes.astype(np.int64))
            else:
                dense = op.materialized_val_inference()
                np.testing.assert_array_equal(found[name].fields["values"], dense)
                np.testing.assert_array_equal(found[name].fields["mask"], op.mask.val != 0)


def _as(dtype: str, values: Any) -> np.ndarray:
    return np.asarray(values).astype(types.nptype_from_builtin(types.string_to_builtin(dtype)))


def test_the_ios16_forms_unpack_their_bits(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 64, (5, 7)).astype(np.uint8)
    packed = np.packbits(((codes.reshape(-1, 1) >> np.arange(6)) & 1).reshape(-1), bitorder="little").astype(np.uint8)
    table = rng.standard_normal(64).astype(np.float32)
    mask = rng.random((5, 7)) > 0.5
    values = rng.standard_normal(mask.sum()).astype(np.float32)
    integers = rng.integers(0, 256, (5, 7)).astype(np.uint8)
    scale, zero = rng.random(5).astype(np.float32), rng.integers(0, 256, 5).astype(np.uint8)

    def function(x: Any) -> Any:
        shape = np.uint32([5, 7])
        affine = mb.constexpr_affine_dequantize(
            quantized_data=integers, zero_point=zero, scale=scale, axis=np.int32(0), name="affine"
        )
        palette = mb.constexpr_lut_to_dense(indices=packed, lut=table, shape=shape, name="palette")
        bits = np.packbits(mask.reshape(-1), bitorder="little")
        sparse = mb.constexpr_sparse_to_dense(nonzero_data=values, mask=bits, shape=shape, name="sparse")
        cast = mb.constexpr_cast(
            source_val=table[:35].reshape(5, 7).astype(np.float16), output_dtype="fp32", name="half"
        )
        return [mb.add(x=x, y=constant) for constant in (affine, palette, sparse, cast)]

    path = build(function, [(5, 7)], tmp_path, target="iOS16", skip_passes=True)
    affine, palette, sparse, half = run(path, np.zeros((5, 7), np.float32))
    np.testing.assert_array_equal(affine, scale[:, None] * (integers.astype(np.float32) - zero[:, None]))
    np.testing.assert_array_equal(palette, table[codes])
    dense = np.zeros((5, 7), np.float32)
    dense[mask] = values
    np.testing.assert_array_equal(sparse, dense)
    np.testing.assert_array_equal(half, table[:35].reshape(5, 7).astype(np.float16))

    found = read_constants(path)
    np.testing.assert_array_equal(found["palette"].fields["codes"], codes)
    np.testing.assert_array_equal(found["affine"].fields["codes"], integers)
    np.testing.assert_array_equal(found["affine"].fields["offset"], zero)
    np.testing.assert_array_equal(found["sparse"].fields["values"], dense)


@pytest.mark.parametrize("dtype", ["int4", "uint1", "uint2", "uint3", "uint4", "uint6"])
@pytest.mark.parametrize("size", [3, 101])
def test_sub_byte_codes_come_back_from_the_file_and_from_inline_values(dtype: str, size: int, tmp_path: Path) -> None:
    bits = int(dtype[-1])
    rng = np.random.default_rng(bits)
    low, high = (-8, 8) if dtype == "int4" else (0, 2**bits)
    codes = rng.integers(low, high, size)

    def function(x: Any) -> Any:
        data = _as(dtype, codes)
        if dtype in ("int4", "uint4"):
            return mb.add(x=x, y=mb.constexpr_blockwise_shift_scale(data=data, scale=np.float32([0.5]), name="w"))
        table = np.arange(2**bits, dtype=np.float32).reshape(1, -1, 1) / 2
        return mb.add(x=x, y=mb.constexpr_lut_to_dense(indices=data, lut=table, name="w"))

    path = build(function, [(size,)], tmp_path, skip_passes=True)
    np.testing.assert_array_equal(read_constants(path)["w"].fields["codes"], codes)
    np.testing.assert_array_equal(run(path, np.zeros(size, np.float32))[0], codes * np.float32(0.5))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_unpacking_inverts_packing_across_byte_borders(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, 77)
    packed = np.packbits(((codes[:, None] >> np.arange(bits)) & 1).reshape(-1).astype(np.uint8), bitorder="little")
    np.testing.assert_array_equal(unpack_bits(packed, bits, 77), codes)


@pytest.mark.parametrize("first", ["octoc", "coremltools"])
def test_packages_are_read_beside_coremltools_imported_before_or_after(first: str, float_package: Path) -> None:
    lines = {
        "octoc": f"from octoc.runtime.mil.reader import read_program; from pathlib import Path; "
        f"assert read_program(Path({str(float_package)!r})).inputs",
        "coremltools": "import coremltools.proto.Model_pb2",
    }
    second = "coremltools" if first == "octoc" else "octoc"
    check = "import sys; assert 'coremltools' not in sys.modules" if first == "octoc" else "pass"
    script = "\n".join([lines[first], check, lines[second]])
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
