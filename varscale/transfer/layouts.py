"""How frameworks lay kernels out in memory, and what they call them.

Flax keeps a dense kernel as (in, out) and a convolution's as (*window, in, out). Shapes alone cannot tell one layout from
another (a square matrix looks like its transpose), so a layout is declared, never guessed: by name for a whole checkpoint
(`layout="pytorch"`), or by path for parts of one (`layout={"up*": "pytorch_transposed", "**": "pytorch"}`).
"""

import difflib
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from varscale.programs.patterns import Pattern, first_match, text
from varscale.programs.tables import shape_text

# What flax calls a table that is looked up or a vector that scales: nothing of these is ever transposed.
_PLAIN = frozenset({"embedding", "scale", "bias", "mean", "var", "negative_slope"})


@dataclass(frozen=True)
class Layout:
    """How one framework stores parameters.

    The axes of kernels are spelled with I (in), O (out), M (outputs a channel, of a depthwise kernel) and * (the window).

    Attributes:
      name: what to call it in an account.
      names: its names for leaves, each with flax's names for what it may be: "weight" is a kernel, a scale or an embedding, and
        which of them is read off the target.
      kernels: its leaf names of kernels. What goes to a leaf that flax calls "kernel" is one by any name; what is called so
        here and goes to a leaf of a name unknown here is refused.
      dense: axes of a kernel without a window.
      convolution: axes of a kernel with one.
      flip: whether the window is reversed (a transposed convolution that is stored as the convolution it transposes).
      unwanted: names of leaves that flax has no use for.
    """

    name: str
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    kernels: frozenset[str] = frozenset()
    dense: str = "IO"
    convolution: str = "*IO"
    flip: bool = False
    unwanted: frozenset[str] = frozenset()

    def __post_init__(self):
        for argument, spec, axes in (("dense", self.dense, {"IO"}), ("convolution", self.convolution, {"*IO", "*IM"})):
            if "".join(sorted(spec)) not in {"".join(sorted(allowed)) for allowed in axes}:
                raise ValueError(
                    f"Layout: {argument} is {spec!r}; give the letters of {' or '.join(sorted(axes))} in any order"
                )

    def candidates(self, leaf: str) -> tuple[str, ...]:
        """What flax may call the leaf."""
        bare = _bare(leaf)
        return self.names.get(bare, ()) if bare == leaf else (bare, *self.names.get(bare, ()))

    def is_unwanted(self, leaf: str) -> bool:
        return _bare(leaf) in self.unwanted

    def arrange(self, value: np.ndarray, leaf: str, target: str, shape: tuple[int, ...]) -> tuple[np.ndarray, str]:
        """The array in flax's layout, and what was done to it.

        Args:
          value: as the framework stores it.
          leaf: the framework's name of the leaf.
          target: flax's name of it.
          shape: the shape flax expects. It decides nothing but how axes are grouped ((D, heads·d) or (D, heads, d)).

        Raises:
          ValueError: whether it is a kernel cannot be told from the names.
        """
        done = []
        if value.ndim >= 2 and target == "kernel":
            value, step = self._kernel(value)
            done += [step] * bool(step)
        elif value.ndim >= 2 and self._differs(value.ndim) and _bare(leaf) in self.kernels and target not in _PLAIN:
            raise ValueError(
                f"{self.name} stores kernels as {self._axes(value.ndim)}, and whether {target!r} is one cannot be told "
                f"from its name: give this path the layout 'flax', which moves it as it is (after a Transpose, if need be)"
            )
        if value.shape != shape and regroups(value.shape, shape):
            done.append(f"reshaped from {shape_text(value.shape)}")
            value = value.reshape(shape)
        return value, ", ".join(done)

    def ambiguous(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape would have it in another layout too."""
        return len(shape) >= 2 and shape in {
            tuple(shape[axis] for axis in order) for order in _orders(len(shape)) if order != tuple(range(len(shape)))
        }

    def _axes(self, rank: int) -> str:
        return self.dense if rank == 2 else self.convolution

    def _differs(self, rank: int) -> bool:
        return self._axes(rank) != self._flax(rank)

    def _flax(self, rank: int) -> str:
        return "IO" if rank == 2 else "*IM" if "M" in self.convolution else "*IO"

    def _kernel(self, value: np.ndarray) -> tuple[np.ndarray, str]:
        spec, aim = self._axes(value.ndim), self._flax(value.ndim)
        window = value.ndim - 2
        letters = list(spec.replace("*", "0123456789"[:window]))
        wanted = list(aim.replace("*", "0123456789"[:window]))
        done = []
        if letters != wanted:
            value = value.transpose([letters.index(letter) for letter in wanted])
            done.append(f"{spec} to {aim}")
        if self.flip and window:
            value = np.flip(value, axis=tuple(range(window)))
            done.append("window reversed")
        if "M" in aim:
            # A channel's own outputs stand side by side, which is the order of a grouped convolution's.
            value = value.reshape(*value.shape[:-2], 1, value.shape[-2] * value.shape[-1])
            done.append("depthwise to grouped")
        return value, ", ".join(done)


_TORCH = {
    "weight": ("kernel", "scale", "embedding", "negative_slope"),
    "running_mean": ("mean",),
    "running_var": ("var",),
    "gamma": ("scale",),
    "beta": ("bias",),
}
_KERAS = {
    "gamma": ("scale",),
    "beta": ("bias",),
    "moving_mean": ("mean",),
    "moving_variance": ("var",),
    "embeddings": ("embedding",),
    "depthwise_kernel": ("kernel",),
    "pointwise_kernel": ("kernel",),
    "recurrent_kernel": ("kernel",),
    "alpha": ("negative_slope",),
}
_HAIKU = {"w": ("kernel",), "b": ("bias",), "offset": ("bias",), "embeddings": ("embedding",), "average": ("mean", "var")}
_WEIGHT = frozenset({"weight"})
_KERAS_KERNELS = frozenset({"kernel", "pointwise_kernel", "recurrent_kernel"})
_COUNTERS = frozenset({"num_batches_tracked"})

FLAX = Layout("flax")
LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        FLAX,
        # PyTorch, Equinox, MXNet: out×in, OIHW. A ConvTranspose whose flax module has transpose_kernel=True belongs here too.
        Layout("pytorch", _TORCH, _WEIGHT, "OI", "OI*", unwanted=_COUNTERS),
        # nn.ConvTransposeNd into flax's ConvTranspose as it is by default: in×out×window, stored as the convolution it
        # transposes.
        Layout("pytorch_transposed", _TORCH, _WEIGHT, "OI", "IO*", flip=True, unwanted=_COUNTERS),
        # The Conv1D of the GPT-2 family: PyTorch's names, but in×out.
        Layout("conv1d", _TORCH, _WEIGHT, "IO", "*IO", unwanted=_COUNTERS),
        Layout("keras", _KERAS, _KERAS_KERNELS),
        Layout("keras_transposed", _KERAS, _KERAS_KERNELS, "IO", "*OI", flip=True),
        Layout("keras_depthwise", _KERAS, _KERAS_KERNELS | {"depthwise_kernel"}, "IO", "*IM"),
        Layout("haiku", _HAIKU, frozenset({"w"})),
    )
}

# What people call them: layouts that another framework shares.
_OTHER_NAMES = {
    **dict.fromkeys(("torch", "pt", "equinox", "mxnet"), "pytorch"),
    **dict.fromkeys(("tensorflow", "tf"), "keras"),
    **dict.fromkeys(("linen", "nnx", "jax"), "flax"),
}


@dataclass(frozen=True)
class Declared:
    """The layouts of a checkpoint by path; `explicit` is False where the caller said nothing."""

    rules: tuple[tuple[Pattern, Layout], ...]
    explicit: bool = True

    def of(self, path: str) -> Layout:
        found = first_match(self.rules, path)
        chosen = FLAX if found is None else found[1]
        # Keras keeps the depthwise kernels of a separable convolution in a checkpoint of ordinary ones, under a name of their
        # own.
        depthwise = chosen.name == "keras" and _bare(path.rpartition("/")[2]) == "depthwise_kernel"
        return LAYOUTS["keras_depthwise"] if depthwise else chosen


def declared(layout: "str | Layout | Mapping[Pattern, str | Layout] | None") -> Declared:
    """What the argument `layout` of `graft` says.

    Raises:
      ValueError: no layout has that name.
      TypeError: it is none of the kinds allowed.
    """
    if layout is None:
        return Declared((), explicit=False)
    if isinstance(layout, Mapping):
        return Declared(tuple((pattern, _named(value, f"layout[{text(pattern)!r}]")) for pattern, value in layout.items()))
    return Declared((("**", _named(layout, "layout")),))


def regroups(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether only the grouping of axes differs, in a way that leaves no choice.

    Axes of 1 may come and go in any array. An axis of a vector or a matrix may become several, in row-major order, as heads·d
    becomes heads × d. Larger arrays stay as they are: their adjacent axes mean different things.
    """
    if math.prod(shape) != math.prod(other):
        return False
    slim, wide = [tuple(size for size in s if size != 1) for s in (shape, other)]
    if slim == wide:
        return True
    if len(slim) > 2 or 0 in slim:
        return False
    remaining = list(wide)
    for size in slim:
        product = 1
        while product < size and remaining:
            product *= remaining.pop(0)
        if product != size:
            return False
    return not remaining


def _orders(rank: int):
    """How any layout known here would have to be transposed."""
    axes = range(rank)
    if rank == 2:
        return [(1, 0)]
    front, back = tuple(axes[2:]), tuple(axes[:-2])
    orders = {(*front, 1, 0), (*front, 0, 1), (*back, rank - 1, rank - 2)}
    return sorted(orders) if rank <= 5 else list(itertools.islice(sorted(orders), 3))


def _named(layout: "str | Layout", argument: str) -> Layout:
    if isinstance(layout, Layout):
        return layout
    if not isinstance(layout, str):
        raise TypeError(
            f"{argument} is {layout!r}; give a name of {', '.join(LAYOUTS)}, a Layout, or a mapping from path to those"
        )
    if layout not in LAYOUTS:
        meant = _OTHER_NAMES.get(layout.lower()) or next(iter(difflib.get_close_matches(layout.lower(), LAYOUTS, n=1)), None)
        hint = f" (did you mean {meant!r}?)" if meant else ""
        raise ValueError(f"{argument} is {layout!r}{hint}; give one of {', '.join(LAYOUTS)}, or a Layout")
    return LAYOUTS[layout]


def _bare(leaf: str) -> str:
    """The name without the output index that TensorFlow appends (kernel:0)."""
    return re.sub(r":\d+\Z", "", leaf)
