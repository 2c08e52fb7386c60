"""What will be done for each leaf of a model: a value that can be shown, drawn with a key, and checked afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding

from varscale import _compat
from varscale.initialization import laws, placement, tiles
from varscale.initialization.account import Account, Entry, is_rng_key
from varscale.initialization.chains import Chain, law_words
from varscale.initialization.derivation import Derivation
from varscale.initialization.drawing import Drawing, LaidDrawing, Program, compile_all, compiled, filling, settings, spread
from varscale.initialization.given import check_range, given_values
from varscale.initialization.graph import Value, is_key
from varscale.initialization.host_memory import filled
from varscale.initialization.tracing import Trace
from varscale.initializers.initializer import checked_dtype
from varscale.initializers.sampling import checked_key
from varscale.programs.trees import Leaf


@dataclasses.dataclass(frozen=True)
class Task:
    """What is done for one leaf; one of the first five is set.

    Attributes:
        given: the value it was given.
        state: the derived value that it is, such as the key of a random stream.
        number: the number that fills it.
        program: the program that draws it.
        whole: taken from the model's own whole init.
        place: which of the program's leaves it is.
    """

    given: Any = None
    state: Value | None = None
    number: np.ndarray | None = None
    program: Program | None = None
    whole: bool = False
    place: int = 0


@dataclasses.dataclass(frozen=True)
class Outline:
    """A model's initialization, law by law.

    Attributes:
        trace: the traced init.
        tasks: one a leaf.
        dtypes: of the leaves.
        shardings: of the leaves.
        account: the same in words.
        uses_own_hash: whether some leaves are drawn with keys as jax has them.
    """

    trace: Trace
    tasks: tuple[Task, ...]
    dtypes: tuple[np.dtype, ...]
    shardings: tuple[Any, ...]
    account: Account
    uses_own_hash: bool

    def table(self, width: int | None = None) -> str:
        """What will be done, one leaf a line."""
        return self.account.table(width)

    def leaves(self, key: Any, chosen: Sequence[int] | None = None) -> list[Any]:
        """The chosen leaves (all of them by default), drawn with a key (or a mapping from stream to key)."""
        indices = range(len(self.tasks)) if chosen is None else chosen
        derivation, keys = self._derivation(key)
        tiled = {} if derivation.traced else self._tiled(indices, derivation, key)
        if not derivation.traced:
            compile_all(self._programs(indices, tiled))
        together: dict[int, list[Any]] = {}
        if any(self.tasks[i].whole for i in indices):
            together[0] = self._whole(keys)
        finish = tiles.started(list(tiled.values()))  # other threads draw while this one lays out what needs no draw
        constants = {
            i: filled(number, self.trace.leaves[i].shape, self.dtypes[i])
            for i in indices
            if (number := self.tasks[i].number) is not None and self.shardings[i] is None
        }
        found = dict(zip(constants, jax.device_put(list(constants.values())), strict=True))  # at once: the calls cost
        found |= zip(tiled, jax.device_put(finish()), strict=True)
        return [found[i] if i in found else self._leaf(i, key, keys, derivation, together) for i in indices]

    def programs(self, key: Any) -> list[Any]:
        """The programs that draw the leaves, each once."""
        indices = range(len(self.tasks))
        return list(dict.fromkeys(self._programs(indices, self._tiled(indices, self._derivation(key)[0], key))))

    def _programs(self, indices: Sequence[int], tiled: Mapping[int, tiles.Leaf]) -> list[Any]:
        own = [task.program for i in indices if i not in tiled and (task := self.tasks[i]).program is not None]
        return [*own, *(leaf.program for leaf in tiled.values())]

    def _derivation(self, key: Any) -> tuple[Derivation, list[Any]]:
        """The derived values for a key (or a mapping from stream to key), and its keys."""
        keys = list(map(checked_key, jax.tree_util.tree_leaves(key)))
        graphs = [self.trace.graph, *([self.trace.retraced()] if self.uses_own_hash else [])]
        of_data = any(e.how == "data" for e in self.account.entries.values()) and any(map(_compat.is_tracer, self.trace.arrays))
        return Derivation({v: key for graph in graphs for v, key in zip(graph.keys, keys, strict=True)}, traced=of_data), keys

    def _tiled(self, indices: Sequence[int], derivation: Derivation, key: Any) -> dict[int, tiles.Leaf]:
        """The leaves that are drawn tile by tile."""
        chosen = {i: program for i in indices if (program := self.tasks[i].program) is not None}
        arguments = {
            i: lambda i=i, program=program: self._arguments(program, self.trace.leaves[i].path, derivation, key)
            for i, program in chosen.items()
        }
        return tiles.tiled(chosen, arguments)

    def _leaf(self, i: int, key: Any, keys: Sequence[Any], derivation: Derivation, together: dict[int, list[Any]]) -> Any:
        """One leaf; `together` holds what was computed for several."""
        task, leaf, dtype, place = self.tasks[i], self.trace.leaves[i], self.dtypes[i], self.shardings[i]
        if task.given is not None:
            return _laid_out(jnp.asarray(task.given, dtype), place)
        if task.number is not None:
            return spread(task.number, leaf.shape, dtype, place)
        if task.state is not None:
            found = derivation.value(task.state)
            if is_rng_key(leaf.dtype):
                words = jax.random.key_data(found) if derivation.traced else found
                found = self._as_key(words, leaf.dtype)
            return _laid_out(found if is_rng_key(leaf.dtype) else jnp.asarray(found, dtype), place)
        if task.whole:
            return _laid_out(together[0][i].astype(dtype), place)
        program = task.program
        if program is None:
            raise ValueError(f"nothing is to be done for {leaf.path!r}")
        if id(program) not in together:
            arguments = self._arguments(program, leaf.path, derivation, key)
            outs = program(*arguments) if derivation.traced else compiled(program)(*arguments)
            if len(outs) == 1:
                x = self._as_key(outs[0], leaf.dtype) if is_rng_key(leaf.dtype) else outs[0]
                return x if program.shardings == (place,) else _laid_out(x, place)
            together[id(program)] = outs
        found = together[id(program)][task.place]
        return self._as_key(found, leaf.dtype) if is_rng_key(leaf.dtype) else found

    def _as_key(self, words: Any, dtype: Any) -> Any:
        """Raw words as the kind of key that the model itself would hold: no trace of our own implementation."""
        if self.trace.holds_raw_keys:
            return jnp.asarray(words)
        return jax.random.wrap_key_data(jnp.asarray(words), impl=_own_implementation(dtype))

    def _arguments(self, program: Program, path: str, derivation: Derivation, key: Any) -> list[Any]:
        found: list[Any] = []
        if isinstance(program, LaidDrawing):
            found.append(laws.own_words(checked_key(main_key(key)), path, program.law))
        for v in program.arguments:
            is_data = v.kind == "data"
            x = self.trace.arrays[v.position - len(self.trace.graph.keys)] if is_data else derivation.value(v)
            found.append(jax.random.key_data(x) if is_key(v.aval) and (is_data or derivation.traced) else x)
        return found

    def sources(self, key: Any) -> list[bytes | None]:
        """The random words that each leaf is drawn from with a key; None for a leaf that draws nothing.

        Two leaves with the same words hold the same random numbers, whatever their laws make of them.
        """
        derivation, _ = self._derivation(key)

        def words(task: Task, leaf: Leaf) -> bytes | None:
            if task.program is None:
                return None
            found = self._arguments(task.program, leaf.path, derivation, key)
            return b"".join(np.asarray(x).tobytes() for x in found)

        return [words(task, leaf) for task, leaf in zip(self.tasks, self.trace.leaves, strict=True)]

    def _whole(self, keys: Sequence[Any]) -> list[Any]:
        missing = any(x is None for x in self.trace.arrays)
        if missing:
            raise ValueError("x: exact=True runs the model's whole init, and x is a jax.ShapeDtypeStruct: give arrays")
        return jax.jit(self.trace.whole)(list(keys), list(self.trace.arrays))

    def draw(self, key: Any) -> Any:
        """The variables, or the nnx model."""
        return self.trace.rebuild(self.leaves(key))

    def finished(self) -> Account:
        """The account once the programs are compiled: with what each device computes whole, or fetches from others."""
        entries = dict(self.account.entries)
        for task, leaf, place in zip(self.tasks, self.trace.leaves, self.shardings, strict=True):
            if task.program is None or place is None or place.is_fully_replicated:
                continue
            entry, notes = entries[leaf.path], []
            if entry.how == "orthogonal" or task.program.shardings == (None,):
                notes.append("computed whole on every device")
            elif _has_collective(compiled(task.program)):
                notes.append("with a collective")
            entries[leaf.path] = dataclasses.replace(entry, notes=(*entry.notes, *notes))
        return dataclasses.replace(self.account, entries=entries)


def _own_implementation(dtype: Any) -> Any:
    """Of keys of this dtype, the implementation that is not ours."""
    return "threefry2x32" if "varscale" in str(dtype) else _compat.implementation(dtype)


def _laid_out(x: Any, place: Any) -> Any:
    if place is None:
        return x
    if is_rng_key(x.dtype):
        return jax.device_put(x, place)
    if x.is_fully_addressable and place.is_fully_addressable:
        return jax.device_put(x, place)
    local = np.asarray(x)
    return jax.make_array_from_callback(x.shape, place, lambda index: local[index])


def _has_collective(program: Any) -> bool:
    text = program.as_text()
    return any(name in text for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"))


def main_key(key: Any) -> Any:
    """The key that laws laid on leaves are drawn with: of several streams that of the parameters."""
    if not isinstance(key, Mapping):
        return key
    return next((key[name] for name in ("params", "default") if name in key), next(iter(key.values())))


def outline(
    trace: Trace,
    key: Any,
    *,
    scheme: Any = "declared",
    dtype: Any = None,
    out_shardings: Any = None,
    given: Any = None,
    exact: bool = False,
) -> Outline:
    """What will be done for every leaf; see `initialize` for the arguments.

    Args:
        trace: the traced init.
        key: the key (or mapping from stream to key) that it will be drawn with.
        scheme: "declared", or laws laid on leaves.
        dtype: of the parameters.
        out_shardings: where leaves lie.
        given: values for some leaves.
        exact: whether reductions are taken from the model's own whole init.
    """
    planner = _Planner(trace, key, _rounded(dtype), exact)
    places = placement.shardings(out_shardings, trace.leaves, trace.tree)
    values = given_values(given, trace.leaves)
    described = [
        (leaf.path, leaf.shape, leaf.dtype, p and not is_rng_key(leaf.dtype))
        for leaf, p in zip(trace.leaves, trace.parameters, strict=True)
    ]
    by_scheme = (
        [None] * len(described) if isinstance(scheme, str) and scheme == "declared" else laws.laid(scheme, described, "scheme")
    )
    for i, place in enumerate(places):
        planner.plan(i, by_scheme[i], place, values.get(trace.leaves[i].path))
    return planner.outline(tuple(places))


def _rounded(dtype: Any) -> np.dtype | None:
    found = None if dtype is None else jax.dtypes.canonicalize_dtype(checked_dtype(dtype))
    if found is not None and not jnp.issubdtype(found, jnp.floating):
        raise TypeError(f"dtype must be a floating dtype, to round floating parameters to, not {found}")
    return found


def declared(trace: Trace, key: Any, dtype: Any, exact: bool) -> Outline:
    """The outline of the declared laws, where flax's own init puts them; kept with the trace, if no leaf depends on data."""
    told = jax.random.key_impl(checked_key(main_key(key))), settings(), _rounded(dtype), exact
    kept = trace.graph.outlines.get(told)
    if kept is not None:
        return dataclasses.replace(kept, trace=trace)
    found = outline(trace, key, dtype=dtype, exact=exact)
    if not found.account.of(how="data"):
        trace.graph.outlines[told] = dataclasses.replace(found, trace=None)  # pyright: ignore[reportArgumentType]
    return found


