"""Operations that converted torch modules do not reach, built with the MIL builder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coreml_packages import build, ct, mb, run
from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

from octoc.errors import ArtifactError, DataError
from octoc.runtime.coreml import open_session
from octoc.runtime.mil.evaluate import OPERATIONS
from octoc.runtime.mil.operation import UnsupportedOperation, conversions

X = np.random.default_rng(0).standard_normal((2, 4, 6, 8)).astype(np.float32)
T = torch.from_numpy(X)


def _depth_to_space(x: np.ndarray) -> np.ndarray:
    n, c, h, w = x.shape
    return np.stack(
        [
            [
                [
                    [x[b, ((i % 2) * 2 + j % 2) * (c // 4) + k, i // 2, j // 2] for j in range(2 * w)]
                    for i in range(2 * h)
                ]
                for k in range(c // 4)
            ]
            for b in range(n)
        ]
    )


CASES: dict[str, tuple[Callable[[Any], Any], Callable[[], np.ndarray]]] = {
    "gelu tanh": (lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"), lambda: F.gelu(T, approximate="tanh").numpy()),
    "gelu sigmoid": (lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"), lambda: X / (1 + np.exp(-1.702 * X))),
    "clamped relu": (
        lambda x: mb.clamped_relu(x=x, alpha=0.1, beta=0.5),
        lambda: np.minimum(np.where(X > 0, X, 0.1 * X), 0.5),
    ),
    "scaled tanh": (lambda x: mb.scaled_tanh(x=x, alpha=1.5, beta=0.5), lambda: 1.5 * np.tanh(0.5 * X)),
    "linear activation": (lambda x: mb.linear_activation(x=x, alpha=2.0, beta=1.0), lambda: 2 * X + 1),
    "thresholded relu": (lambda x: mb.thresholded_relu(x=x, alpha=0.5), lambda: np.where(X >= 0.5, X, 0)),
    "softplus parametric": (
        lambda x: mb.softplus_parametric(x=x, alpha=np.float32([1, 2, 3, 4]), beta=np.float32([1, 1, 2, 2])),
        lambda: np.reshape([1, 2, 3, 4], (4, 1, 1)) * np.log1p(np.exp(np.reshape([1, 1, 2, 2], (4, 1, 1)) * X)),
    ),
    "l2 norm": (lambda x: mb.l2_norm(x=x), lambda: X / np.sqrt((X**2).sum((1, 2, 3), keepdims=True) + 1e-6)),
    "l2 pool": (
        lambda x: mb.l2_pool(x=x, kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid"),
        lambda: (F.avg_pool2d(T**2, 2) * 4).sqrt().numpy(),
    ),
    "same pooling": (
        lambda x: mb.max_pool(x=x, kernel_sizes=[3, 2], strides=[2, 3], pad_type="same"),
        lambda: F.max_pool2d(F.pad(T, (0, 0, 0, 1), value=-np.inf), (3, 2), (2, 3)).numpy(),
    ),
    "same lower convolution": (
        lambda x: mb.conv(x=x, weight=np.ones((2, 4, 2, 2), np.float32), pad_type="same_lower"),
        lambda: F.conv2d(F.pad(T, (1, 0, 1, 0)), torch.ones(2, 4, 2, 2)).numpy(),
    ),
    "asymmetric convolution": (
        lambda x: mb.conv(x=x, weight=np.ones((2, 4, 3, 3), np.float32), pad_type="custom", pad=[2, 0, 1, 3]),
        lambda: F.conv2d(F.pad(T, (1, 3, 2, 0)), torch.ones(2, 4, 3, 3)).numpy(),
    ),
    "depth to space": (lambda x: mb.depth_to_space(x=x, block_size=2), lambda: _depth_to_space(X)),
    "space to depth inverts": (
        lambda x: mb.depth_to_space(x=mb.space_to_depth(x=x, block_size=2), block_size=2),
        lambda: X,
    ),
    "batch to space inverts": (
        lambda x: mb.batch_to_space(
            x=mb.space_to_batch(x=x, block_shape=[2, 3], paddings=[[0, 0], [1, 0]]),
            block_shape=[2, 3],
            crops=[[0, 0], [1, 0]],
        ),
        lambda: X,
    ),
    "interleaved concat": (
        lambda x: mb.concat(values=[x, mb.mul(x=x, y=-1.0)], axis=1, interleave=True),
        lambda: np.stack([X, -X], 2).reshape(2, 8, 6, 8),
    ),
    "negative stride": (
        lambda x: mb.slice_by_index(
            x=x,
            begin=[0, 3, 0, -2],
            end=[0, 0, 0, 1],
            stride=[1, -1, 2, -3],
            begin_mask=[True, False, True, False],
            end_mask=[True, True, True, False],
        ),
        lambda: X[:, 3::-1, ::2, -2:1:-3],
    ),
    "squeezing slice": (
        lambda x: mb.slice_by_index(
            x=x,
            begin=[1, 0, -1, 0],
            end=[0, 2, 0, 0],
            end_mask=[False, False, False, True],
            squeeze_mask=[True, False, True, False],
        ),
        lambda: X[1, :2, -1],
    ),
    "slice by size": (
        lambda x: mb.slice_by_size(x=x, begin=[0, 1, 2, 3], size=[2, 2, -1, 4]),
        lambda: X[:, 1:3, 2:, 3:7],
    ),
    "reshape with zero": (lambda x: mb.reshape(x=x, shape=[0, -1, 0, 2]), lambda: X.reshape(2, 16, 6, 2)),
    "reshape like": (
        lambda x: mb.reshape_like(
            x=x,
            ref_tensors=(mb.reshape(x=x, shape=[16, 24]), mb.reshape(x=x, shape=[16, 6, 4])),
            begins=(0, 1),
            ends=(1, 0),
            end_masks=(False, True),
        ),
        lambda: X.reshape(16, 6, 4),
    ),
    "inverse": (lambda x: mb.inverse(x=mb.exp(x=x), epsilon=1e-4), lambda: 1 / (np.exp(X) + 1e-4)),
    "flatten": (lambda x: mb.flatten2d(x=x, axis=-2), lambda: X.reshape(8, 48)),
    "sliding windows": (
        lambda x: mb.sliding_windows(x=x, axis=2, size=3, stride=2),
        lambda: np.stack([X[:, :, i : i + 3] for i in (0, 2)], 2),
    ),
    "reverse sequence": (
        lambda x: mb.reverse_sequence(x=x, lengths=[2, 4], seq_axis=3, batch_axis=0),
        lambda: np.stack(
            [np.concatenate([x[..., :n][..., ::-1], x[..., n:]], -1) for x, n in zip(X, (2, 4), strict=True)]
        ),
    ),
    "exclusive reverse cumsum": (
        lambda x: mb.cumsum(x=x, axis=1, exclusive=True, reverse=True),
        lambda: np.stack([X[:, i + 1 :].sum(1) for i in range(4)], 1),
    ),
    "band": (lambda x: mb.band_part(x=x, lower=1, upper=2), lambda: np.tril(np.triu(X, -1), 2)),
    "crop": (lambda x: mb.crop(x=x, crop_height=[1, 2], crop_width=[0, 3]), lambda: X[:, :, 1:4, :5]),
    "batched gather": (
        lambda x: mb.gather(x=x, indices=np.int32([[1, 0], [3, 3]]), axis=1, batch_dims=1),
        lambda: np.stack([X[0][[1, 0]], X[1][[3, 3]]]),
    ),
    "gather nd": (lambda x: mb.gather_nd(x=x, indices=np.int32([[1, 3], [0, 2]])), lambda: X[[1, 0], [3, 2]]),
    "batched gather nd": (
        lambda x: mb.gather_nd(x=x, indices=np.int32([[[3, 1]], [[2, 5]]]), batch_dims=1),
        lambda: np.stack([X[0, 3, 1], X[1, 2, 5]])[:, None],
    ),
    "scatter nd": (
        lambda x: mb.scatter_nd(
            data=x, indices=np.int32([[1, 3], [1, 3]]), updates=np.ones((2, 6, 8), np.float32), mode="add"
        ),
        lambda: X + 2 * (np.arange(8).reshape(2, 4) == 7)[..., None, None],
    ),
    "scatter": (
        lambda x: mb.scatter(
            data=x, indices=np.int32([3, 0]), updates=np.full((2, 2, 6, 8), 2, np.float32), axis=1, mode="mul"
        ),
        lambda: X * np.float32([2, 1, 1, 2])[:, None, None],
    ),
    "slice update": (
        lambda x: mb.slice_update(
            x=x, update=np.zeros((2, 1, 3, 8), np.float32), begin=[0, 1, 0, 0], end=[2, 2, 6, 8], stride=[1, 1, 2, 1]
        ),
        lambda: np.where((np.arange(4) == 1)[:, None, None] & (np.arange(6) % 2 == 0)[:, None], 0, X),
    ),
    "nearest resize": (
        lambda x: mb.resize(
            x=x, shape=[0, 9], resized_dims=np.uint32(2), interpolation_mode="NEAREST_NEIGHBOR", sampling_mode="DEFAULT"
        ),
        lambda: F.interpolate(T, size=(6, 9), mode="nearest").numpy(),
    ),
    "bilinear resize": (
        lambda x: mb.resize_bilinear(x=x, target_size_height=4, target_size_width=13, sampling_mode="UNALIGN_CORNERS"),
        lambda: F.interpolate(T, size=(4, 13), mode="bilinear").numpy(),
    ),
    "aligned resize": (
        lambda x: mb.resize_bilinear(
            x=x, target_size_height=4, target_size_width=13, sampling_mode="STRICT_ALIGN_CORNERS"
        ),
        lambda: F.interpolate(T, size=(4, 13), mode="bilinear", align_corners=True).numpy(),
    ),
    "affine": (
        lambda x: mb.affine(
            x=x,
            transform_matrix=np.float32([[0.8, 0.1, 0.2, -0.1, 0.9, 0.0]]),
            output_height=5,
            output_width=4,
            sampling_mode="bilinear",
            padding_mode="constant",
            padding_value=0.0,
            coordinates_mode="normalized_minus_one_to_one",
            align_corners=True,
        ),
        lambda: F.grid_sample(
            T,
            F.affine_grid(torch.tensor([[[0.8, 0.1, 0.2], [-0.1, 0.9, 0.0]]] * 2), [2, 4, 5, 4], True),
            align_corners=True,
        ).numpy(),
    ),
    "einsum": (
        lambda x: mb.einsum(values=[x, mb.transpose(x=x, perm=[0, 3, 2, 1])], equation="nchw,nwhu->nchu"),
        lambda: np.einsum("nchw,nwhu->nchu", X, X.transpose(0, 3, 2, 1)),
    ),
    "attention with a float mask": (
        lambda x: mb.scaled_dot_product_attention(
            query=x, key=x, value=x, attn_mask=np.tril(np.ones((6, 6), np.float32))
        ),
        lambda: F.scaled_dot_product_attention(T, T, T, torch.ones(6, 6).tril()).numpy(),
    ),
    "fill like": (lambda x: mb.fill_like(ref_tensor=x, value=1.5), lambda: np.full(X.shape, 1.5)),
    "non zero": (lambda x: mb.non_zero(x=mb.cast(x=mb.greater(x=x, y=1.0), dtype="fp32")), lambda: np.argwhere(X > 1)),
    "quantize": (
        lambda x: mb.dequantize(
            input=mb.quantize(
                input=x,
                scale=np.float32([0.5, 0.01, 0.1, 1]),
                zero_point=np.int8([0, 3, -4, 1]),
                axis=1,
                output_dtype="int8",
            ),
            scale=np.float32([0.5, 0.01, 0.1, 1]),
            zero_point=np.int8([0, 3, -4, 1]),
            axis=1,
        ),
        lambda: _fake_quantize(X, np.float32([0.5, 0.01, 0.1, 1]), np.float32([0, 3, -4, 1])),
    ),
}


def _fake_quantize(x: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    scale, zero = scale.reshape(4, 1, 1), zero.reshape(4, 1, 1)
    return (np.clip(np.round(x / scale) + zero, -128, 127) - zero) * scale


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """All cases as the outputs of one program."""
    path = build(lambda x: [case[0](x) for case in CASES.values()], [X.shape], tmp_path_factory.mktemp("cases"))
    return dict(zip(CASES, run(path, X), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_an_operation_equals_its_reference(name: str, results: dict[str, np.ndarray]) -> None:
    got, wanted = results[name], CASES[name][1]()
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_quantize_rounds_half_to_even_before_the_zero_point_is_added(tmp_path: Path) -> None:
    def function(x: Any) -> Any:
        codes = mb.quantize(input=x, scale=np.float32(1), zero_point=np.uint8(1), output_dtype="uint8")
        return mb.cast(x=codes, dtype="fp32")

    (got,) = run(build(function, [(6,)], tmp_path), [0.5, 1.5, 2.5, -0.5, 300, -9])
    np.testing.assert_array_equal(got, [1, 3, 3, 1, 255, 0])


def test_integers_divide_and_wrap_as_integers(tmp_path: Path) -> None:
    def function(x: Any) -> Any:
        return mb.floor_div(x=x, y=3), mb.mod(x=x, y=3), mb.mul(x=x, y=x), mb.real_div(x=x, y=2)

    numbers = np.int32([-7, 7, 16777217, 8])
    path = build(function, [mb.TensorSpec((4,), dtype=ct.converters.mil.mil.types.int32)], tmp_path)
    floors, rest, squares, halves = run(path, numbers)
    np.testing.assert_array_equal(floors, numbers // 3)
    np.testing.assert_array_equal(rest, numbers % 3)
    np.testing.assert_array_equal(squares, numbers * numbers)
    np.testing.assert_array_equal(halves, [-3, 3, 8388608, 4])


def test_a_branch_and_a_loop_follow_the_data(tmp_path: Path) -> None:
    def function(x: Any) -> Any:
        total = mb.reduce_sum(x=x, axes=[0], keep_dims=False)
        branch = mb.cond(
            pred=mb.greater(x=total, y=0.0), _true_fn=lambda: mb.mul(x=x, y=2.0), _false_fn=lambda: mb.abs(x=x)
        )
        _, grown = mb.while_loop(
            _cond=lambda i, y: mb.less(x=i, y=3.0),
            _body=lambda i, y: (mb.add(x=i, y=1.0), mb.add(x=y, y=branch)),
            loop_vars=(np.float32(0), x),
        )
        return branch, grown

    path = build(function, [(3,)], tmp_path)
    for x in (np.float32([1, 2, -1]), np.float32([-1, -2, 1])):
        branch, grown = run(path, x)
        wanted = 2 * x if x.sum() > 0 else abs(x)
        np.testing.assert_array_equal(branch, wanted)
        np.testing.assert_array_equal(grown, x + 3 * wanted)
    session = open_session(path)
    many = session.run_many({session.inputs[0].name: np.float32([[1, 2, -1], [-1, -2, 1]])})
    np.testing.assert_array_equal(many[session.outputs[0].name], [[2, 4, -2], [1, 2, 1]])


def test_a_list_keeps_what_was_written(tmp_path: Path) -> None:
    def function(x: Any) -> Any:
        written = mb.list_write(ls=mb.make_list(init_length=2, elem_shape=(3,), dtype="fp32"), index=0, value=x)
        written = mb.list_write(ls=written, index=1, value=mb.mul(x=x, y=3.0))
        return mb.list_gather(ls=written, indices=[1, 0]), mb.list_read(ls=written, index=1)

    gathered, read = run(build(function, [(3,)], tmp_path), [1, 2, 3])
    np.testing.assert_array_equal(gathered, [[3, 6, 9], [1, 2, 3]])
    np.testing.assert_array_equal(read, [3, 6, 9])


def test_a_state_is_kept_between_calls_and_left_alone_by_a_trace(tmp_path: Path) -> None:
    def function(x: Any, total: Any) -> Any:
        return mb.coreml_update_state(
            state=total, value=mb.add(x=mb.read_state(input=total), y=mb.cast(x=x, dtype="fp16"))
        )

    half = ct.converters.mil.mil.types.fp16
    path = build(function, [(2,), mb.StateTensorSpec((2,), dtype=half)], tmp_path)
    session = open_session(path)
    feeds = {session.inputs[0].name: np.float32([1, 2])}
    output = session.outputs[0].name
    assert len(session.inputs) == 1
    np.testing.assert_array_equal(session.run(feeds)[output], [1, 2])
    session.trace(feeds)
    np.testing.assert_array_equal(session.run(feeds)[output], [2, 4])
    session = open_session(path)
    np.testing.assert_array_equal(
        session.run_many({name: np.stack([x] * 3) for name, x in feeds.items()})[output], [[1, 2], [2, 4], [3, 6]]
    )


@pytest.mark.parametrize("reset_after", [False, True])
def test_gru_scales_the_state_before_or_after_its_product(reset_after: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    steps, batch, size, hidden = 4, 2, 3, 5
    w, u = (rng.standard_normal((3 * hidden, n)).astype(np.float32) for n in (size, hidden))
    b, b_in = rng.standard_normal((2, 3 * hidden)).astype(np.float32)
    x = rng.standard_normal((steps, batch, size)).astype(np.float32)

    def function(x: Any) -> Any:
        start = np.zeros((batch, hidden), np.float32)
        return mb.gru(
            x=x,
            initial_h=start,
            weight_ih=w,
            weight_hh=u,
            bias=b,
            input_bias=b_in,
            output_sequence=True,
            reset_after=reset_after,
        )

    sequence, last = run(build(function, [x.shape], tmp_path), x)
    h = np.zeros((batch, hidden), np.float32)
    for step in range(steps):
        gates = (x[step] @ w.T + b_in).reshape(batch, 3, hidden)
        (ur, uo, uz), (br, bo, bz) = u.reshape(3, hidden, hidden), b.reshape(3, hidden)
        r, z = (1 / (1 + np.exp(-(g + h @ m.T + c))) for g, m, c in ((gates[:, 0], ur, br), (gates[:, 2], uz, bz)))
        recurrent = r * (h @ uo.T + bo) if reset_after else (r * h) @ uo.T + bo
        h = (1 - z) * np.tanh(gates[:, 1] + recurrent) + z * h
        np.testing.assert_allclose(sequence[step], h, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(last, h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_lstm_follows_its_formulas_with_peepholes_and_clipping(direction: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    steps, batch, size, hidden = 4, 2, 3, 5
    w, u = (rng.standard_normal((4 * hidden, n)).astype(np.float32) for n in (size, hidden))
    b, p = rng.standard_normal(4 * hidden).astype(np.float32), rng.standard_normal(3 * hidden).astype(np.float32)
    h, c = rng.standard_normal((2, batch, hidden)).astype(np.float32)
    x = rng.standard_normal((steps, batch, size)).astype(np.float32)

    def function(x: Any) -> Any:
        weights = {"weight_ih": w, "weight_hh": u, "bias": b, "peephole": p, "clip": np.float32(0.8)}
        return mb.lstm(x=x, initial_h=h, initial_c=c, direction=direction, output_sequence=True, **weights)

    sequence, last_h, last_c = run(build(function, [x.shape], tmp_path), x)
    (pi, pf, po), order = p.reshape(3, hidden), range(steps) if direction == "forward" else reversed(range(steps))
    for number, step in enumerate(order):
        i, f, o, g = np.split(x[step] @ w.T + h @ u.T + b, 4, axis=1)
        i, f = (1 / (1 + np.exp(-(gate + c * peep))) for gate, peep in ((i, pi), (f, pf)))
        c = np.clip(f * c + i * np.tanh(g), -0.8, 0.8)
        h = np.tanh(c) / (1 + np.exp(-(o + c * po)))
        np.testing.assert_allclose(sequence[number], h, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(last_h, h, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(last_c, c, rtol=1e-5, atol=1e-5)


NOT_IMPLEMENTED = {
    "classify",  # its output is a dictionary
    "conv_quantized",  # marked experimental
    "crop_resize",
    "non_maximum_suppression",
    "random_bernoulli",
    "random_categorical",
    "random_normal",
    "random_uniform",
}


def test_every_operation_and_parameter_of_coremltools_is_known_or_listed() -> None:
    for name, versions in SSAOpRegistry.core_ops.items():
        if name in NOT_IMPLEMENTED or name in ("const", "_const_symbolic"):
            assert name not in OPERATIONS
            continue
        known = set(conversions(OPERATIONS[name]))
        for version in versions.values():
            assert {key for key in version.input_spec.input_types if not key.startswith("_")} <= known, name


def test_an_operation_that_is_not_implemented_is_named(tmp_path: Path) -> None:
    path = build(lambda x: mb.random_normal(shape=[3]), [(3,)], tmp_path)
    with pytest.raises(UnsupportedOperation, match="random_normal"):
        open_session(path)


def test_a_feed_of_the_wrong_shape_or_name_is_refused(tmp_path: Path) -> None:
    session = open_session(build(lambda x: mb.relu(x=x), [(2, 3)], tmp_path))
    name = session.inputs[0].name
    with pytest.raises(DataError, match=r"expected \[2, 3\]"):
        session.run({name: np.zeros((3, 2), np.float32)})
    with pytest.raises(DataError, match="expected"):
        session.run({"other": np.zeros((2, 3), np.float32)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "Manifest.json").unlink(), "Manifest.json"),
        (lambda p: (p / "Manifest.json").write_text("[]"), "Manifest.json"),
        (lambda p: _model(p).unlink(), "model.mlmodel"),
        (lambda p: _model(p).write_bytes(b"\x00\x01 random bytes"), "not a Core ML model"),
        (lambda p: _model(p).write_bytes(b""), "not an mlProgram"),
        (lambda p: _weights(p).unlink(), "weight.bin"),
        (lambda p: _weights(p).write_bytes(b""), "weight.bin"),
        (lambda p: _weights(p).write_bytes(_weights(p).read_bytes()[:-64]), "data ends at byte"),
        (lambda p: _weights(p).write_bytes(b"\x00" * 200), "version"),
        (lambda p: _weights(p).write_bytes(_weights(p).read_bytes().replace(b"\xef\xbe\xad\xde", b"abcd")), "sentinel"),
    ],
)
def test_a_damaged_package_is_refused_in_one_line(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    path = build(lambda x: mb.linear(x=x, weight=np.ones((8, 16), np.float32)), [(2, 16)], tmp_path)
    damage(path)
    with pytest.raises(ArtifactError, match=message) as caught:
        open_session(path)
    assert "\n" not in str(caught.value)


def _model(path: Path) -> Path:
    return next(path.rglob("model.mlmodel"))


def _weights(path: Path) -> Path:
    return next(path.rglob("weight.bin"))
