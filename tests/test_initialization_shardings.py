"""Layouts: the same bits on every mesh and over two processes, each device drawing its own part."""

import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from jax.nn import initializers as theirs
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_models import Boxed, Net, mesh_of, places

import varscale as vs

KEY = jax.random.key(4)
X = np.ones((2, 16), np.float32)


@functools.cache
def plain():
    return jax.jit(Net().init)(KEY, X)


def assert_same(ours, other):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), ours, other)


@pytest.mark.parametrize("sizes", [(1,), (2,), (4, 1), (2, 4), (8, 1)])
def test_the_same_bits_on_every_mesh(sizes):
    mesh = mesh_of(sizes)
    params, account = vs.initialize(Net(), KEY, X, out_shardings=functools.partial(places, mesh), account=True)
    assert_same(params, plain())
    kernel = params["params"]["Dense_0"]["kernel"]
    assert kernel.sharding.is_equivalent_to(places(mesh, "Dense_0/kernel", kernel.shape), 2)
    many = mesh.size > 1
    # The kernel of six columns is narrow: see `sampling.is_narrow`.
    whole = [path for path, entry in account.entries.items() if "computed whole on every device" in entry.notes]
    assert whole == ["params/Dense_0/kernel", "params/square/kernel"] * many
    others = {*account.of(how="elementwise")} - {"params/gamma", *whole}
    assert not any(account[path].notes for path in others)


def test_a_tree_of_shardings_and_inner_nodes():
    mesh = mesh_of((2, 4))
    with jax.set_mesh(mesh):
        params = vs.initialize(Net(), KEY, X, out_shardings={"params": P(), "batch_stats": P()})
    assert params["params"]["Dense_0"]["kernel"].sharding.is_fully_replicated
    full = jax.tree.map(lambda x: NamedSharding(mesh, P()), plain())
    assert_same(vs.initialize(Net(), KEY, X, out_shardings=full), plain())


def test_metadata_of_linen_and_logical_rules():
    mesh = mesh_of((2, 4))
    with jax.set_mesh(mesh), nn.logical_axis_rules((("embed", "a"), ("mlp", "b"), ("layers", None))):
        variables, account = vs.initialize(Boxed(), KEY, X, out_shardings="declared", account=True)
    inner = nn.meta.unbox(variables)["params"]
    assert inner["mesh_axes"]["kernel"].sharding.spec == P("a", "b")
    assert inner["logical"]["kernel"].sharding.spec == P("a", "b")
    assert inner["stack"]["Dense_0"]["kernel"].sharding.spec == P(None, "a", "b")
    assert isinstance(variables["params"]["logical"]["kernel"], nn.LogicallyPartitioned)
    assert "with a collective" not in account["params/stack/Dense_0/kernel"].notes
    assert_same(variables, jax.jit(Boxed().init)(KEY, X))


class Named(nnx.Module):
    def __init__(self, rngs):
        init = nnx.with_partitioning(theirs.lecun_normal(), ("a", "b"))
        self.named = nnx.Linear(16, 8, kernel_init=init, rngs=rngs)
        self.kept = nnx.Linear(16, 8, kernel_metadata={"out_sharding": ("b", "a")}, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)


def test_metadata_of_nnx_with_and_without_a_mesh():
    free = vs.initialize(Named, KEY)  # flax's own constructor raises: no mesh is set
    with jax.set_mesh(mesh_of((2, 4))):
        model = vs.initialize(Named, KEY, out_shardings="declared")
        assert model.named.kernel[...].sharding.spec == P("a", "b")
        assert model.kept.kernel[...].sharding.spec == P("b", "a")
        built, same = Named(nnx.Rngs(KEY)), vs.initialize(Named, KEY)  # both lay out at once what has metadata
        with nnx.use_eager_sharding(False):
            lazy = vs.initialize(Named, KEY)
        other = nnx.jit(lambda key: Named(nnx.Rngs(key)))(KEY)
    assert nnx.graphdef(free) == nnx.graphdef(model) == nnx.graphdef(other)
    for a, b in zip(*(jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (built, same)), strict=True):
        assert a.sharding == b.sharding
    assert lazy.named.kernel[...].sharding.spec == P()
    assert len(free.named.kernel[...].devices()) == 1
    for mine in (model, free, same):
        assert_same(nnx.state(mine, nnx.Param), nnx.state(other, nnx.Param))


