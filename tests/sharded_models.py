"""Models and layouts for `test_initialization_shardings`; run by it as one of two processes too."""

import functools
import sys

import flax.linen as nn
import jax
import numpy as np
from jax.nn import initializers as theirs
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import varscale as vs

X = np.ones((2, 16), np.float32)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        init = nn.with_logical_partitioning(theirs.lecun_normal(), ("embed", "mlp"))
        return nn.Dense(16, kernel_init=init)(x), None


class Boxed(nn.Module):
    """Partitioning metadata of both kinds, and on a scanned axis."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, kernel_init=nn.with_partitioning(theirs.he_normal(), ("a", "b")), name="mesh_axes")(x)
        init = nn.with_logical_partitioning(theirs.lecun_normal(), ("embed", "mlp"))
        x = nn.Dense(16, kernel_init=init, name="logical")(x)
        stack = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2,
            metadata_params={nn.meta.PARTITION_NAME: "layers"},
        )  # fmt: skip
        return stack(name="stack")(x, None)[0]


class Net(nn.Module):
    """A plain kernel, a stack, an orthogonal one, a law of gamma, constants and statistics."""

    @nn.compact
    def __call__(self, x):
        self.param("gamma", lambda key: jax.random.gamma(key, 2.0, (16, 8)))
        x = nn.Dense(16, kernel_init=theirs.orthogonal(), name="square")(x)
        many = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2)
        x = many(16, name="many")(x)[0]
        return nn.BatchNorm(use_running_average=False)(nn.Dense(6)(x))


def mesh_of(sizes: tuple[int, ...]) -> jax.sharding.Mesh:
    count = int(np.prod(sizes))
    return jax.sharding.Mesh(np.array(jax.devices()[:count]).reshape(sizes), ("a", "b")[: len(sizes)])


def places(mesh: jax.sharding.Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """Split along every axis that the mesh divides, the last first."""
    spec: list[str | None] = [None] * len(shape)
    for axis in range(len(shape)):
        free = [name for name in mesh.axis_names if name not in spec]
        if free and shape[axis] % mesh.shape[free[0]] == 0:
            spec[axis] = free[0]
    return NamedSharding(mesh, P(*spec))


def main(port: str, process: int) -> None:
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    key = jax.random.key(4)
    mesh = mesh_of((2, 4))
    params = vs.initialize(Net(), key, X, out_shardings=functools.partial(places, mesh))
    alone = jax.tree.leaves(jax.jit(Net().init)(key, X))
    for ours, other in zip(jax.tree.leaves(params), alone, strict=True):
        whole = np.asarray(other)
        for shard in ours.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])
    print(f"{len(jax.devices())} devices, equal", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
