"""Calls of linen modules that do the same are traced once: a deep model's blocks differ in nothing but their parameters.

What a module's `__call__` does follows from its attributes, its arguments, its variables and its keys, as `nn.jit` takes it
to. The first calls of a kind are left alone. Then one is traced by itself, as two pieces: how its variables are drawn, and
what it makes of them; it and every later one calls these. Whatever does not fit that picture is left alone too: modules that
hold or share others, that are called again or in part, inside a lifted transformation, that ask for their name, their path
or their parent, that set attributes, that close over arrays of the trace, or whose attributes or arguments cannot be
compared.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import flax.linen as nn
import jax

from varscale import _compat
from varscale.programs.calls import linen_call
from varscale.programs.content import Unknown, content
from varscale.programs.marks import WITHIN, Marking
from varscale.programs.pieces import Piece, piece, two_pieces
from varscale.programs.questions import NAMES, Questions, reads_path

# What flax and `Questions` keep on a module besides its attributes.
_OWN = {"name", "parent", "_parent_ref", "scope", "_state", "_id", *NAMES}
_PLAIN = 2  # calls of a kind that are left alone: to trace a piece costs that much


class Replays:
    """The calls of one model, in as many passes as there are.

    Attributes:
        tracing: whether a piece is being traced.
    """

    def __init__(self) -> None:
        self.tracing = False
        self._seen: collections.Counter[Hashable] = collections.Counter()
        self._pieces: dict[Hashable, tuple[Sequence[Piece], Marking] | None] = {}
        self._initializing = False
        self._entered: set[tuple[str, ...]] = set()
        self._root: Any = None
        self._questions = Questions()
        self._marking: Marking | None = None

    def start(self, questions: Questions, marking: Marking, *, initializing: bool) -> None:
        """A new pass: one that draws the variables, or one that is given them; its questions and calls are noted."""
        self._questions, self._marking = questions, marking
        self._initializing, self._entered, self._root = initializing, set(), None

    def call(self, module: Any, method: str, args: Any, kwargs: Any, run: Callable[..., Any]) -> Any:
        """What `run(*args, **kwargs)`, a call of a method of a bound module, returns and does to its variables."""
        path = module.scope.path
        self._root = self._root or module.scope.root
        first = path not in self._entered and method == "__call__"
        if method != "setup":
            self._entered.update(path[:i] for i in range(len(path) + 1))
        if first and path and module.scope.root is self._root:
            with contextlib.suppress(Unknown):
                return self._replayed(_Call.of(module, args, kwargs))
        return run(*args, **kwargs)

    def _replayed(self, call: _Call) -> Any:
        """The same from pieces.

        Raises:
            Unknown: there are none.
        """
        module = call.module
        self._seen[call.content] += 1
        variables = {name: dict(held) for name, held in module.variables.items() if held}
        if self._seen[call.content] <= _PLAIN or (variables and self._initializing):
            raise Unknown("call")
        if self._initializing:
            (drawing, running), inside = self._pieces_of(("start", call.content), functools.partial(_starting, call))
            variables = drawing(lambda _: module.make_rng("params"))
        leaves, tree = jax.tree_util.tree_flatten(variables)
        if not all(map(_compat.is_tracer, leaves)):
            raise Unknown("variables")
        if not self._initializing:
            mutable = tuple(module.scope.mutable)
            kind = ("run", call.content, mutable, tree, tuple(map(jax.typeof, leaves)))
            (running,), inside = self._pieces_of(kind, functools.partial(_running, call, tree, mutable, leaves))
        flat = [*leaves, None, *call.arrays]
        output, state = running(lambda i: module.make_rng("params") if i == len(leaves) else flat[i])
        for collection, held in {**(variables if self._initializing else {}), **state}.items():
            for name, value in held.items():
                module.put_variable(collection, name, value)
        if self._marking is not None:
            self._marking.add("/".join(module.scope.path), inside)
        return output

    def _pieces_of(self, kind: Hashable, trace: Callable[[], Sequence[Piece]]) -> tuple[Sequence[Piece], Marking]:
        """The pieces of a kind, traced if they are not there yet, and the calls inside them."""
        if kind not in self._pieces:
            inside = Marking("__call__", {}, WITHIN)
            self.tracing = True
            try:
                with nn.intercept_methods(_recorded(inside, self._questions)):
                    self._pieces[kind] = trace(), inside
            except Exception:  # of any kind: what does not run by itself is left alone, and says itself what is wrong with it
                self._pieces[kind] = None
            finally:
                self.tracing = False
        found = self._pieces[kind]
        if found is None:
            raise Unknown("pieces")
        return found


def _starting(call: _Call) -> tuple[Piece, Piece]:
    """The pieces of a call that initializes: to its variables; from variables, (a key) and arrays to the rest."""
    drawing, running = two_pieces(call.start, _key(), *call.arrays)
    if any(drawing.taken) or drawing.out.num_leaves in running.taken:
        raise Unknown("init")  # which depends on data; or computes with other numbers than it returns
    return drawing, running


def _running(call: _Call, tree: Any, mutable: Sequence[str], variables: Sequence[Any]) -> tuple[Piece]:
    """The piece of a call from variables, a key and arrays."""
    return (piece(functools.partial(call.run, tree, mutable), *variables, _key(), *call.arrays),)


def _key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(jax.random.key, 0)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a bound module's `__call__`.

    Attributes:
        module: the module.
        arrays: the arrays among its arguments, each once.
        places: of each argument, which array it is; None for another value.
        arguments: all arguments, flat.
        tree: their tree.
    """

    module: Any
    arrays: Sequence[Any]
    places: Sequence[int | None]
    arguments: Sequence[Any]
    tree: Any

    @classmethod
    def of(cls, module: Any, args: Any, kwargs: Any) -> _Call:
        arguments, tree = jax.tree_util.tree_flatten((args, kwargs))
        arrays = {id(x): x for x in arguments if _compat.is_tracer(x)}
        order = {address: i for i, address in enumerate(arrays)}
        return cls(module, list(arrays.values()), [order.get(id(x)) for x in arguments], arguments, tree)

    @functools.cached_property
    def content(self) -> Hashable:
        """What the call does, its variables and keys apart."""
        own = {name: x for name, x in vars(self.module).items() if name not in _OWN}
        fields = {field.name for field in dataclasses.fields(self.module)}
        # What `setup` made of the attributes is no news: modules, which may be unlike in what flax keeps on them.
        told = [(name, x) for name, x in own.items() if name in fields or not _all_modules(x)]
        others = tuple(content(x) if i is None else i for i, x in zip(self.places, self.arguments, strict=True))
        found = type(self.module), content(told), self.tree, others, tuple(map(jax.typeof, self.arrays))
        try:
            hash(found)
        except TypeError:
            raise Unknown("arguments") from None
        return found

    def start(self, key: Any, *arrays: Any) -> tuple[dict[str, Any], tuple[Any, dict[str, Any]]]:
        """The call in a pass that initializes: the variables; the output, and no collections that change."""
        args, kwargs = self._joined(arrays)
        output, variables = self._alone().init_with_output({"params": key}, *args, **kwargs)
        return dict(variables), (output, {})

    def run(self, tree: Any, mutable: Sequence[str], *flat: Any) -> tuple[Any, dict[str, Any]]:
        """The call in any other pass: the output; the collections that may change."""
        count = tree.num_leaves
        variables = jax.tree_util.tree_unflatten(tree, flat[:count])
        args, kwargs = self._joined(flat[count + 1 :])
        keys = {"params": flat[count]}
        output, state = self._alone().apply(variables, *args, rngs=keys, mutable=list(mutable), **kwargs)
        return output, dict(state)

    def _alone(self) -> Any:
        return self.module.clone(parent=None, name=_Name())

    def _joined(self, arrays: Sequence[Any]) -> tuple[Any, Any]:
        flat = [x if i is None else arrays[i] for i, x in zip(self.places, self.arguments, strict=True)]
        return jax.tree_util.tree_unflatten(self.tree, flat)


