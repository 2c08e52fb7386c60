"""Move pretrained weights into a model's parameters, and say what became of every leaf."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import jax.numpy as jnp
import numpy as np

from varscale.programs.patterns import Pattern, first_match, idle, matches, text
from varscale.programs.trees import Leaf, Tree, is_abstract, is_collections, like, open_tree, to_numpy
from varscale.transfer.account import Account, Entry, GraftError
from varscale.transfer.layouts import LAYOUTS, Declared, Layout, declared
from varscale.transfer.rearrange import Operation, Piece
from varscale.transfer.rename import Rename, Renaming
from varscale.transfer.resize import Resize
from varscale.transfer.tables import shape_text

P = TypeVar("P")

NOT_A_WEIGHT = "the state of a random generator, not a weight"


def graft(
    params: P,
    pretrained: Any,
    *,
    rename: Rename | None = None,
    layout: str | Layout | Mapping[Pattern, str | Layout] | None = None,
    rearrange: Operation | Sequence[Operation] = (),
    resize: Resize | Mapping[Pattern, Resize] | None = None,
    fresh: Sequence[Pattern] = (),
    missing: Literal["keep", "raise"] = "keep",
    strict: bool = False,
) -> tuple[P, Account]:
    """Move pretrained weights into `params`, by path and shape.

    The checkpoint is first rearranged (packed kernels split, layers stacked), then renamed; then every leaf is laid out as flax
    has it, resized where that is asked for, cast to the model's dtype and put in its place. Nothing is guessed from shapes and
    nothing happens in silence: what does not fit stays at the model's own initialization, and the account says so.

    Args:
      params: the model's parameters: any tree (nested or flat dicts, FrozenDict, linen variables, nnx.State), an nnx.Module, or
        a tree of `jax.ShapeDtypeStruct` that the checkpoint covers. It is not changed.
      pretrained: the weights: any such tree, or a state dict with keys joined by "." or "/", of PyTorch's own tensors too.
      rename: from the checkpoint's paths to the model's: a mapping from pattern to path, of which the first that matches counts
        (None drops the leaf, a tuple copies it to several places); a function of a path; `Renumber`; or a sequence of these,
        applied in order. Leaf names that the layout knows ("weight") need no rule. For globs see `varscale.programs.patterns`.
      layout: the layout of the checkpoint ("pytorch", "keras", ...; see `LAYOUTS`), or a mapping from the checkpoint's paths to
        layouts. By default flax's, and a kernel whose leaf had to be renamed and which would fit transposed too is not moved.
      rearrange: operations on the checkpoint, in order: `Split`, `Join`, `Add`, `Stack`, `Unstack`, `Permute`, `Transpose`,
        `Apply`, or the ready-made ones (`pytorch_attention`, `pytorch_lstm`, `pytorch_gru`, `keras_lstm`).
      resize: what to do where shapes differ: `Window`, `Positions` or `Units`, for all leaves or by pattern over the model's.
      fresh: patterns over the model's paths that stay at their own initialization, such as a new head.
      missing: what happens to the model's leaves that the checkpoint has nothing for: "keep" their values or "raise".
      strict: raise unless everything moved that no rule and no pattern exempts by name.

    Returns:
      The new parameters, of the same kind, structure, dtypes and sharding as `params`, and the account of every leaf.

    Raises:
      GraftError: two leaves of the checkpoint claim one place, or one finds two; a leaf without values (ShapeDtypeStruct) found
        none; or `missing` or `strict` is not satisfied. It has the account.
      TypeError, ValueError: an argument is of no use; the message names it.
    """
    if missing not in ("keep", "raise"):
        raise ValueError(f"missing is {missing!r}; give 'keep' or 'raise'")
    if isinstance(fresh, str):
        raise TypeError(f"fresh is {fresh!r}; give a sequence of patterns")
    model, checkpoint = open_tree(params, "params"), open_tree(pretrained, "pretrained")
    layouts, renaming = declared(layout), Renaming(rename)
    sizes = () if resize is None else tuple(resize.items()) if isinstance(resize, Mapping) else (("**", resize),)
    for argument, patterns in (("fresh", fresh), ("resize", [pattern for pattern, _ in sizes if pattern != "**"])):
        if unused := idle(patterns, model.paths):
            raise ValueError(f"{argument}: {', '.join(map(text, unused))} catches no leaf of params ({_some(model.paths)})")

    ledger = _Ledger(model, checkpoint)
    claims = _claims(ledger, _pieces(checkpoint, rearrange), renaming, layouts, fresh)
    values = [_placed(ledger, leaf, claims.get(leaf.path), layouts, sizes, fresh) for leaf in model.leaves]
    account = ledger.account(renaming.idle)

    empty = [leaf.path for leaf in model.leaves if is_abstract(leaf.value) and leaf.path not in account.moved]
    if empty:
        raise GraftError(
            f"params has no values at {_some(empty)} (ShapeDtypeStruct), and nothing was moved there: initialize them first",
            account,
        )
    unmet = [entry.path for entry in account.kept.values() if not entry.intended]
    if missing == "raise" and unmet:
        raise GraftError(f"missing='raise', and params has {len(unmet)} leaves that nothing was moved to", account)
    if strict and not account.complete:
        raise GraftError(f"strict: not everything moved: {account}", account)
    if not account.moved and model.leaves and checkpoint.leaves:
        warnings.warn(f"graft moved nothing: {account}", stacklevel=2)
    return model.rebuild(values), account


@dataclass(frozen=True)
class _Claim:
    """A piece of the checkpoint that is to stand at one leaf of the model; `renamed` where the leaf's own name was changed."""

    piece: Piece
    renamed: bool


