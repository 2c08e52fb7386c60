"""Where residual branches end, and what their kernels are packed of, on constructions whose answer is known by hand."""

import jax
import jax.numpy as jnp

from varscale.usage.table import uses

TOKENS = jax.ShapeDtypeStruct((2, 6, 16), jnp.float32)
IDS = jax.ShapeDtypeStruct((2, 6), jnp.int32)


def shaped(**shapes):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def test_what_is_added_to_scores_ends_no_branch():
    """A mask of padding made of the ids (T5), scores of the layer before (RealFormer), a bias of pairs (AlphaFold)."""

    def model(p, ids):
        x = p["table"][ids]
        scores = jnp.where(ids > 0, 0.0, -1e9)[:, None]
        for q, k, v in (p["first"], p["second"]):
            scores = (x @ q) @ (x @ k).mT + scores
            x = x + jax.nn.softmax(scores) @ (x @ v)
        pairs = jax.nn.relu(x @ p["pair"]) @ p["bias"]
        q, k, v = p["third"]
        x = x + jax.nn.softmax((x @ q) @ (x @ k).mT + pairs) @ (x @ v)
        return x @ p["head"]

    square = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    params = shaped(table=(20, 8), pair=(8, 8), bias=(8, 6), head=(8, 20))
    found = uses(model, IDS, params={**params, **dict.fromkeys(("first", "second", "third"), (square,) * 3)})
    assert (found.additions, len(found.attentions)) == (3, 3)
    for layer in ("first", "second", "third"):
        assert [found[f"{layer}/{i}"].main.parts for i in range(3)] == [("query",), ("key",), ("value",)]
    assert found["bias"].main.ends is None


def test_a_gate_on_a_branch_does_not_end_it():
    """What a layer makes of a condition multiplies the branch (DiT), or a bounded function of a kernel's output does."""

    def model(p, x):
        gates, x = jax.nn.silu(x[:, :1] @ p["condition"]) @ p["gates"], x @ p["in"]
        for i, gate in enumerate(jnp.split(gates, 2, axis=-1)):
            x = x + gate * (jax.nn.gelu(x @ p[f"up{i}"]) @ p[f"down{i}"])
        x = x + jax.nn.sigmoid(x @ p["sigmoid"]) * (x @ p["plain"])
        return x @ p["head"]

    names = {f"{name}{i}": (8, 8) for name in ("up", "down") for i in range(2)}
    params = shaped(condition=(16, 8), gates=(8, 16), sigmoid=(8, 8), plain=(8, 8), head=(8, 3), **{"in": (16, 8)}, **names)
    found = uses(model, TOKENS, params=params)
    assert {p.path: p.main.ends for p in found if p.main.ends} == {"down0": 1, "down1": 2, "plain": 3}


def test_parts_of_a_kernel_have_their_own_sizes():
    """Mamba's step, B and C; a kernel of the steps' poles, entry by entry, sums nothing and stacks nothing."""

    def model(p, x):
        step, b, c = jnp.split(x @ p["all"], [2, 7], axis=-1)
        decay = jnp.einsum("bld,dn->bldn", jax.nn.softplus(step @ p["dt"]), p["poles"])
        return jnp.einsum("bldn,bln,bln->bld", jnp.exp(decay), b, c) @ p["head"]

    found = uses(model, TOKENS, params={**shaped(all=(16, 12), dt=(2, 6), poles=(6, 5), head=(6, 3))})
    assert (found["all"].main.parts, found["all"].main.part_sizes) == (("0", "1", "2"), (2, 5, 5))
    assert (found["dt"].role, found["dt"].main.fan_out, found["poles"].role) == ("hidden", 6, "vector")
