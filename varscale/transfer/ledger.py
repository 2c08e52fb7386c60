"""The account of a graft while it is written."""

from varscale.programs.trees import Leaf, Tree
from varscale.transfer.account import Account, Entry

NOT_A_WEIGHT = "the state of a random generator, not a weight"


class Ledger:
    """Entries by path, and the leaves of both trees that they are about."""

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
        """Enter leaves of the checkpoint as left over; the reasons of several parts of one leaf are joined."""
        for source in sources:
            before = self.left_over.get(source)
            whys = why if before is None or before.why == why else f"{before.why}; {why}"
            both = intended and (before is None or before.intended)
            shape = self.checkpoint[source].shape
            self.left_over[source] = Entry(source, shape, (source,), (shape,), whys, both)

    def enter(self, book: dict[str, Entry], leaf: Leaf, sources: tuple[str, ...], why: str, *, intended: bool = False) -> None:
        """Enter a leaf of the model in one of the books."""
        shapes = tuple(self.checkpoint[source].shape for source in sources)
        book[leaf.path] = Entry(leaf.path, leaf.shape, sources, shapes, why, intended)

    def account(self, unused: tuple[str, ...]) -> Account:
        order = {path: place for place, path in enumerate(self.checkpoint)}
        left_over = dict(sorted(self.left_over.items(), key=lambda item: order[item[0]]))
        return Account(self.moved, self.kept, left_over, self.mismatched, unused)
