"""The log-probs of a frozen reference: asked batch by batch, or once before training and kept on disk.

With full weights the second is the only way: what training starts from is the reference, and the first step changes it.
Log-probs of a token depend on the tokens before it and on the model alone. So that is what they are found by: not by a
loss and its settings, the learning rate, the order of the data or a folder's name.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import safetensors
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

import burnish
from burnish.data.cache import default_folder
from burnish.data.comparing import ComparisonStream
from burnish.data.comparisons import Comparisons
from burnish.data.tokenizer import read_json
from burnish.engine.mesh import Mesh
from burnish.engine.roles import Role
from burnish.engine.room import Room
from burnish.engine.start import Start
from burnish.model.checkpoint import base_fingerprint
from burnish.settings import ModelSettings, RunSettings
from burnish.types import PreferenceBatch
from burnish.types import Sequence as TokenSequence

NAME_BYTES = 16

Refer = Callable[[PreferenceBatch], PreferenceBatch]
"""Takes a batch of the host to the device, with what the reference makes of it."""
Known = Mapping[bytes, NDArray[numpy.float32]]
"""The log-probs of the scored tokens of sequences, by name: see `contents`."""


def no_reference(mesh: Mesh) -> Refer:
    """For losses that ask none."""
    return lambda batch: batch.to(mesh.device)


def asked(role: Role, mesh: Mesh, room: Room | None = None) -> Refer:
    """The reference is asked about each batch as it comes, in parts where memory does not suffice: see `room`."""
    own_room = room or Room()

    @torch.no_grad()
    def refer(batch: PreferenceBatch) -> PreferenceBatch:
        batch = batch.to(mesh.device)
        parts = [(part, found) for part, found in own_room.each([batch], role.log_probs)]
        if len(parts) == 1:
            return replace(batch, reference_log_probs=parts[0][1])
        # Parts have copies of prompts, but what is scored stands in each in the order of the whole.
        found_K = torch.cat([found[part.scored] for part, found in parts])
        zeros_T = found_K.new_zeros(batch.tokens.shape)
        return replace(batch, reference_log_probs=zeros_T.index_copy(0, batch.scored, found_K))

    return refer


def looked_up(known: Known, mesh: Mesh) -> Refer:
    """What the reference said before training, found again by the content of each sequence."""

    def refer(batch: PreferenceBatch) -> PreferenceBatch:
        found = numpy.zeros(len(batch.tokens), numpy.float32)
        for name, scored in contents(batch):
            found[scored] = known[name]
        return replace(batch, reference_log_probs=torch.from_numpy(found)).to(mesh.device)

    return refer


@torch.no_grad()
def ask_about_all(
    role: Role,
    streams: Sequence[ComparisonStream],
    mesh: Mesh,
    progress: Callable[[int, int], None] | None = None,
    room: Room | None = None,
) -> Known:
    """What the reference says of every sequence that one pass over each stream brings; the ranks share the work."""
    known: dict[bytes, NDArray[numpy.float32]] = {}
    room = room or Room()

    def ask(batch: PreferenceBatch) -> NDArray[numpy.float32]:
        return role.log_probs(batch.to(mesh.device)).cpu().numpy()

    steps = [(stream, step) for stream in streams for step in range(stream.steps_in(1))]
    for done, (stream, step) in enumerate(steps, 1):
        own: dict[bytes, NDArray[numpy.float32]] = {}
        for batch, log_probs in room.each(stream.step(step), ask):
            own |= {name: log_probs[scored] for name, scored in contents(batch)}
        for part in mesh.collect(own):
            known |= part
        if progress is not None:
            progress(done, len(steps))
    return known


def remembered(
    data: Iterable[Comparisons],
    about: Mapping[str, Any],
    ask: Callable[[], Known],
    mesh: Mesh,
    folder: Path | None = None,
) -> Known:
    """The log-probs of all sequences of the data: from disk where they are there, else asked for and kept there.

    `about` names the model that is asked. A file that is damaged is as good as none.
    """
    names = sorted({_name_of(sequence) for part in data for sequence in part.sequences})
    key = hashlib.sha256(json.dumps({**about, "burnish": burnish.__version__}, sort_keys=True).encode())
    key.update(b"".join(names))
    path = (folder or default_folder().with_name("reference")) / f"{key.hexdigest()[:32]}.safetensors"
    known = _load(path, names)
    if mesh.any(known is None) or known is None:
        known = ask()
        assert known.keys() >= set(names)
        if mesh.is_main:
            _store(path, names, known)
    return known


def about_model(
    start: Start, model: ModelSettings, run: RunSettings, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """What decides the log-probs of the model that training starts from: weights, how they are kept, arithmetic."""
    parts: dict[str, Any] = {"storage": model.storage, "dtype": str(dtype), "device": device.type}
    if run.fp8:
        parts["fp8"] = True
    if model.storage == "nf4":
        parts["double_quant"] = model.double_quant
    if model.init == "random":
        parts["base"] = hashlib.sha256((start.base / "config.json").read_bytes()).hexdigest() + f" {run.seed}"
    else:
        parts["base"] = base_fingerprint(start.base)
    if start.adapter is not None:
        shape = read_json(start.adapter / "adapter_config.json")
        parts["shape"] = {
            key: value for key, value in shape.items() if key not in ("base_model_name_or_path", "revision")
        }
        parts["adapter"] = hashlib.sha256((start.adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    return parts


def contents(batch: PreferenceBatch) -> list[tuple[bytes, NDArray[numpy.int64]]]:
    """Each sequence of a host's batch: its name, and its scored positions in the batch."""
    tokens, scored = batch.tokens.numpy(), batch.weights.numpy() != 0
    found: list[tuple[bytes, NDArray[numpy.int64]]] = []
    prefixes = batch.prefixes or ((0, 0),) * batch.num_sequences
    for (begin, length), (start, end) in zip(prefixes, pairwise(batch.starts.tolist()), strict=True):
        ids = numpy.concatenate([tokens[begin : begin + length], tokens[start:end]])
        of_prefix = numpy.zeros(length, numpy.bool_)
        name = _name(ids, numpy.concatenate([of_prefix, scored[start:end]]))
        found.append((name, start + numpy.flatnonzero(scored[start:end])))
    return found


