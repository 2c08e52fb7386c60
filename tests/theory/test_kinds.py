"""Every concrete kind of node stands in the registry of each dispatched function itself, or says here why not."""

import pytest

import varscale.theory  # noqa: F401  (registers all kinds and their handlers)
from varscale.theory.graph.nodes import Node, cross_by_kind, pullback, second_moments

ABSTRACT = {"Rearranged", "OneOfMany"}
KNOWN = "known numbers or a leaf: nothing flows into it"
NO_LAW = "knows no law besides the strategies that all kinds share"
ABSENT = {
    second_moments: {"Leaf": "its law is given when it is made"},
    pullback: {
        **dict.fromkeys(("Constant", "Leaf", "Computed", "Array"), KNOWN),
        "Apply": "passes through derivatives towards its roots (propagation/cotangents)",
    },
    cross_by_kind: {
        **dict.fromkeys(("Constant", "Array", "Computed"), 'the strategies "known numbers" and independence'),
        "Leaf": "measured together, or independent",
        "Sum": 'the strategy "weighted sums"',
        "Permute": 'the strategy "axes in another order"',
        **dict.fromkeys(("Softmax", "WindowMax"), NO_LAW),
    },
}


def kinds(kind=Node):
    """The kinds of the room, but for the abstract ones and those of tests."""
    for own in kind.__subclasses__():
        if own.__module__.startswith("varscale.") and own.__name__ not in ABSTRACT:
            yield own
        yield from kinds(own)


@pytest.mark.parametrize("function", ABSENT, ids=lambda f: f.__name__)
def test_every_kind_is_registered_or_says_why_not(function):
    found = {kind.__name__ for kind in kinds() if kind not in function.registry}
    assert found == set(ABSENT[function])


@pytest.mark.parametrize("function", ABSENT, ids=lambda f: f.__name__)
def test_handlers_have_names(function):
    assert all(handler.__name__ not in ("_", "<lambda>") for handler in function.registry.values())
