"""The proof of a directory with a manifest of ours: a save, or masks beside a plain checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from torchprune.checkpoint.encoding import Decoded
from torchprune.checkpoint.manifest import Manifest, read_manifest
from torchprune.checkpoint.save_load import converter_of
from torchprune.errors import CheckpointError
from torchprune.masking.mask import masked_layers
from torchprune.masking.plain_state import slots_of
from torchprune.study.proofs.artifact import loaded
from torchprune.study.proofs.dense_beside import check_dense, keeps_values
from torchprune.study.proofs.proof import Breaches, broken, unchecked
from torchprune.study.proofs.proof_steps import ProofSteps
from torchprune.study.proofs.seeded_inputs import seeded_inputs
from torchprune.study.proofs.stored_counts import CountLaws
from torchprune.study.proofs.stored_files import (
    Seals,
    TensorLaws,
    both_ways,
    check_files,
    check_reversal,
    files_of,
)
from torchprune.study.proofs.stored_grids import GridLaw
from torchprune.study.proofs.stored_layers import StoredLayer, of_file, of_model
from torchprune.study.proofs.stored_runs import (
    check_densify,
    check_fold,
    check_round_trip,
    check_sizes,
)

UNBUILT = "its class is not of transformers, and no model was given to read it into"


class SavedProof(ProofSteps):
    """The checks as they are made; `layers` and `weights` are of masked layers, as read."""

    def run(self) -> None:
        """Make all checks, those of one part of the files after the other."""
        manifest = self._manifest()
        if manifest is None or not self._tensors(manifest):
            return
        try:
            model = self._model(manifest)
        except CheckpointError as error:
            sizes = manifest.resized is not None and "sizes do not fit" in str(error)
            fits = f"tensors and settings of a {manifest.architecture:.80}"
            law = "shrink" if sizes else "manifest"
            self.checks.append(broken(law, self.name, fits, error))
            return
        if model is None:
            self._by_file(manifest)
            return
        self._by_model(model, manifest)
        self._computed(model, manifest)

    # -- files -------------------------------------------------------------------------------------

    def _manifest(self) -> Manifest | None:
        self._begin("files")
        try:
            manifest = read_manifest(self.home, verify=False)
        except (CheckpointError, OSError) as error:
            self.checks.append(broken("manifest", self.name, "a manifest of torchprune", error))
            return None
        try:
            check = check_files(self.home, files_of(self.home, manifest))
        except CheckpointError as error:
            check = broken("files", self.name, "the files of a checkpoint", error)
        self.checks.append(check)
        return None if check.state == "broken" else manifest

    def _tensors(self, manifest: Manifest) -> bool:
        """Whether all tensors could be read."""
        self._begin("checksums")
        seals = Seals(manifest)
        seals.files(self.home)
        laws = TensorLaws(seals)
        dense = Breaches()
        stored = (0, 0)
        try:
            with both_ways(self.home, manifest, converter_of(self.home, manifest)) as (
                sealed,
                file,
            ):

                def each() -> Iterator[tuple[str, Decoded, bool]]:
                    for key, entry in manifest.tensors.items():
                        if entry.to is None:
                            read = laws.read(key, entry, sealed, file)
                            if read is not None and entry.record is not None:
                                yield key, read, not keeps_values(entry.record, manifest.runs)

                stored = check_reversal(each(), dense)
        except CheckpointError as error:
            laws.manifest.add(self.name, "the tensors that the manifest names", error)
        self.layers = sum(entry.record is not None for entry in manifest.tensors.values())
        self.weights = laws.weights
        self.checks += [seals.result(), *laws.results()]
        if laws.manifest.count:
            self.checks.append(
                laws.manifest.judge("manifest", "the tensors that the manifest names")
            )
        if dense.count or stored[0]:
            said = "stored dense values are finite"
            self.checks.append(dense.judge("reversal", said, layers=stored[0], weights=stored[1]))
        else:
            self.checks.append(unchecked("reversal", "no dense values are stored"))
        return not (laws.manifest.count or (laws.support.count and self._unreadable(laws)))

    def _unreadable(self, laws: TensorLaws) -> bool:
        """Whether a breach of support is one beyond which nothing can be loaded."""
        return any("bits and values" in breach.expected for breach in laws.support.kept)

    def _model(self, manifest: Manifest) -> nn.Module | None:
        self._begin("manifest")
        model = loaded(
            self.home, manifest, self._dense_model() if manifest.config is None else None
        )
        tensors = len(manifest.tensors)
        said = "tensors, header and class agree: none missing, none more, dtypes and shapes"
        if model is None:
            said = f"tensors and header agree; {UNBUILT}"
        self.checks.append(Breaches().judge("manifest", said, tensors=tensors))
        return model

    # -- layers ------------------------------------------------------------------------------------

    def _by_file(self, manifest: Manifest) -> None:
        with both_ways(self.home, manifest, converter_of(self.home, manifest)) as (_, file):
            self._laws_of_layers(of_file(file, manifest), manifest)
        for law in ("dense", "round trip", "fold", "shrink", "reload", "onnx", "lower"):
            self._begin(law)
            self.checks.append(unchecked(law, UNBUILT))

    def _by_model(self, model: nn.Module, manifest: Manifest) -> None:
        self._laws_of_layers(of_model(model), manifest)
        if not self._begin("dense"):
            return
        dense = self._dense_model()
        if dense is None:
            self.checks.append(unchecked("dense", "no dense model was given"))
            return
        others = {
            key: slot.tensor.detach()
            for key, slot in slots_of(model).items()
            if slot.kind == "parameter" and slot.mask is None
        }
        resized = manifest.resized is not None
        self.checks.append(
            check_dense(dense, of_model(model), others, manifest.runs, resized=resized)
        )
        self.dense = None  # its memory may go

    def _laws_of_layers(self, layers: Iterator[StoredLayer], manifest: Manifest) -> None:
        self._begin("count")
        counts, grid = CountLaws(manifest.runs), GridLaw(manifest.runs)
        for layer in layers:
            counts.see(layer)
            grid.see(layer)
        self.checks += counts.results()
        self._begin("pattern")
        self._begin("quantized")
        self.checks.append(grid.result())

    # -- what is computed --------------------------------------------------------------------------

    def _computed(self, model: nn.Module, manifest: Manifest) -> None:
        if self._begin("round trip"):
            with self._law("round trip"):
                convert = converter_of(self.home, manifest)
                self.checks.append(check_round_trip(model, self.home, manifest, convert))
        if self._begin("reversal"):
            with self._law("reversal"):
                self._reversal(manifest)
        if not self.laws & {"fold", "shrink", "reload", "onnx", "lower"}:
            return
        inputs = seeded_inputs(model)
        pruned = {layer.key: None for layer, _ in masked_layers(model)}
        outputs: list[Tensor] = []
        self._begin("fold")
        resized = manifest.resized is not None
        with self._law("shrink" if resized else "fold"):
            check, outputs = check_fold(model, inputs)
            self.checks.append(check)
        if self._begin("shrink"):
            with self._law("shrink"):
                self.checks.append(check_sizes(model, resized))
        plain = self.home if manifest.beside else None
        self._elsewhere(model, inputs, outputs, plain=plain, pruned=pruned)

    def _reversal(self, manifest: Manifest) -> None:
        masked = [e for e in manifest.tensors.values() if e.encoding == "masked"]
        if not masked or not all(e.dense or (e.hidden and e.reversible) for e in masked):
            return
        again = loaded(self.home, manifest, self._dense_model())
        if again is None:
            return
        found = Breaches()
        layers = check_densify(again, found)
        said = "densify of what is stored gives the dense values back, bit for bit"
        self.checks.append(found.judge("reversal", said, layers=layers))