def _name_of(sequence: TokenSequence) -> bytes:
    weights = numpy.asarray([*sequence.weights[1:], 0.0])  # of the token that follows, as in a batch
    return _name(numpy.asarray(sequence.ids, numpy.int64), weights != 0)


def _name(ids: NDArray[numpy.int64], scored: NDArray[numpy.bool_]) -> bytes:
    """Its tokens, and at which positions the next one is scored."""
    return hashlib.blake2b(ids.tobytes() + scored.tobytes(), digest_size=NAME_BYTES).digest()


def _load(path: Path, names: Sequence[bytes]) -> Known | None:
    try:
        arrays = load_file(path)
        ends, log_probs, seal = arrays["ends"], arrays["log_probs"], arrays["seal"].tobytes()
    except (OSError, KeyError, ValueError, safetensors.SafetensorError):
        return None
    if seal != _seal(ends, log_probs) or len(ends) != len(names):
        return None
    return dict(zip(names, numpy.split(log_probs, ends[:-1]), strict=True))


def _seal(ends: NDArray[numpy.int64], log_probs: NDArray[numpy.float32]) -> bytes:
    return hashlib.sha256(ends.tobytes() + log_probs.tobytes()).digest()


def _store(path: Path, names: Sequence[bytes], known: Known) -> None:
    """Write the log-probs in the order of the names, whole or not at all; a run needs no file to go on."""
    values = [known[name] for name in names]
    ends, log_probs = numpy.cumsum([len(value) for value in values]), numpy.concatenate(values)
    seal = numpy.frombuffer(_seal(ends, log_probs), numpy.uint8)
    aside = path.with_name(f".new-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"ends": ends, "log_probs": log_probs, "seal": seal}, aside)
        aside.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        tqdm.write(f"reference log-probs could not be kept in {path.parent} ({error}); the next run asks again")
