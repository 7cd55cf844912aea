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
from runfolder.objectives import shares_prompts
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
    world = run.world
    record = None
    known: list[Floats] = []
    if world.leads:
        record = ReferenceRecord(run, tokens)
        known.append(record.read())
    else:
        known.append(np.zeros(0))
    dist.broadcast_object_list(known, device=world.device)
    reference = known[0]
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
        tokens.reference = _completed(reference, found)
    if record:
        record.write(tokens.reference)
        is_known = np.isfinite(tokens.reference)
        documents = int(is_known.sum())
        computed = len(missing)
        run.attempt.event("reference", documents=documents, computed_examples=computed)


def _missing(examples: Examples, wanted: Indices, reference: Floats) -> Indices:
    """Which of the wanted examples have a document without a reference."""
    is_missing_D = np.isnan(reference)
    missing = []
    for example in wanted.tolist():
        documents = examples.documents(example)
        of_example = is_missing_D[documents]
        if of_example.any():
            missing.append(example)
    return np.array(missing, np.int64)


def _computed(run: Run, examples: Examples, missing: Indices) -> Floats:
    """What the model gives the documents of some examples now [documents]; NaN for all others."""
    model = run.model
    stops = run.stops
    settings = run.job.train
    device = run.world.device
    documents = len(examples.tokens)
    sums_D = torch.zeros(documents, dtype=torch.float64, device=device)
    counts_D = torch.zeros_like(sums_D)
    model.eval()
    with torch.no_grad():
        for batch in _in_batches(examples, missing, settings.batch_tokens):
            run.attempt.note_progress()
            stops.leave_if_warned(stops.first)
            for micro_batch in micro_batches(run, batch):
                found = run.objective.log_likelihoods(model, micro_batch)
                with_stand_in = found["document"]
                values = found["log_likelihood"]
                is_document = with_stand_in >= 0
                numbers = with_stand_in[is_document]
                sums_D[numbers] = values[is_document]
                counts_D[numbers] = 1
    model.train()
    dist.all_reduce(sums_D)
    dist.all_reduce(counts_D)
    sums_D /= counts_D  # ranks that share rows each have what all of them found; not a number where nobody has
    on_host = sums_D.cpu()
    computed: Floats = on_host.numpy()
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
        key = _key(run, tokens)
        name = f"{key}.safetensors"
        run_dir = run.attempt.run_dir
        in_run = run_dir / "reference" / name
        in_cache = cache() / "references" / name
        self._paths = (in_run, in_cache)
        self._documents = len(tokens)

    def read(self) -> Floats:
        """What is known of each document [documents]; NaN where nothing is."""
        in_run, in_cache = self._paths
        of_run = self._known(in_run)
        of_cache = self._known(in_cache)
        return _completed(of_run, of_cache)

    def write(self, reference: Floats) -> None:
        """Add what is known to both places; what is there stays, as a later attempt may have learned from it."""
        for path in self._paths:
            found = self._known(path)
            together = _completed(found, reference)
            is_new = not np.array_equal(found, together, equal_nan=True)
            if is_new:
                _write_reference(path, together)

    def _known(self, path: Path) -> Floats:
        """What a file has of each document; NaN where it has nothing, or is missing or damaged."""
        found = _read_reference(path)
        if found is None:
            return np.full(self._documents, np.nan)
        return found


def _completed(known: Floats, other: Floats) -> Floats:
    """What is known, and where that is nothing what another one has."""
    is_unknown = np.isnan(known)
    return np.where(is_unknown, other, known)


def _key(run: Run, tokens: Tokens) -> str:
    """A digest of all that the reference depends on: base, start, tokens, and how they are computed."""
    job = run.job
    base = Path(job.base.model)
    scratch = job.base.init == "scratch"
    frozen = frozen_digests(run.attempt.run_dir)
    base_digest = frozen.get("base")
    if base_digest is None and base.is_dir():
        base_digest = folder_digest(base, scratch)
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
    names = list(run.objective.kernels.names)
    if shares_prompts(job.objective):
        names.append("shared prompts")
    computing = (str(run.dtype), device.type, names, versions)
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
    digest = _sha256(reference)
    if digest != written["sha256"]:
        return None
    return reference


def _write_reference(path: Path, reference: Floats) -> None:
    """Write a reference with the digest of its content, whole or not at all."""
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    unique = uuid.uuid4().hex
    draft = path.with_name(f".{path.name}.{unique}")
    arrays = {"reference": reference}
    digest = _sha256(reference)
    save_file(arrays, draft, metadata={"sha256": digest})
    with draft.open("rb") as stream:
        os.fsync(stream.fileno())
    draft.replace(path)
    sync_folder(folder)


def _sha256(reference: Floats) -> str:
    content = hashlib.sha256(reference.tobytes())
    return content.hexdigest()