class _Planner:
    """Makes the outline, leaf by leaf."""

    def __init__(self, trace: Trace, key: Any, dtype: np.dtype | None, exact: bool):
        self.trace, self.dtype, self.exact = trace, dtype, exact
        self.implementation = jax.random.key_impl(checked_key(main_key(key)))
        self.settings = settings()
        self.uses_own_hash = False
        self.tasks: list[Task] = []
        self.dtypes: list[np.dtype] = []
        self.entries: list[Entry] = []
        self.places: list[Any] = []

    def plan(self, i: int, hit: laws.Laid | None, place: Any, given: Any) -> None:
        leaf, v = self.trace.leaves[i], self.trace.graph.leaves[i]
        dtype = self.final_dtype(i)
        self.dtypes.append(dtype)
        self.places.append(place)
        notes = (f"rounded from {leaf.dtype}",) if dtype != leaf.dtype and not is_rng_key(leaf.dtype) else ()
        if given is not None:
            cast = () if given.dtype == dtype else (f"cast from {given.dtype}",)
            check_range(leaf.path, given, dtype)
            self.add(Task(given=given), leaf, "given", "the value given", "given", cast)
        elif hit is not None:
            self.lay(hit, leaf, v, dtype, place)
        elif v.derived:
            self.add(Task(state=v), leaf, "declared", "state of a random generator", "state", ())
        elif (number := filling(v)) is not None:
            self.add(Task(number=number), leaf, "declared", f"constant {number}", "constant", notes)
        else:
            found = self.chain([i])
            law = law_words(found)
            if self.exact and (found.uneven or found.kind in ("reduction", "data")):
                self.add(Task(whole=True), leaf, "declared", law, found.kind, (*notes, "from the model's own whole init"))
                return
            if found.kind == "data":
                self.check_data(found, leaf)
            rounded = None if dtype == leaf.dtype or is_rng_key(leaf.dtype) else dtype
            # The loop over a part rounds otherwise. On explicit axes the part is what the jitted init computes too.
            splits = isinstance(place, NamedSharding) and AxisType.Explicit not in place.mesh.axis_types
            drawing = Drawing(found, (rounded,), (None if found.uneven and splits else place,), self.settings)
            if found.kind == "elementwise" and found.uneven and found.needs_own_hash:
                notes = (*notes, "the last place may be another than in the whole init")
            self.add(Task(program=drawing), leaf, "declared", law, found.kind, notes)

    def chain(self, leaves: Sequence[int]) -> Chain:
        """The chain of leaves, by the hash that gives the jitted init's bits."""
        found = self.trace.graph.chain(leaves)
        if not found.needs_own_hash:
            return found
        self.uses_own_hash = True
        return self.trace.retraced().chain(leaves)

    def final_dtype(self, i: int) -> np.dtype:
        own = self.trace.leaves[i].dtype
        if is_rng_key(own):
            raw = np.dtype(np.uint32)
            return (
                raw
                if self.trace.holds_raw_keys
                else jax.eval_shape(lambda: jax.random.key(0, impl=_own_implementation(own))).dtype
            )
        rounds = self.dtype is not None and self.trace.parameters[i] and jnp.issubdtype(own, jnp.floating)
        return self.dtype if rounds and self.dtype is not None else np.dtype(own)

    def add(self, task: Task, leaf: Leaf, origin: Any, law: str, how: Any, notes: tuple[str, ...]) -> None:
        self.tasks.append(task)
        self.entries.append(Entry(leaf.path, leaf.shape, self.dtypes[-1], origin, law, how, notes))

    def lay(self, hit: laws.Laid, leaf: Leaf, v: Value, dtype: np.dtype, place: Any) -> None:
        """A law of the scheme in place of the declared one."""
        found = self.chain([self.trace.graph.leaves.index(v)])
        shape = laws.plain_core(leaf.shape) if hit.of_leaf else laws.core(v, found.arguments)
        notes = (f"by {hit.pattern!r}",) if hit.pattern else ()
        keeps = laws.keeps(hit.law)
        if keeps and found.kind == "data":
            raise ValueError(f"scheme: {leaf.path!r} depends on the model's input: none of its parts can be kept")
        laws.check(hit, leaf.path, shape.shape, dtype, self.implementation, "scheme")
        number = laws.number(hit.law)
        if number is not None:
            task = Task(number=number)
        else:
            task = Task(
                program=LaidDrawing(
                    hit.law, laws.name(hit.law), shape, self.implementation, (dtype,), (place,), found if keeps else None,
                    self.settings,
                )
            )  # fmt: skip
        how = "constant" if number is not None else "orthogonal" if laws.decomposes(hit.law) else "elementwise"
        self.add(task, leaf, "scheme", repr(hit.law), how, notes)

    def check_data(self, found: Chain, leaf: Leaf) -> None:
        for v in found.arguments:
            if v.kind == "data" and self.trace.arrays[v.position - len(self.trace.graph.keys)] is None:
                raise ValueError(
                    f"x: the numbers of {leaf.path!r} depend on the model's input, which is a jax.ShapeDtypeStruct: give arrays"
                )

    def outline(self, places: tuple[Any, ...]) -> Outline:
        """All leaves that depend on data in one program, as flax computes them."""
        data = [i for i, e in enumerate(self.entries) if e.how == "data" and self.tasks[i].program is not None]
        if len(data) > 1:
            found = self.chain(data)
            rounded = tuple(None if self.dtypes[i] == self.trace.leaves[i].dtype else self.dtypes[i] for i in data)
            together = Drawing(found, rounded, tuple(places[i] for i in data), self.settings)
            for position, i in enumerate(data):
                self.tasks[i] = Task(program=together, place=position)
        notes = ()
        if self.implementation != "threefry2x32" and "varscale" not in str(self.implementation):
            notes = (
                f"keys of implementation {self.implementation}: bits may depend on the mesh, the number of processes and the "
                "device",
            )
        entries = {entry.path: entry for entry in self.entries}
        return Outline(self.trace, tuple(self.tasks), tuple(self.dtypes), places, Account(entries, notes), self.uses_own_hash)
