"""What the policy before the first step gave each document: computed once, kept in the run folder and in the cache.

It is computed by the model as the method has attached it, before any step: with the adapter switched off, a base
whose weights the start has moved (PiSSA) would be another model. A resumed run reads what is in its folder, as its
policy has moved; another job with the same start, data and template finds it in the cache.
"""

import hashlib
import os
import uuid
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from runfolder.digests import folder_digest, frozen_digests
from runfolder.files import sync_folder
from runfolder.folders import cache
from trainer.data.examples import Examples, GlobalBatch, Indices
from trainer.data.tokens import Tokens
from trainer.run import Run
from trainer.step import micro_batches

_FORMAT = 1
_PACKAGES = ("torch", "transformers", "peft")
Floats = npt.NDArray[np.float64]


class ReferenceLost(RuntimeError):
    """What the policy before the first step gave is in neither place, and the policy has moved since."""


def know_reference(run: Run, examples: Examples, wanted: Indices) -> None:
    """Have `tokens.reference` for the documents of some examples; every rank calls it, nobody where it is not needed.

    Raises ReferenceLost, and Stopped where there is no time left.
    """
    if not run.objective.needs_reference:
        return
    tokens = examples.tokens
    record = ReferenceRecord(run, tokens) if run.world.leads else None
    known = [record.read() if record else None]
    dist.broadcast_object_list(known, device=run.world.device)
    reference = known[0]
    assert reference is not None
    tokens.reference = reference
    missing = _missing(examples, wanted, reference)
    if len(missing):
        if run.attempt.start:
            folder = run.attempt.run_dir / "reference"
            raise ReferenceLost(
                f"what the policy before the first step gave is neither in {folder} nor in the cache, and it has "
                "moved since: submit the job anew"
            )
        found = _computed(run, examples, missing)
        tokens.reference = np.where(np.isnan(found), reference, found)
    if record:
        record.write(tokens.reference)
        documents = int(np.isfinite(tokens.reference).sum())
        run.attempt.event("reference", documents=documents, computed_examples=len(missing))


def _missing(examples: Examples, wanted: Indices, reference: Floats) -> Indices:
    """Which of the wanted examples have a document without a reference."""
    missing = []
    for example in np.unique(wanted).tolist():
        documents = examples.documents(example)
        of_example = reference[documents.start : documents.stop]
        if np.isnan(of_example).any():
            missing.append(example)
    return np.array(missing, np.int64)


def _computed(run: Run, examples: Examples, missing: Indices) -> Floats:
    """What the model gives the documents of some examples now [documents]; NaN for all others."""
    model = run.model
    device = run.world.device
    documents = len(examples.tokens)
    sums_D = torch.zeros(documents, dtype=torch.float64, device=device)
    counts_D = torch.zeros_like(sums_D)
    model.eval()
    with torch.no_grad():
        for batch in _in_batches(examples, missing, run.job.train.batch_tokens):
            run.attempt.note_progress()
            run.stops.leave_if_warned(run.stops.first)
            for micro_batch in micro_batches(run, batch):
                found = run.objective.log_likelihoods(model, micro_batch)
                numbers = found["document"]
                is_document = numbers >= 0
                numbers = numbers[is_document]
                sums_D[numbers] = found["log_likelihood"][is_document]
                counts_D[numbers] = 1
    model.train()
    dist.all_reduce(sums_D)
    dist.all_reduce(counts_D)
    unknown_D = counts_D == 0
    sums_D[unknown_D] = torch.nan
    computed: Floats = sums_D.cpu().numpy()
    return computed


def _in_batches(examples: Examples, chosen: Indices, batch_tokens: int) -> Iterator[GlobalBatch]:
    """Some examples in batches of about so many tokens."""
    lengths = examples.lengths[chosen]
    before = np.cumsum(lengths) - lengths
    number_of_each = before // batch_tokens
    for number in np.unique(number_of_each):
        of_batch = chosen[number_of_each == number]
        yield GlobalBatch(examples, of_batch)


class ReferenceRecord:
    """The files of a reference: in the run folder and in the cache, under the digest of all that it depends on."""

    def __init__(self, run: Run, tokens: Tokens) -> None:
        name = f"{_key(run, tokens)}.safetensors"
        self._documents = len(tokens)
        self._paths = (run.attempt.run_dir / "reference" / name, cache() / "references" / name)

    def read(self) -> Floats:
        """What is known of each document [documents]; NaN where nothing is."""
        known = np.full(self._documents, np.nan)
        for path in self._paths:
            found = _read_reference(path)
            if found is not None and len(found) == self._documents:
                known = np.where(np.isnan(known), found, known)
        return known

    def write(self, reference: Floats) -> None:
        """Write what is known to both places, where less is there."""
        for path in self._paths:
            found = _read_reference(path)
            if found is None or not np.array_equal(found, reference, equal_nan=True):
                _write_reference(path, reference)


def _key(run: Run, tokens: Tokens) -> str:
    """A digest of all that the reference depends on: base, start, tokens, and how they are computed."""
    job = run.job
    base = Path(job.base.model)
    scratch = job.base.init == "scratch"
    base_digest = frozen_digests(run.attempt.run_dir).get("base")
    if base.is_dir():
        base_digest = base_digest or folder_digest(base, scratch)
    commit = getattr(run.model.config, "_commit_hash", None)
    versions = [version(name) for name in _PACKAGES]
    start = (
        job.base.model_dump(mode="json"),
        base_digest,
        commit,
        job.method.model_dump(mode="json"),
        job.train.seed,
    )
    device = run.world.device
    computing = (str(run.dtype), device.type, run.objective.kernels.names, versions)
    facts = (_FORMAT, start, tokens.digest(), computing)
    digest = hashlib.sha256(repr(facts).encode())
    return digest.hexdigest()[:32]


def _read_reference(path: Path) -> Floats | None:
    """A reference that was written whole; None where it is missing or damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            reference: Floats = file.get_tensor("reference")
            written: Any = file.metadata()
    except (OSError, SafetensorError):
        return None
    if _sha256(reference) != written["sha256"]:
        return None
    return reference


def _write_reference(path: Path, reference: Floats) -> None:
    """Write a reference with the digest of its content, whole or not at all."""
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    save_file({"reference": reference}, draft, metadata={"sha256": _sha256(reference)})
    with draft.open("rb") as stream:
        os.fsync(stream.fileno())
    draft.replace(path)
    sync_folder(folder)


def _sha256(reference: Floats) -> str:
    content = hashlib.sha256(reference.tobytes())
    return content.hexdigest()