class _Ledger:
    """The account while it is written."""

    def __init__(self, model: Tree, checkpoint: Tree):
        self.model = {leaf.path: leaf for leaf in model.leaves}
        self.checkpoint = {leaf.path: leaf for leaf in checkpoint.leaves}
        self.moved: dict[str, Entry] = {}
        self.kept: dict[str, Entry] = {}
        self.left_over: dict[str, Entry] = {}
        self.mismatched: dict[str, Entry] = {}
        for leaf in checkpoint.leaves:
            if not leaf.is_weight:
                self.leave((leaf.path,), NOT_A_WEIGHT, intended=True)

    def leave(self, sources: tuple[str, ...], why: str, *, intended: bool = False) -> None:
        for source in sources:
            before = self.left_over.get(source)
            whys = why if before is None or before.why == why else f"{before.why}; {why}"
            both = intended and (before is None or before.intended)
            self.left_over[source] = Entry(
                source, self.checkpoint[source].shape, (source,), (self.checkpoint[source].shape,), whys, both
            )

    def enter(self, book: dict[str, Entry], leaf: Leaf, piece: Piece | None, why: str, *, intended: bool = False) -> None:
        sources = () if piece is None else piece.sources
        shapes = tuple(self.checkpoint[source].shape for source in sources)
        book[leaf.path] = Entry(leaf.path, leaf.shape, sources, shapes, why, intended)

    def account(self, unused: tuple[str, ...]) -> Account:
        order = {path: place for place, path in enumerate(self.checkpoint)}
        left_over = dict(sorted(self.left_over.items(), key=lambda item: order[item[0]]))
        return Account(self.moved, self.kept, left_over, self.mismatched, unused)


def _pieces(checkpoint: Tree, rearrange: Operation | Sequence[Operation]) -> list[Piece]:
    pieces = [Piece(leaf.path, to_numpy(leaf.value, leaf.path), (leaf.path,)) for leaf in checkpoint.leaves if leaf.is_weight]
    for operation in (rearrange,) if callable(rearrange) else rearrange:
        pieces = operation(pieces)
    return pieces


