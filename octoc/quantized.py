"""One line of Python: a network in, the same network with quantized weights out, which runs, evaluates and exports.

    small = octoc.quantize_model(module, bits=4, method="gptq", calibration_data=x)
    small(x[:8]), small.evaluate((x, y)), small.bits, small.export("model.onnx")

Activations, device profiles, planning and recovery are what `compress_model` is for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from octoc.apply import Encoder, encode_weights, fingerprint, restructure
from octoc.artifact import TOLERANCE
from octoc.compressed import Compressed
from octoc.data import Dataset, load_data
from octoc.errors import UsageError
from octoc.evaluate import model_calls, predict_model
from octoc.export import exporter
from octoc.load import load_model
from octoc.metrics import class_numbers, default_metric, get_metric
from octoc.model import Layer, Model
from octoc.proof import artifact_sha256, prove
from octoc.qtensor import Affine, Codebook, Palette, QTensor, Scheme
from octoc.quantize import encoder
from octoc.quantize.rotate import rewrite, rotatable
from octoc.recipe import Encode, FoldBatchNorm
from octoc.report import Check, Note
from octoc.sequential import encode_sequentially, needs_hessian
from octoc.verify import format_of, require, verify

if TYPE_CHECKING:
    from torch import nn

GROUP = 32  # where a kind of scheme always has groups and none are asked for
CALL = 32  # calibration samples in one call
_GRANULARITY = {"affine": "channel", "palette": "tensor", "asymmetric": "group", "codebook": "group"}


@dataclass(frozen=True)
class QuantizedModel:
    """A network with quantized weights.

    Args:
        compressed: its graph, and the compressed weights by name.
        original: the network that it was made of.
        samples: what it was given to look at, a few of which prove what it exports.
        notes: weights that are stored or encoded otherwise than asked, and why.
    """

    compressed: Compressed
    original: Model
    samples: Sequence[np.ndarray[Any, Any]]
    notes: tuple[Note, ...]

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Runs the network: its output, or a tuple where it has several."""
        outputs = self.compressed.decoded.run(*inputs)
        return outputs[0] if len(outputs) == 1 else outputs

    @property
    def bits(self) -> float:
        """Bits a quantized weight on average, with scales, zero points and tables."""
        tensors = self.compressed.qtensors.values()
        return 8 * sum(q.nbytes for q in tensors) / max(sum(int(np.prod(q.shape)) for q in tensors), 1)

    def evaluate(self, data: Any, metric: str | None = None) -> float:
        """A metric of the network.

        Args:
            data: in any form that `compress_model` takes.
            metric: a name or `module:function`; top-1 with class numbers, else the cosine to the original.
        """
        counted = load_data(data).check(self.original.inputs)
        outputs = predict_model(self.compressed.decoded, counted.inputs)
        labels = None if counted.labels is None else class_numbers(counted.labels, outputs[0])
        chosen = get_metric(metric) if metric else default_metric(labels)
        target = labels if chosen.needs_labels else predict_model(self.original, counted.inputs)[0]
        return chosen(outputs[0], target)

    def export(self, path: str | Path) -> list[Check]:
        """Writes a file and verifies it; what does not verify is not written.

        Args:
            path: its ending names the format; nothing may stand there yet.

        Raises:
            ArtifactError: no format has the ending.
            UsageError: the file exists, or the format cannot hold a weight so.
            VerificationError: the file does not compute what this network computes.
        """
        target = Path(path)
        name = format_of(target)
        if target.exists():
            raise UsageError(f"{target} exists; give another name, or remove it first")
        writer = exporter(name)
        layers = {layer.name: layer for layer in self.compressed.model.layers()}
        base = writer.convert(self.compressed.model)
        compute: str = getattr(base, "compute", "float32")
        for key, tensor in self.compressed.qtensors.items():
            reason = _unheld(tensor, compute) or writer.accepts(scheme_of(tensor, layers[key]), layers[key], False)
            if reason is not None:
                raise UsageError(f"{name} cannot hold {key} so: {reason}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".octoc-", dir=target.parent) as folder:
            made = Path(folder) / target.name
            writer.write(base, self.compressed, made)
            digest, model = artifact_sha256(made), fingerprint(self.original)
            samples = [np.asarray(array[:16]) for array in self.samples]
            proof = prove(self.compressed, samples, name, TOLERANCE[compute], 0, digest, model)
            checks = verify(made, proof)
            require(checks, target)
            made.rename(target)
        return checks


def quantize_model(
    model: nn.Module | Model | str | Path,
    bits: int = 4,
    *,
    method: str | None = None,
    kind: str | None = None,
    group_size: int | None = None,
    calibration_data: Any = None,
    examples: Sequence[Tensor] | None = None,
    dtype: str = "float32",
    seed: int = 0,
) -> QuantizedModel:
    """The network with the weights of its layers quantized.

    Args:
        model: a module, a `.pt2` file, or `package.module:function`.
        bits: width of the codes, 1 to 8.
        method: a file of octoc/quantize/; GPTQ with calibration data and rounding without where None.
        kind: "affine", "asymmetric", "palette" or "codebook"; the method's first where None.
        group_size: inputs that share a scale, or outputs that share a table. Where a layer is no multiple of it, the
            largest divisor below is taken, and a note says so. None: one scale a channel, one table a tensor, and
            groups of 32 for what always has groups.
        calibration_data: samples, in any form that `compress_model` takes; labels are not looked at.
        examples: one tensor an input, samples first, for a module without calibration data.
        dtype: of scales and tables: "float32" for ONNX and TFLite, "float16" for CoreML.
        seed: of random rotations.

    Raises:
        UsageError: the method does not make such codes, or needs calibration data that is not given.
    """
    name = method or ("rtn" if calibration_data is None else "gptq")
    chosen = encoder(name)
    kind = kind or chosen.ENCODES[0]
    if kind not in chosen.ENCODES:
        raise UsageError(f"{name} makes {' and '.join(chosen.ENCODES)} encodings, not {kind}")
    if "hessian" in chosen.NEEDS and calibration_data is None:
        raise UsageError(f"{name} needs calibration_data; rtn, hqq and higgs go without")
    data = None if calibration_data is None else load_data(calibration_data)
    network = model if isinstance(model, Model) else load_model(model, examples=examples or _examples(data))
    shaped = restructure(network, [FoldBatchNorm()])
    if name == "higgs":
        shaped = rewrite(shaped, rotatable(shaped), seed)
    steps, notes = _steps(shaped, bits, kind, group_size, dtype, name)
    samples = _samples(network, data, seed)
    if any(map(needs_hessian, steps)):
        calls = [
            c for start in range(0, len(samples[0]), CALL) for c in model_calls(shaped, _cut(samples, start), CALL)
        ]
        small, more = encode_sequentially(shaped, steps, Encoder(shaped), calls)
        return QuantizedModel(small, network, samples, (*notes, *more))
    small = Compressed(shaped, encode_weights(shaped, steps, Encoder(shaped)))
    return QuantizedModel(small, network, samples, notes)


def scheme_of(tensor: QTensor, layer: Layer) -> Scheme:
    """The scheme that a compressed weight of a layer has."""
    if isinstance(tensor, Affine | Codebook):
        kind = "codebook" if isinstance(tensor, Codebook) else "affine" if tensor.zero_point is None else "asymmetric"
        along = tensor.scale.shape[1 - layer.axis]
        vector = tensor.table.shape[1] if isinstance(tensor, Codebook) else 1
        if along > 1:
            return Scheme(kind, tensor.bits, "group", layer.shape[1 - layer.axis] // along, vector=vector)
        return Scheme(kind, tensor.bits, "channel" if tensor.scale.size > 1 else "tensor", vector=vector)
    assert isinstance(tensor, Palette)
    parts = tensor.table.shape[layer.axis]
    grouped = parts > 1
    return Scheme(
        "palette", tensor.bits, "group" if grouped else "tensor", layer.shape[layer.axis] // parts if grouped else 0
    )


def _unheld(tensor: QTensor, compute: str) -> str | None:
    """Why a file that computes in a dtype does not take the tensor's scales, or None."""
    stored = tensor.table.dtype if isinstance(tensor, Palette) else getattr(tensor, "scale", np.zeros(0)).dtype
    if stored == compute:
        return None
    return f"its scales are {stored}, and the file computes in {compute}; quantize with dtype={compute!r}"


def _examples(data: Dataset | None) -> list[Tensor] | None:
    return None if data is None else [torch.from_numpy(np.array(array[:2])) for array in data.inputs]


def _samples(network: Model, data: Dataset | None, seed: int) -> list[np.ndarray[Any, Any]]:
    """Calibration samples; without any, normal ones (zeros where inputs are whole numbers) that only prove files."""
    if data is not None:
        return [np.asarray(array[:]) for array in data.check(network.inputs).inputs]
    generator = np.random.default_rng(seed)
    made = []
    for example in network.examples(4):
        shape = tuple(example.shape)
        floats = example.is_floating_point()
        made.append(generator.normal(size=shape).astype(np.float32) if floats else example.numpy())
    return made


def _cut(samples: Sequence[np.ndarray[Any, Any]], start: int) -> list[np.ndarray[Any, Any]]:
    return [array[start : start + CALL] for array in samples]


def _steps(
    model: Model, bits: int, kind: str, group_size: int | None, dtype: str, method: str
) -> tuple[list[Encode], tuple[Note, ...]]:
    """The decision for each weight, and a note for each whose groups are others than those asked for."""
    steps, notes = [], []
    for layer in model.layers():
        width = layer.shape[layer.axis if kind == "palette" else 1 - layer.axis]
        wanted = group_size or (GROUP if _GRANULARITY[kind] == "group" else 0)
        size = next((g for g in range(min(wanted, width), 0, -1) if width % g == 0), 0)
        if wanted and size != wanted:
            notes.append(Note(layer.name, f"{width} channels in groups of {size}, not {wanted}"))
        granularity = "group" if wanted else _GRANULARITY[kind]
        scheme = Scheme.parse(str(Scheme(kind, bits, granularity, size)))  # which checks the width of the codes
        steps.append(Encode(layer.name, str(scheme), dtype, layer.axis, method))
    return steps, tuple(notes)
