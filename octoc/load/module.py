"""A live `torch.nn.Module` -> `Model`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from octoc.errors import ModelError
from octoc.load.graph import from_program
from octoc.model import Model


def from_module(module: nn.Module, examples: Sequence[Tensor]) -> Model:
    """Exports a module, with a free batch where it allows one.

    Args:
        module: put into inference mode for the export and back afterwards.
        examples: one tensor for each input, samples first.

    Raises:
        ModelError: torch.export cannot trace the module, with its reason.
    """
    training = module.training
    module.eval()
    try:
        return _export(module, [example.detach().contiguous() for example in examples])
    finally:
        module.train(training)


def _export(module: nn.Module, examples: list[Tensor]) -> Model:
    # torch specialises sizes 0 and 1, so a free batch must be traced with another size.
    pair = tuple(torch.cat([example[:1], example[:1]]) if example.dim() else example for example in examples)
    dynamic = tuple({0: torch.export.Dim("batch")} if example.dim() else None for example in examples)
    if all(example.dim() for example in examples):
        try:
            model = from_program(torch.export.export(module, pair, dynamic_shapes=dynamic))
            if model.dynamic_batch:
                return model
        except ModelError:
            raise
        except Exception:  # noqa: BLE001 - torch.export raises whatever the module's own code raises
            pass
    try:
        one = tuple(example[:1] if example.dim() else example for example in examples)
        return from_program(torch.export.export(module, one))
    except ModelError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"torch.export cannot trace {type(module).__name__}: {reason}") from error
