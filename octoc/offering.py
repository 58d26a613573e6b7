"""What may be chosen for each weight of one artefact: by the device, the exporter and the user."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field

from octoc.device import Device
from octoc.errors import UsageError
from octoc.export import Exporter
from octoc.model import Layer, Model, operation
from octoc.options import Asked
from octoc.placement import choices, offers, offers_of, sparse_offers
from octoc.qtensor import Scheme
from octoc.recipe import Encode, Recipe
from octoc.report import Note
from octoc.search import Plan


@dataclass(frozen=True)
class Offering:
    """What the offers to the weights of one artefact depend on.

    Args:
        device, format: of the artefact.
        writer: the format's exporter.
        model: the network as it will be encoded.
        codable: names of the weights that the converter left as they are; None: all.
        integers: names of the weights whose operations run in integers.
        asked: which encodings the user asked for.
        pruned: whether weights were pruned, so that sparse encodings may pay.
        skipped: gets a note for each weight that is not encoded as asked.
    """

    device: Device
    format: str
    writer: Exporter
    model: Model
    codable: Set[str] | None
    integers: Set[str]
    asked: Asked
    pruned: bool
    skipped: list[Note] = field(default_factory=list)

    def schemes(self, recipe: Recipe | None) -> dict[str, list[Scheme]]:
        """What may be chosen for each weight, or the recipe's choice; weights without any are skipped."""
        found: dict[str, list[Scheme]] = {}
        for layer in self.model.layers():
            if self.codable is not None and layer.name not in self.codable:
                self.skipped.append(Note(layer.name, f"the converter to {self.format} transformed this weight"))
                continue
            schemes = self._offered(layer) if recipe is None else self._replayed(layer, recipe)
            if schemes:
                found[layer.name] = schemes
        return found

    def _offered(self, layer: Layer) -> list[Scheme]:
        """Encodings that the device runs, the exporter accepts and the user asked for."""
        nodes = self.model.nodes()
        kinds = [operation(nodes[name], self.model.tensors) for name in layer.nodes]
        offered = offers(self.device, self.format)
        if self.pruned:
            offered += sparse_offers(self.device, self.format)
        good, refused = choices(layer, kinds, offered, self.writer, layer.name in self.integers)
        if not good and layer.name in self.integers:
            why = next(iter(refused.values()), "")
            self.skipped.append(Note(layer.name, f"computes in floats: {why}"))
            good, refused = choices(layer, kinds, offered, self.writer, False)
        wanted = [scheme for scheme in good if self.asked.means(scheme)]
        if wanted:
            return _worth_pricing(wanted) or wanted
        if not good:
            why = next(iter(refused.values()), f"{self.device.id} runs no weight encoding in {self.format}")
            self.skipped.append(Note(layer.name, f"left in floats: {why}"))
            return []
        why = next(
            (r for text, r in refused.items() if self.asked.means(Scheme.parse(text))), "not offered by the device"
        )
        bits = self.asked.bits or 8
        instead = min(good, key=lambda scheme: (scheme.bits != bits, scheme.granularity != "channel", -scheme.bits))
        self.skipped.append(Note(layer.name, f"{self.asked}: {why}; stored as {instead}"))
        return [instead]

    def _replayed(self, layer: Layer, recipe: Recipe) -> list[Scheme]:
        """The recipe's encoding, which the exporter must accept; what the device prefers is not asked again."""
        for step in recipe.of(Encode):
            if step.tensor == layer.name:
                scheme = Scheme.parse(step.scheme)
                reason = scheme.unfit(layer.shape, layer.axis)
                reason = reason or self.writer.accepts(scheme, layer, layer.name in self.integers)
                if reason is not None:
                    raise UsageError(f"the recipe stores {layer.name} as {scheme}, and {self.format} cannot: {reason}")
                return [scheme]
        self.skipped.append(Note(layer.name, "the recipe leaves it in floats"))
        return []

    def remarks(self, plan: Plan) -> list[Note]:
        """What a plan's encodings cost beside bytes: an accelerator that does not run them, zeros that save nothing."""
        runners = self.device.runners(self.format)
        native = {
            offer.scheme for offer in (*offers_of(self.device, runners[:1]), *sparse_offers(self.device, self.format))
        }
        notes = []
        for name, scheme in (choice.key for choice in plan):
            if runners and scheme not in native:
                notes.append(
                    Note(name, f"{runners[0].name} does not run {scheme}; another processor of the device does")
                )
        if self.pruned and not any(choice.key[1].sparse for choice in plan):
            notes.append(
                Note("pruning", f"no weight is stored sparse, so that zeros save no bytes in {self.format} here")
            )
        return notes


def _worth_pricing(schemes: list[Scheme]) -> list[Scheme]:
    """What the planner looks at: without the palettes that take seconds a layer to compute and win nothing.

    Where int8 is on offer an 8-bit palette takes as many bytes for hardly less error, and a 6-bit palette a group of
    channels gains less than its tables cost.
    """
    if not any(scheme.kind == "affine" and scheme.bits == 8 for scheme in schemes):
        return schemes
    return [s for s in schemes if s.kind != "palette" or s.bits < 6 or (s.bits == 6 and s.granularity == "tensor")]
