"""A graph convolutional net whose depth is an argument, on sparse matrices that a CPU multiplies fast."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

import varscale as vs
from experiments.lab.graphs import Graph

DEEPEST = 16
# Kipf and Welling 2017, section 5.2, without the dropout; their code has no biases either.
WIDTH, EPOCHS, RATE, DECAY = 16, 200, 0.01, 5e-4
IN_AXES: Any = (0, nn.broadcast)  # of the hidden layers: each has its own `active`, all the same graph
PIECE = 8  # entries of a row that are added in one pass
ROW = 64  # entries of a row that are gathered at once; what longer rows have beyond is added edge by edge


class Rows(NamedTuple):
    """A sparse matrix, stored by rows of equal length; what is over stands in a list.

    Attributes:
      columns: of each row's entries, in pieces, shape (pieces, rows, PIECE); padded with 0.
      values: of each row's entries, likewise.
      extra: row and column of the entries over, shape (2, extra).
      extra_values: shape (extra,).
    """

    columns: Int[Array, "pieces rows piece"]
    values: Float[Array, "pieces rows piece"]
    extra: Int[Array, "2 extra"]
    extra_values: Float[Array, " extra"]

    @classmethod
    def of(cls, matrix: Any) -> "Rows":
        """From a scipy CSR matrix."""
        counts = np.diff(matrix.indptr)
        row = np.repeat(np.arange(matrix.shape[0]), counts)
        place = np.arange(matrix.nnz) - np.repeat(matrix.indptr[:-1], counts)
        fits = place < ROW
        pieces = -(-min(ROW, counts.max()) // PIECE)
        columns = np.zeros((matrix.shape[0], pieces * PIECE), np.int32)
        values = np.zeros(columns.shape, np.float32)
        columns[row[fits], place[fits]], values[row[fits], place[fits]] = matrix.indices[fits], matrix.data[fits]
        extra = np.stack([row[~fits], matrix.indices[~fits]]).astype(np.int32)
        columns, values = (a.reshape(-1, pieces, PIECE).transpose(1, 0, 2) for a in (columns, values))
        return cls(*map(jnp.asarray, (columns, values, extra, matrix.data[~fits].astype(np.float32))))


@jax.custom_batching.custom_vmap
def rows_times(matrix: Rows, x: Float[Array, "columns features"]) -> Float[Array, "rows features"]:
    """matrix @ x. Mapped over many x it multiplies all of them at once, as one x with many columns."""

    # Written out entry by entry, XLA makes a piece one pass over the result: 30 times as fast as one gather of all entries.
    def add(total, piece):
        columns, values = piece
        return functools.reduce(jnp.add, (x[columns[:, n]] * values[:, n, None] for n in range(PIECE)), total), None

    total, _ = jax.lax.scan(add, jnp.zeros((matrix.columns.shape[1], x.shape[1]), x.dtype), (matrix.columns, matrix.values))
    if matrix.extra_values.size:
        total = total.at[matrix.extra[0]].add(x[matrix.extra[1]] * matrix.extra_values[:, None], indices_are_sorted=True)
    return total


@rows_times.def_vmap
def _side_by_side(runs, batched, matrix, x):
    if not batched[1] or any(jax.tree.leaves(batched[0])):
        raise ValueError("rows_times is mapped over x alone: one matrix, many x")
    beside = rows_times(matrix, x.transpose(1, 0, 2).reshape(x.shape[1], -1))
    return beside.reshape(len(beside), runs, -1).transpose(1, 0, 2), True


class Sparse(NamedTuple):
    """A sparse matrix and its transpose, so that gradients are gathered too."""

    forward: Rows
    backward: Rows

    @classmethod
    def of(cls, matrix: Any) -> "Sparse":
        """From a scipy sparse matrix."""
        return cls(Rows.of(matrix.tocsr()), Rows.of(matrix.T.tocsr()))


@jax.custom_vjp
def product(matrix: Sparse, x: Float[Array, "columns features"]) -> Float[Array, "rows features"]:
    """matrix @ x, of which x alone has a gradient."""
    return rows_times(matrix.forward, x)


product.defvjp(
    lambda matrix, x: (product(matrix, x), matrix), lambda matrix, gradient: (None, rows_times(matrix.backward, gradient))
)


class Nodes(NamedTuple):
    """A graph as the net sees it.

    Attributes:
      adjacency: normalized.
      features: dense, or sparse where most are zero.
      labels: of each node.
      train: the nodes that are trained on.
      test: the nodes that are asked for.
    """

    adjacency: Sparse
    features: Any
    labels: Int[Array, " nodes"]
    train: Bool[Array, " nodes"]
    test: Bool[Array, " nodes"]

    @classmethod
    def of(cls, graph: Graph) -> "Nodes":
        from scipy import sparse

        few = np.count_nonzero(graph.features) < 0.1 * graph.features.size
        features = Sparse.of(sparse.csr_array(graph.features)) if few else jnp.asarray(graph.features)
        return cls(
            Sparse.of(graph.normalized_adjacency()),
            features,
            *map(jnp.asarray, (graph.labels, graph.train, graph.test)),
        )


class GraphConvolution(nn.Module):
    """A kernel, then the average over the neighbourhood: Â·(X·W), equation 2 of Kipf and Welling 2017."""

    features: int
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, adjacency: Sparse, x: Any) -> Float[Array, "nodes features"]:
        if isinstance(x, Sparse):
            kernel = self.param("kernel", self.kernel_init, (x.backward.columns.shape[1], self.features))
            return product(adjacency, product(x, kernel))
        return product(adjacency, x @ self.param("kernel", self.kernel_init, (x.shape[1], self.features)))


class Hidden(nn.Module):
    """A hidden layer, skipped where it lies beyond the net's depth; it also gives its pre-activation's E[z²]."""

    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "nodes width"], active: Any, adjacency: Sparse):
        kernel = self.param("kernel", self.kernel_init, (x.shape[1], x.shape[1]))

        def layer(x):
            z = product(adjacency, x @ kernel)
            return jax.nn.relu(z), jnp.mean(z**2)

        return jax.lax.cond(active, layer, lambda x: (x, jnp.nan), x)


class Net(nn.Module):
    """Graph convolutions with ReLU. The depth is an argument: one compiled program serves all depths up to `DEEPEST`."""

    classes: int
    kernel_init: nn.initializers.Initializer
    width: int = WIDTH

    @nn.compact
    def __call__(self, nodes: Nodes, depth: Any) -> tuple[Float[Array, "nodes classes"], Float[Array, " layers"]]:
        """The logits, and E[z²] of each layer's pre-activations (not a number for layers beyond the depth)."""
        first = GraphConvolution(self.width, self.kernel_init, name="first")(nodes.adjacency, nodes.features)
        stack: Any = nn.scan(
            Hidden, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=IN_AXES, length=DEEPEST - 2
        )
        active = jnp.arange(DEEPEST - 2) < depth - 2
        x, moments = stack(self.kernel_init, name="hidden")(jax.nn.relu(first), active, nodes.adjacency)
        logits = GraphConvolution(self.classes, self.kernel_init, name="last")(nodes.adjacency, x)
        return logits, jnp.concatenate([jnp.mean(first**2)[None], moments, jnp.mean(logits**2)[None]])