def _claims(
    ledger: _Ledger, pieces: Sequence[Piece], renaming: Renaming, layouts: Declared, fresh: Sequence[Pattern]
) -> dict[str, _Claim]:
    """Which piece goes to which leaf of the model.

    Raises:
      GraftError: two pieces go to one leaf, or one piece may go to two.
    """
    index = _index(ledger)
    strip = is_collections(tuple(ledger.checkpoint)) and not is_collections(tuple(ledger.model))
    claims: dict[str, _Claim] = {}
    for piece in pieces:
        leaf = piece.path.rpartition("/")[2]
        layout = layouts.of(piece.path)
        sent = renaming(piece.path)
        if not sent.places:
            ledger.leave(piece.sources, sent.dropped_by, intended=True)
        for place in sent.places:
            targets = _targets(place.partition("/")[2] if strip and place not in index else place, layout, index)
            part = "" if piece.path in piece.sources else f"the part {piece.path}: "
            if place in ledger.model and not ledger.model[place].is_weight:
                ledger.leave(piece.sources, NOT_A_WEIGHT, intended=True)
            elif len(targets) > 1:
                raise GraftError(f"pretrained: {piece.path!r} may go to {' or '.join(targets)}; tell which with rename")
            elif not targets and layout.is_unwanted(leaf):
                ledger.leave(piece.sources, "a counter that flax does not keep", intended=True)
            elif not targets:
                ledger.leave(piece.sources, part + _no_place(place, leaf, ledger))
            elif first_match([(pattern, None) for pattern in fresh], targets[0]):
                ledger.leave(piece.sources, f"{part}{targets[0]} is kept fresh", intended=True)
            elif targets[0] in claims:
                both = " and ".join(sorted({*claims[targets[0]].piece.sources, *piece.sources}))
                raise GraftError(f"pretrained: {both} both go to {targets[0]!r}; drop one of them with rename")
            else:
                claims[targets[0]] = _Claim(piece, leaf != targets[0].rpartition("/")[2])
    return claims


def _index(ledger: _Ledger) -> dict[str, list[str]]:
    """The model's leaves by every name they answer to: their path and, in linen variables, that without the collection."""
    index: dict[str, list[str]] = {}
    names = [path for path, leaf in ledger.model.items() if leaf.is_weight]
    for path in names:
        index.setdefault(path, []).append(path)
    if is_collections(tuple(ledger.model)) and not is_collections(tuple(ledger.checkpoint)):
        for path in names:
            if (bare := path.partition("/")[2]) and bare not in ledger.model:
                index.setdefault(bare, []).append(path)
    return index


def _targets(place: str, layout: Layout, index: Mapping[str, list[str]]) -> list[str]:
    """The leaves that a path may mean: itself, or under the names flax has for what the layout calls its last key."""
    if place in index:
        return index[place]
    stem, _, leaf = place.rpartition("/")
    names = (f"{stem}/{name}" if stem else name for name in layout.candidates(leaf))
    return [target for name in names for target in index.get(name, ())]


def _placed(
    ledger: _Ledger, leaf: Leaf, claim: _Claim | None, layouts: Declared, sizes: Sequence, fresh: Sequence[Pattern]
) -> Any:
    """The leaf's new value, with its entry made in the account."""
    if claim is None:
        is_fresh = any(matches(pattern, leaf.path) for pattern in fresh)
        why = "kept fresh" if is_fresh else "nothing in pretrained for it"
        why = why if leaf.is_weight else NOT_A_WEIGHT
        ledger.enter(ledger.kept, leaf, None, why, intended=is_fresh or not leaf.is_weight)
        return leaf.value
    try:
        value, done = _fitted(leaf, claim, layouts, sizes)
    except ValueError as error:
        ledger.enter(ledger.mismatched, leaf, claim.piece, str(error))
        ledger.enter(ledger.kept, leaf, claim.piece, f"mismatched: {error}")
        return leaf.value
    ledger.enter(ledger.moved, leaf, claim.piece, ", ".join(done))
    return like(value, leaf.value)