def _all_modules(value: Any) -> bool:
    return all(isinstance(x, nn.Module) for x in jax.tree_util.tree_leaves(value))


def _recorded(marking: Marking, questions: Questions) -> Callable[..., Any]:
    """An interceptor that marks what the methods of a piece's modules return with their paths inside it."""
    entered: list[str] = []

    def unchanged(module: nn.Module, call: Callable[[], Any]) -> Any:
        before = dict(vars(module))
        output = call()
        after = vars(module)
        if before.keys() != after.keys() or any(after[name] is not x for name, x in before.items() if name not in _OWN):
            raise Unknown("attributes")  # which nobody sets when the piece is called
        return output

    def record(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module, name = context.module, context.method_name
        if module.scope is None:
            return next_fun(*args, **kwargs)
        if reads_path(type(module)):
            raise Unknown("path")  # it has another one wherever the piece is called
        questions.listen(module)
        made = linen_call(context)
        call = functools.partial(next_fun, *args, **kwargs)
        if name != "setup":
            call = functools.partial(unchanged, module, call)
        if made.path == "" and name == "__call__" and not entered:  # what it returns is marked where the piece is called
            entered.append(name)
            with marking.running.entered(made), jax.named_scope(WITHIN):
                return call()
        return marking.run(made, call)

    return record


class _Name:
    """The name of a module that stands for others: it can be shown, and to ask what it is is an error."""

    def __str__(self) -> str:
        return "piece"

    def __eq__(self, other: object) -> bool:
        raise Unknown("name")

    def __hash__(self) -> int:
        raise Unknown("name")