def test_keys_that_cannot_promise_it_are_named():
    mesh = mesh_of((2, 4))
    place = functools.partial(places, mesh)
    _, account = vs.initialize(Net(), jax.random.key(4, impl="rbg"), X, out_shardings=place, account=True)
    assert "rbg" in account.notes[0]


@pytest.mark.parametrize("wanted", [None, "declared"])
def test_initializers_that_lay_out_on_explicit_axes(wanted):
    class Laid(nn.Module):
        @nn.compact
        def __call__(self):
            self.param("kernel", lambda key: jax.random.normal(key, (8, 16), out_sharding=P("a", None)))
            self.param("bias", lambda key: jax.random.normal(key, (8,)))

    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        ours = vs.initialize(Laid(), KEY, out_shardings=wanted)["params"]
        own = jax.jit(Laid().init)(KEY)["params"]
    for name, x in ours.items():
        assert x.sharding.is_equivalent_to(own[name].sharding, x.ndim)
        np.testing.assert_array_equal(x, own[name])


def test_no_place_and_no_mesh_is_the_default_device():
    mesh = mesh_of((2, 4))
    ours = vs.initialize(Net(), KEY, X, out_shardings=lambda path, _: NamedSharding(mesh, P("a")) if "scale" in path else None)
    for path, x in jax.tree_util.tree_leaves_with_path(ours):
        assert len(x.sharding.device_set) == (8 if "scale" in jax.tree_util.keystr(path) else 1)
    jax.tree.map(np.testing.assert_array_equal, ours, vs.initialize(Net(), KEY, X, out_shardings="declared"))


def test_wrong_places_are_refused():
    mesh = mesh_of((2, 4))
    initialize = functools.partial(vs.initialize, Net(), KEY, X)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="split along model, and the mesh has the axes a, b"):
        initialize(out_shardings=lambda path, shape: P("model") if path.endswith("kernel") else None)
    with pytest.raises(ValueError, match=r"none is set: use jax\.set_mesh"):
        initialize(out_shardings=P("a"))
    with pytest.raises(ValueError, match="its mesh is abstract and has no devices"):
        initialize(out_shardings=NamedSharding(mesh.abstract_mesh, P("a")))
    with pytest.raises(ValueError, match="nothing for 'params/BatchNorm_0/bias'"):
        initialize(
            out_shardings={"params": {"Dense_0": {"kernel": NamedSharding(mesh, P())}}, "batch_stats": NamedSharding(mesh, P())}
        )
    with pytest.raises(ValueError, match="the model has no such leaf"):
        initialize(
            out_shardings={
                "params": NamedSharding(mesh, P()),
                "batch_stats": NamedSharding(mesh, P()),
                "more": NamedSharding(mesh, P()),
            }
        )
    with pytest.raises(ValueError, match=r"'batch_stats/BatchNorm_0/mean' of shape \(6,\) cannot be laid out"):
        initialize(out_shardings=lambda path, shape: NamedSharding(mesh, P("b") if shape == (6,) else P()))
    with pytest.raises(ValueError, match=r"of shape \(6,\) cannot be laid out"):
        initialize(out_shardings=NamedSharding(mesh, P(None, "a")))
    with pytest.raises(ValueError, match=r"of shape \(6,\) cannot be laid out .* it names 2 axes, and the leaf has 1"):
        initialize(out_shardings=NamedSharding(mesh, P(None, None)))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"'params/Dense_0/kernel' of shape .* cannot be laid out"):
        initialize(out_shardings=lambda path, shape: P("a", "a") if len(shape) == 2 else P())
    with pytest.raises(ValueError, match="out_shardings must be 'declared'"):
        initialize(out_shardings="all")
    with pytest.raises(TypeError, match="must have a jax"):
        initialize(out_shardings=lambda path, shape: 3)


def test_two_processes_of_four_devices():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(here.parent), *sys.path]),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4"),
        "JAX_PLATFORMS": "cpu",
    }
    running = [
        subprocess.Popen(
            [sys.executable, here / "sharded_models.py", str(port), str(i)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for i in range(2)
    ]  # fmt: skip
    told = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    assert [line for out, _ in told for line in out.splitlines() if "Gloo" not in line] == ["8 devices, equal"] * 2