def draw(keys: Array, init: nn.initializers.Initializer, nodes: Nodes, classes: int, width: int = WIDTH) -> Any:
    """The parameters of one net a key."""
    return jax.jit(jax.vmap(lambda key: Net(classes, init, width).init(key, nodes, 2)["params"]))(keys)


@functools.partial(jax.jit, static_argnames=("classes", "epochs"))
def train(params, nodes: Nodes, depth, rate, *, classes: int, epochs: int = EPOCHS):
    """Train many nets of one depth by Adam.

    Args:
      params: of the nets, along a leading axis of runs.
      nodes: the graph.
      depth: how many layers, 2 to `DEEPEST`.
      rate: the learning rate.
      classes: of the graph.
      epochs: steps on all labelled nodes at once.

    Returns:
      Training loss and test accuracy before each epoch, shape (runs, epochs).
    """
    optimizer = optax.adam(rate)

    def one(params):
        def loss(params):
            logits, _ = Net(classes, vs.zeros).apply({"params": params}, nodes, depth)
            entropies = optax.softmax_cross_entropy_with_integer_labels(logits, nodes.labels)
            value = jnp.sum(jnp.where(nodes.train, entropies, 0)) / jnp.sum(nodes.train, dtype=entropies.dtype)
            right = (jnp.argmax(logits, axis=-1) == nodes.labels) & nodes.test
            accuracy = jnp.sum(right, dtype=value.dtype) / jnp.sum(nodes.test, dtype=value.dtype)
            return value + DECAY / 2 * jnp.sum(params["first"]["kernel"] ** 2), (value, accuracy)

        def step(carry, _):
            params, state = carry
            gradient, seen = jax.grad(loss, has_aux=True)(params)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), seen

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=epochs)[1]

    return jax.vmap(one)(params)


@functools.partial(jax.jit, static_argnames=("classes", "width"))
def moments(params, nodes: Nodes, *, classes: int, width: int):
    """E[z²] of every layer of nets as deep as can be, shape (runs, layers)."""

    def one(params):
        return Net(classes, vs.zeros, width).apply({"params": params}, nodes, DEEPEST)[1]

    return jax.vmap(one)(params)
