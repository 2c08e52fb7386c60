"""Whole models: the values of their own init, without its forward pass, its compilation and its memory."""

from __future__ import annotations

from typing import Any

from varscale.initialization.laws import applied
from varscale.initialization.outline import declared, outline
from varscale.initialization.tracing import trace
from varscale.programs.caches import without_collection


def initialize(
    model: Any,
    key: Any,
    x: Any = None,
    *,
    scheme: Any = "declared",
    dtype: Any = None,
    out_shardings: Any = None,
    given: Any = None,
    exact: bool = False,
    account: bool = False,
    method: str | None = None,
) -> Any:
    """The variables of a linen module, or an nnx model, drawn law by law.

    Scheme "declared" gives exactly the bits of `jax.jit(model.init)(key, x)`, and of `factory(nnx.Rngs(key))` under jit, for
    every law that is elementwise in its random numbers and for orthogonal; no forward pass is run and nothing is allocated but
    the result. The init is traced once; leaves whose random operations are equal share one compiled program. A law that sums
    over an axis may differ in the last places: the account names such leaves, and `exact=True` takes them from the model's own
    whole init. Leaves that depend on the model's input are computed from it as flax does.
    XLA's CPU compiler rounds exponentials, logarithms, sums of products and narrow arrays (a last axis of 2 to 8) by the loop
    that it makes of them. Such leaves are compiled for their own shape, and whole on every device; the last places may differ
    where the init's loop is not that of the leaf alone (measured: a transposed draw of an nnx model, a law in float16 inside a
    loop): the account names these too, and `exact=True` takes them from the whole init.
    Under a mesh with explicit axes the bits are those that the jitted init has there, which may differ in the last place.

    Args:
        model: a linen module, or an nnx factory `lambda rngs: Net(..., rngs=rngs)` (which needs no x).
        key: a PRNG key, or a mapping from the name of a random stream to its key.
        x: one input (arrays or `jax.ShapeDtypeStruct`s, any pytree of them), or `vs.inputs(*args, **kwargs)`.
        scheme: "declared"; a `vs.Plan`, which has a law for every parameter, or a scheme that makes one of model and x, such
            as `vs.schemes.gpt2()`; a mapping from path patterns to initializers, of
            which the first that matches counts, and what none matches keeps its declared law; or a function of
            (path, shape, dtype) to an initializer or None. Paths are those of
            parameters without linen's "params/". A pattern that names a module lays a law that needs fans on its weights alone,
            not on biases and other vectors. A law sees the shape that the layer's own initializer sees. Blocks of a packed
            kernel are addressed by `vs.fused` with one law a block, None for the declared one.
        dtype: what floating parameters are rounded to after the draw; default: as declared.
        out_shardings: where leaves lie: a tree of shardings, a function of (path, shape), or "declared" for flax's partitioning
            metadata (linen's boxes and logical rules, nnx's `sharding` and `out_sharding`). Each device draws its own part.
            None is where flax's own init puts them: the default device, or every device of the mesh that is set; nnx
            variables that are sharded eagerly as their metadata says, and what an initializer lays out on explicit axes there.
        given: a tree of values for some leaves; only the others are drawn.
        exact: compute laws that sum over an axis, leaves that depend on data, and those that XLA rounds by their loop, by the
            model's own whole jitted init.
        account: whether to return an account of every leaf too.
        method: the linen method to initialize by, in place of `__call__`.

    Returns:
        The variables, every collection of them, as flax's own init gives them; for a factory the nnx model. With `given` or
        `account=True`: (those, the `Account`).

    Raises:
        TypeError: model is neither a linen module nor a factory (an nnx instance no longer holds its initializers), key is no
            key, or scheme, dtype or out_shardings are of no use.
        ValueError: a pattern matches nothing, a given value has no leaf or another shape, a law cannot draw its leaf, an axis
            is none of the mesh, or a leaf depends on an x without numbers.

    >>> import flax.linen as nn, jax, varscale as vs
    >>> variables = vs.initialize(nn.Dense(3), jax.random.key(0), jax.numpy.ones((1, 4)))
    >>> theirs = jax.jit(nn.Dense(3).init)(jax.random.key(0), jax.numpy.ones((1, 4)))
    >>> bool((variables["params"]["kernel"] == theirs["params"]["kernel"]).all())
    True
    """
    scheme = applied(scheme, model, x, method=method)
    with without_collection():
        traced = trace(model, key, x, method)
        if isinstance(scheme, str) and scheme == "declared" and out_shardings is None and given is None:
            plan = declared(traced, key, dtype, exact)
        else:
            plan = outline(traced, key, scheme=scheme, dtype=dtype, out_shardings=out_shardings, given=given, exact=exact)
        result = plan.draw(key)
    return (result, plan.finished()) if account or given is not None else result
