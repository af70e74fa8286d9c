"""The proof of a plain checkpoint of transformers: by its exact zeros and the report beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchprune.checkpoint.checked_files import plain_file, read_json
from torchprune.checkpoint.skeleton import CONFIG
from torchprune.errors import CheckpointError
from torchprune.masking.packing import zeros_in
from torchprune.masking.plain_state import slots_of
from torchprune.study.proofs.artifact import NOTE, PlainArtifact, key_of, read_artifact
from torchprune.study.proofs.dense_beside import check_dense
from torchprune.study.proofs.detected import detected
from torchprune.study.proofs.proof import Breaches, broken, unchecked
from torchprune.study.proofs.proof_steps import ProofSteps
from torchprune.study.proofs.seeded_inputs import outputs_of, seeded_inputs
from torchprune.study.proofs.stored_counts import CountLaws
from torchprune.study.proofs.stored_files import check_support, finite_or_nan
from torchprune.study.proofs.stored_layers import of_plain

NO_MASKS = "a plain checkpoint has no masks, records or dense values"


class PlainProof(ProofSteps):
    """The checks as they are made; `layers` and `weights` are of recorded layers, or of those with
    zeros."""

    def run(self) -> None:
        """Make all checks."""
        self._begin("files")
        try:
            artifact = read_artifact(self.home)
            read_json(plain_file(self.home, CONFIG))
        except (CheckpointError, OSError) as error:
            self.checks.append(broken("files", self.name, "whole files of a checkpoint", error))
            return
        said = "every file named is a regular one in the directory, whole and readable"
        self.checks.append(Breaches().judge("files", said, files=len(artifact.files) + 1))
        self._begin("checksums")
        self.checks.append(unchecked("checksums", "a plain checkpoint carries none"))
        for law in ("quantized", "round trip", "reversal", "fold", "shrink"):
            self._begin(law)
            self.checks.append(unchecked(law, NO_MASKS))
        self._begin("manifest")
        found = Breaches()
        model: nn.Module | None = None
        try:
            model = artifact.read(found)
        except CheckpointError as error:
            if not found.count:
                found.add(self.name, f"tensors and settings as {CONFIG} says", error)
        said = "the class and its configuration make exactly the tensors in the files"
        self.checks.append(found.judge("manifest", said, tensors=len(artifact.shapes)))
        if model is not None and not found.count:
            self._of_model(model, artifact)

    def _of_model(self, model: nn.Module, artifact: PlainArtifact) -> None:
        keys = slots_of(model)
        records = {str(key_of(n, keys)): r for n, r in artifact.records.items()}
        self._layers(model, artifact, records)
        inputs = seeded_inputs(model)
        outputs: list[Tensor] = []
        with self._law("reload"):
            outputs = outputs_of(model, inputs) if inputs else []
        self._elsewhere(model, inputs, outputs, plain=self.home, pruned=dict.fromkeys(records))

    def _layers(self, model: nn.Module, artifact: PlainArtifact, records: dict[str, Any]) -> None:
        self._begin("support")
        support, tensors, pruned = Breaches(), 0, 0
        for key, slot in slots_of(model).items():
            value = slot.tensor.detach()
            if slot.kind != "parameter" or not value.is_floating_point():
                continue
            tensors += 1
            finite_or_nan(key, value, support, infinite=True)
            if key in records:
                pruned += zeros_in(value)
                check_support(key, value, value != 0, support)
        said = "no NaN or inf in any parameter; zeros of recorded layers +0.0 to the bit"
        self.checks.append(support.judge("support", said, tensors=tensors, zeros=pruned))
        self._begin("count")
        counts = CountLaws([], at_least=True)
        told = {str(key_of(n, slots_of(model))): z for n, z in artifact.zeros.items()}
        for layer in of_plain(model, records):
            counts.see(layer)
            zeros, size = told[layer.key]
            got = layer.keep.numel() - int(torch.count_nonzero(layer.keep))
            if (zeros, size) != (got, layer.keep.numel()):
                here = f"{got:,} of {layer.keep.numel():,}"
                counts.count.add(layer.key, f"{zeros:,} of {size:,} zero, as {NOTE} records", here)
        self._begin("pattern")
        self.layers, self.weights = counts.seen, counts.weights
        if records:
            self.checks += counts.results()
        else:
            found = detected(model)
            self.layers, self.weights = found.layers, found.weights
            self.checks += [unchecked("count", found.said), unchecked("pattern", found.said)]
        if self._begin("dense"):
            with self._law("dense"):
                self._dense(model, records)

    def _dense(self, model: nn.Module, records: dict[str, Any]) -> None:
        if self.dense is None:
            self.checks.append(unchecked("dense", "no dense model was given"))
            return
        if not records:
            why = "nothing records whether kept weights were changed"
            self.checks.append(unchecked("dense", why))
            return
        dense = self._dense_model()
        assert dense is not None
        self.dense = None  # its memory may go
        others = {
            key: slot.tensor.detach()
            for key, slot in slots_of(model).items()
            if slot.kind == "parameter" and key not in records
        }
        layers = of_plain(model, records)
        self.checks.append(check_dense(dense, layers, others, [], resized=False))