def _fitted(leaf: Leaf, claim: _Claim, layouts: Declared, sizes: Sequence) -> tuple[np.ndarray, list[str]]:
    """The piece as the leaf needs it, and what was done to it; ValueError, in words, where it does not fit."""
    piece, target = claim.piece, leaf.path.rpartition("/")[2]
    done, value, layout = list(piece.done), piece.value, layouts.of(piece.path)
    if layouts.explicit:
        value, step = _arranged(piece, layout, target, leaf.shape)
        done += [step] * bool(step)
    elif claim.renamed and target == "kernel" and layout.ambiguous(value.shape[piece.stacked :]):
        raise ValueError("a kernel by another name, and its shape fits transposed too: say with layout how it is laid out")
    _check_kind(value, leaf)
    if value.shape != leaf.shape:
        found = first_match(sizes, leaf.path)
        if found is None:
            raise ValueError(_shapes_differ(piece, value, leaf, layouts))
        done.append(f"{type(found[1]).__name__} from {shape_text(value.shape)}")
        value = np.asarray(found[1](value, leaf.value, leaf.path))
        if value.shape != leaf.shape:
            raise ValueError(f"{found[1]} gives shape {value.shape}, not {leaf.shape}")
    if value.dtype != leaf.dtype:
        done.append(f"cast from {value.dtype} to {leaf.dtype}")
        value = _cast(value, leaf.dtype)
    if bad := _not_finite(value):
        done.append(f"{bad} values are not finite")
    return value, done


def _arranged(piece: Piece, layout: Layout, target: str, shape: tuple[int, ...]) -> tuple[np.ndarray, str]:
    """The piece in flax's layout; stacked layers each for itself."""
    leaf = piece.path.rpartition("/")[2]
    if not piece.stacked:
        return layout.arrange(piece.value, leaf, target, shape)
    lead = piece.value.shape[: piece.stacked]
    flat = piece.value.reshape(-1, *piece.value.shape[piece.stacked :])
    results = [layout.arrange(layer, leaf, target, shape[piece.stacked :]) for layer in flat]
    if not results:
        return piece.value, ""
    stacked = np.stack([value for value, _ in results])
    return stacked.reshape(*lead, *stacked.shape[1:]), results[0][1]


def _check_kind(value: np.ndarray, leaf: Leaf) -> None:
    kinds = [
        next((k for k in (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating) if jnp.issubdtype(d, k)), None)
        for d in (value.dtype, leaf.dtype)
    ]
    if kinds[0] != kinds[1] and not (kinds[0] == jnp.floating and kinds[1] == jnp.complexfloating):
        raise ValueError(f"dtype {value.dtype} does not become {leaf.dtype}")


def _cast(value: np.ndarray, dtype: Any) -> np.ndarray:
    """The values in another precision of the same kind; ValueError where they do not fit it."""
    with np.errstate(over="ignore", invalid="ignore"):
        new = value.astype(dtype)
    if jnp.issubdtype(dtype, jnp.integer) and not np.array_equal(new.astype(value.dtype), value):
        raise ValueError(f"values of dtype {value.dtype} are too large for {dtype}")
    if _not_finite(new) > _not_finite(value):
        raise ValueError(f"finite values of dtype {value.dtype} overflow {dtype}")
    return new


def _not_finite(value: np.ndarray) -> int:
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        return 0
    wide = value if value.dtype.kind in "fc" else value.astype(np.float32)  # numpy cannot ask this of ml_dtypes' smallest
    return int(value.size - np.isfinite(wide).sum())


def _shapes_differ(piece: Piece, value: np.ndarray, leaf: Leaf, layouts: Declared) -> str:
    why = f"shape {value.shape} does not fit {leaf.shape}"
    if not layouts.explicit and value.ndim >= 2:
        name = piece.path.rpartition("/")[2]
        for other in ("pytorch", "keras"):
            if name in LAYOUTS[other].names and name in LAYOUTS[other].kernels | {"depthwise_kernel"}:
                return f"{why}: is layout={other!r} missing?"
        if value.ndim == 2 and value.shape[::-1] == leaf.shape:
            return f"{why}, but its transpose would: is a layout missing?"
    return why


def _no_place(place: str, leaf: str, ledger: _Ledger) -> str:
    import difflib

    if leaf.startswith("in_proj_"):
        return f"no leaf {place!r} in params: packed attention is split by transfer.pytorch_attention()"
    close = difflib.get_close_matches(place, ledger.model, n=1)
    return f"no leaf {place!r} in params" + (f"; the nearest is {close[0]!r}" if close else "")


def _some(paths: Sequence[str]) -> str:
    return (
        ", ".join(map(repr, paths[:4])) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "") if paths else "it has none"
    )
