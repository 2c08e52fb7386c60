"""A model larger than memory: its leaves drawn batch by batch, straight into an Orbax checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from varscale.initialization import orbax_sessions
from varscale.initialization.account import Account, is_rng_key
from varscale.initialization.journal import Journal, Progress
from varscale.initialization.laws import applied
from varscale.initialization.outline import Outline, outline
from varscale.initialization.tracing import trace
from varscale.initializers.sampling import checked_key
from varscale.programs.trees import is_box


def initialize_to_checkpoint(
    path: str | os.PathLike[str],
    model: Any,
    key: Any,
    x: Any = None,
    *,
    memory_limit: int,
    scheme: Any = "declared",
    dtype: Any = None,
    method: str | None = None,
) -> Account:
    """Draw a model's variables into an Orbax checkpoint, holding no more of them at a time than `memory_limit`.

    The checkpoint holds the bits of `initialize`. It opens with Orbax (`experimental.v1.load(path)`; the stable API at
    `<path>/state`) and with `vs.transfer.load(path)`; random keys are stored as their raw words. Killed at any moment, the same
    call resumes: a journal beside the checkpoint says which leaves are on the disk. A session that is damaged, or that was
    being finalized, is thrown away and drawn anew. Before this returns, every leaf is read back and compared with what was
    drawn.

    Args:
        path: the checkpoint, a folder that does not exist yet.
        model: as in `initialize`.
        key: as in `initialize`.
        x: as in `initialize`.
        memory_limit: bytes of leaves that are held at a time; at least the largest leaf.
        scheme: as in `initialize`.
        dtype: as in `initialize`.
        method: as in `initialize`.

    Returns:
        The account of every leaf.

    Raises:
        TypeError, ValueError: as `initialize`; memory_limit is no positive integer or less than a leaf; a leaf has size 0,
            which Orbax does not store; the model has no variables.
        FileExistsError: a checkpoint stands at path, or the unfinished one of another model, key or law.
        OSError: the disk gives back something else than was written, twice.
        RuntimeError: jax runs on several processes.
    """
    if isinstance(memory_limit, bool) or not isinstance(memory_limit, int | np.integer) or memory_limit <= 0:
        raise ValueError(f"memory_limit must be a positive number of bytes, not {memory_limit!r}")
    if jax.process_count() > 1:
        raise RuntimeError("initialize_to_checkpoint writes from one process, and jax runs on several")
    scheme = applied(scheme, model, x, method=method)
    plan = outline(trace(model, key, x, method), key, scheme=scheme, dtype=dtype)
    writer = _Writer(Path(path), plan, key, int(memory_limit))
    writer.check()
    for _ in range(2):
        if writer.write() and writer.verify():
            writer.journal.end()
            return plan.account
        orbax_sessions.discard(writer.path)
        writer.journal.end()
    raise OSError(f"{str(path)!r}: the disk gives back other numbers than were written")


@dataclasses.dataclass
class _Writer:
    """Writes one checkpoint."""

    path: Path
    plan: Outline
    key: Any
    limit: int

    def __post_init__(self) -> None:
        self.journal = Journal(self.path)
        self.routes = _routes(self.plan.trace.tree)
        self.shapes = [_stored(leaf.shape, dtype) for leaf, dtype in zip(self.plan.trace.leaves, self.plan.dtypes, strict=True)]
        self.paths = [leaf.path for leaf in self.plan.trace.leaves]

    def check(self) -> None:
        """Raises ValueError for what cannot be stored, FileExistsError for what is in the way."""
        if not self.paths:
            raise ValueError("model: it has no variables, and Orbax stores no empty trees")
        for path, shape in zip(self.paths, self.shapes, strict=True):
            if not math.prod(shape.shape):
                raise ValueError(f"model: {path!r} has shape {shape.shape}, and Orbax stores no arrays of size 0")
            if _bytes(shape) > self.limit:
                raise ValueError(
                    f"memory_limit is {self.limit} bytes, and {path!r} of shape {shape.shape} and dtype {shape.dtype} takes "
                    f"{_bytes(shape)}: give at least that"
                )
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"path is {str(self.path)!r}: there is no folder {str(self.path.parent)!r}")
        progress = self.journal.read()
        if progress is None:
            for taken in (self.path, orbax_sessions.session(self.path)):
                if taken.exists():
                    raise FileExistsError(
                        f"{str(taken)!r} exists, and no journal says that it is unfinished: it is a finished checkpoint, or "
                        "something else; give another path, or remove it"
                    )
        elif progress.plan not in ("", self.fingerprint):
            raise FileExistsError(
                f"{str(self.journal.file)!r} tells of an unfinished checkpoint of another model, key or law: remove it, "
                f"{str(orbax_sessions.session(self.path))!r} and {str(self.path)!r} to start anew"
            )

    @property
    def fingerprint(self) -> str:
        """Of what is drawn: model, laws and key."""
        words = [np.asarray(jax.random.key_data(checked_key(k))).tolist() for k in jax.tree_util.tree_leaves(self.key)]
        kinds = [str(jax.random.key_impl(checked_key(k))) for k in jax.tree_util.tree_leaves(self.key)]
        entries = [(e.path, e.shape, str(e.dtype), e.law, e.how) for e in self.plan.account.entries.values()]
        return hashlib.sha256(json.dumps([words, kinds, entries]).encode()).hexdigest()

    def write(self) -> bool:
        """Draw what is not on the disk yet, and finalize; whether Orbax could go on with what it found."""
        progress = self.resumed()
        try:
            if not progress.finalizing:
                self.go_on(progress)
        except Exception as error:  # what Orbax raises where a session is damaged is of no common class
            full = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
            if not progress.digests or full:
                raise
            return False
        return True

    def go_on(self, progress: Progress) -> None:
        """Draw the leaves that are missing, and finalize."""
        missing = [i for i, path in enumerate(self.paths) if path not in progress.digests]
        for batch in self.batches(missing):
            leaves = [self.words(x) for x in self.plan.leaves(self.key, batch)]
            orbax_sessions.save(self.path, {self.routes[i]: x for i, x in zip(batch, leaves, strict=True)})
            digests = {self.paths[i]: _digest(x) for i, x in zip(batch, leaves, strict=True)}
            self.journal.wrote(digests, orbax_sessions.parts(self.path))
            del leaves
        self.journal.finalizing()
        orbax_sessions.finalize(self.path)

    def resumed(self) -> Progress:
        """What can be kept of an earlier call; all else is thrown away."""
        progress = self.journal.read()
        if progress is not None and progress.plan:
            if progress.finalizing and self.path.is_dir() and not orbax_sessions.session(self.path).exists():
                return progress  # killed after the last step of all; to be verified
            if not progress.finalizing and not self.path.exists() and orbax_sessions.keep_parts(self.path, progress.parts):
                return progress
        orbax_sessions.discard(self.path)
        self.journal.begin(self.fingerprint)
        return Progress(self.fingerprint)

    def verify(self) -> bool:
        """Read every leaf back, within the limit, and compare it with what was drawn."""
        progress = self.journal.read()
        if progress is None or progress.digests.keys() != set(self.paths):
            return False
        for batch in self.batches(range(len(self.paths))):
            chosen = set(batch)
            others = [route for i, route in enumerate(self.routes) if i not in chosen]
            try:
                found = orbax_sessions.read(self.path, {self.routes[i]: self.shapes[i] for i in batch}, others)
            except Exception:  # Orbax and TensorStore have no common class of errors, and any of them means this
                return False
            if any(_digest(x) != progress.digests[self.paths[i]] for i, x in zip(batch, found, strict=True)):
                return False
        return True

    def batches(self, leaves: Sequence[int]) -> Iterator[list[int]]:
        """The leaves in order, as many at a time as the limit allows."""
        batch: list[int] = []
        held = 0
        for i in leaves:
            size = _bytes(self.shapes[i])
            if batch and held + size > self.limit:
                yield batch
                batch, held = [], 0
            batch.append(i)
            held += size
        if batch:
            yield batch

    def words(self, leaf: Any) -> Any:
        return jax.random.key_data(leaf) if is_rng_key(leaf.dtype) else leaf


def _routes(tree: Any) -> list[tuple[str, ...]]:
    """The keys that lead to each leaf, as text; flax's boxes are no part of them."""
    found: list[tuple[str, ...]] = []
    for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)[0]:
        route = tuple(jax.tree_util.keystr((k,), simple=True) for k in keys) or ("value",)
        inside = jax.tree_util.tree_flatten_with_path(node)[0] if is_box(node) else [((), node)]
        several = len(inside) > 1
        found += [(*route, *(jax.tree_util.keystr((k,), simple=True) for k in more if several)) for more, _ in inside]
    return found


def _stored(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a leaf in the checkpoint: of random keys, those of their words."""
    abstract = jax.ShapeDtypeStruct(shape, dtype)
    return jax.eval_shape(jax.random.key_data, abstract) if is_rng_key(dtype) else abstract


def _bytes(shape: jax.ShapeDtypeStruct) -> int:
    return math.prod(shape.shape) * np.dtype(shape.dtype).itemsize


def _digest(x: Any) -> str:
    array = np.ascontiguousarray(np.asarray(x))
    head = f"{array.dtype.name}{array.shape}".encode()
    total = hashlib.sha256(head)
    total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()
