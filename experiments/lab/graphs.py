"""Graphs for the graph convolution: real ones that packages ship, a citation-like random one, the user's own, a stand-in."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32

from experiments.lab.data import digits
from experiments.lab.experiment import ExperimentError

CORA_CLASSES = (351, 217, 418, 818, 426, 298, 180)  # papers a class, 2708 in all (Sen et al. 2008)
CORA_LINKS, CORA_HOMOPHILY = 5278, 0.81  # undirected; the share of them that join two papers of a class (Pei et al. 2020)
CORA_WORDS, CORA_WORDS_A_PAPER = 1433, 18
FORMAT = "the format is described by python -m experiments graph-convolution --help"
# PyTorch Geometric's names for the same arrays.
ALIASES = {"edges": "edge_index", "features": "x", "labels": "y", "train": "train_mask", "test": "test_mask"}
LABELLED, TESTED = 20, 1000  # nodes a class that are trained on, and nodes tested (Yang et al. 2016; Kipf and Welling 2017)


@dataclass(frozen=True, eq=False)
class Graph:
    """An undirected graph whose nodes have features and labels.

    Attributes:
      name: what it is called in tables.
      edges: each edge once, smaller node first, no loops.
      features: one row a node.
      labels: of each node, from 0.
      train: the nodes whose labels are trained on.
      test: the nodes whose labels are asked for.
    """

    name: str
    edges: Int[np.ndarray, "edges 2"]
    features: Float32[np.ndarray, "nodes features"]
    labels: Int32[np.ndarray, " nodes"]
    train: Bool[np.ndarray, " nodes"]
    test: Bool[np.ndarray, " nodes"]

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    def normalized_adjacency(self):
        """D^-1/2 (A + I) D^-1/2, of A + I the degrees D: a scipy CSR matrix (Kipf and Welling 2017, equation 2)."""
        from scipy import sparse

        nodes = len(self.labels)
        loops = np.arange(nodes)
        row = np.concatenate([self.edges[:, 0], self.edges[:, 1], loops])
        column = np.concatenate([self.edges[:, 1], self.edges[:, 0], loops])
        root = 1 / np.sqrt(np.bincount(row, minlength=nodes))
        return sparse.csr_array((root[row] * root[column], (row, column)), shape=(nodes, nodes))


def karate_club() -> Graph:
    """Zachary's karate club: 34 members, 78 friendships, two sides; one member of each is labelled, and no features.

    The features are the identity, the labelled are the instructor (0) and the administrator (33), as in Kipf and Welling 2017,
    appendix A, which has four communities for classes where here it is the side a member took.
    """
    import networkx

    graph = networkx.karate_club_graph()
    labels = np.array([side != "Mr. Hi" for _, side in graph.nodes(data="club")], np.int32)
    train = np.isin(np.arange(len(labels)), (0, len(labels) - 1))
    return Graph(
        "karate club", _undirected(np.array(graph.edges), len(labels)), np.eye(34, dtype=np.float32), labels, train, ~train
    )


def digits_neighbours(neighbours: int = 10, *, seed: int = 0) -> Graph:
    """The handwritten digits, each joined to its nearest neighbours: 1797 nodes, 64 grey levels, 10 classes."""
    from sklearn.neighbors import kneighbors_graph

    samples = digits()
    near = kneighbors_graph(samples.features, neighbours)
    edges = _undirected(np.argwhere(near.toarray() > 0), len(samples))
    train, test = _split(samples.labels, seed)
    return Graph("digits' neighbours", edges, samples.features, samples.labels, train, test)


def citations(*, seed: int = 0, topical: float = 0.35) -> Graph:
    """A stochastic block model of Cora's size: 2708 papers, 1433 words, 7 classes, 5278 links of which 81 % stay in the class.

    Each paper has 18 different words, a word of its class's own 204 with probability `topical` and any word otherwise; rows are
    divided by their sum. At the default the words alone classify about as well as Cora's do.
    """
    import networkx

    sizes = np.array(CORA_CLASSES)
    nodes, classes = int(sizes.sum()), len(sizes)
    pairs_within, pairs = (sizes * (sizes - 1) / 2).sum(), nodes * (nodes - 1) / 2
    within = CORA_LINKS * CORA_HOMOPHILY / pairs_within
    between = CORA_LINKS * (1 - CORA_HOMOPHILY) / (pairs - pairs_within)
    chances = np.where(np.eye(classes, dtype=bool), within, between)
    graph = networkx.stochastic_block_model(sizes.tolist(), chances.tolist(), seed=seed, sparse=True)
    labels = np.repeat(np.arange(classes, dtype=np.int32), sizes)
    rng = np.random.default_rng(seed)
    words = CORA_WORDS // classes
    chance = np.full((classes, CORA_WORDS), (1 - topical) / CORA_WORDS)
    for label in range(classes):
        chance[label, label * words : (label + 1) * words] += topical / words
    # The largest of ln(chance) + Gumbel noise are a draw without replacement.
    score = np.log(chance)[labels] + rng.gumbel(size=(nodes, CORA_WORDS))
    features = np.zeros((nodes, CORA_WORDS), np.float32)
    np.put_along_axis(features, np.argpartition(score, -CORA_WORDS_A_PAPER)[:, -CORA_WORDS_A_PAPER:], 1 / CORA_WORDS_A_PAPER, 1)
    train, test = _split(labels, seed)
    return Graph("citation-like blocks", _undirected(np.array(graph.edges), nodes), features, labels, train, test)


def synthetic(seed: int = 0, *, nodes: int = 60, features: int = 8, classes: int = 3) -> Graph:
    """A stand-in that needs no package: a noisy ring of classes, with features that lean to the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(nodes, dtype=np.int32) * classes // nodes
    ring = np.stack([np.arange(nodes), (np.arange(nodes) + 1) % nodes], axis=1)
    edges = _undirected(np.concatenate([ring, rng.integers(nodes, size=(nodes // 2, 2))]), nodes)
    centres = rng.standard_normal((classes, features))
    values = (centres[labels] + 0.5 * rng.standard_normal((nodes, features))).astype(np.float32)
    train = np.arange(nodes) % 4 == 0
    return Graph("stand-in", edges, values, labels, train, ~train)


def load(path: Path, *, seed: int = 0) -> Graph:
    """A graph of the user's, from a .npz file.

    It holds either

    * `edges`, integers (edges, 2) or (2, edges), each edge once or in both directions; `features`, numbers (nodes, features);
      `labels`, integers from 0 or strings (nodes,); and possibly truth values `train` and `test` (nodes,). PyTorch Geometric's
      names `edge_index`, `x`, `y`, `train_mask` and `test_mask` are understood too;
    * or a sparse matrix `adj_data`, `adj_indices`, `adj_indptr`, `adj_shape`, another `attr_...` and `labels`, as the graph
      benchmark of Shchur et al. 2018 has them.

    Without `train`, 20 nodes of each class are trained on (half of a class that has fewer than 40), and up to 1000 of the
    others tested. Pickled arrays are refused.

    Raises:
      ExperimentError: the file is missing or damaged, an array is missing or has the wrong shape, or its values cannot be.
    """
    arrays = _arrays(Path(path))

    def want(name: str, *shape: str) -> np.ndarray:
        found = name if name in arrays else ALIASES.get(name, name)
        if found not in arrays:
            also = f" (nor {ALIASES[name]!r})" if name in ALIASES else ""
            raise ExperimentError(f"{path} has no array {name!r}{also}; it has {', '.join(sorted(arrays)) or 'none'}; {FORMAT}")
        if arrays[found].ndim != len(shape):
            raise ExperimentError(f"{path}: {found} has shape {arrays[found].shape}; allowed is ({', '.join(shape)})")
        return arrays[found]

    if "adj_indptr" in arrays:
        adjacency, attributes = (_sparse(arrays, prefix, path) for prefix in ("adj", "attr"))
        edges, features = np.argwhere(adjacency != 0), attributes
    else:
        edges, features = _pairs(want("edges", "edges", "2"), path), want("features", "nodes", "features")
    classes, labels = _classes(want("labels", "nodes"), path)
    nodes = len(labels)
    if len(features) != nodes or not features.size:
        raise ExperimentError(f"{path}: features has shape {features.shape}; allowed is one row for each of the {nodes} labels")
    if edges.size and not (edges.min() >= 0 and edges.max() < nodes):
        raise ExperimentError(f"{path}: edges names nodes {edges.min()} to {edges.max()}; allowed are 0 to {nodes - 1}")
    if not np.issubdtype(features.dtype, np.number) or np.iscomplexobj(features) or not np.isfinite(features).all():
        raise ExperimentError(f"{path}: features ({features.dtype}) must be finite real numbers")
    if len(classes) < 2:
        raise ExperimentError(f"{path}: labels has one class only; two or more are needed")
    train, test = _split(labels, seed)
    given = {name for name in ("train", "test") if name in arrays or ALIASES[name] in arrays}
    if "train" in given:
        train = _mask(want("train", "nodes"), "train", nodes, path)
        test = _mask(want("test", "nodes"), "test", nodes, path) if "test" in given else ~train
    elif given:
        raise ExperimentError(f"{path} has an array 'test' and none called 'train'; give both, or 'train' alone, or none")
    if not train.any() or not test.any() or (train & test).any():
        raise ExperimentError(f"{path}: train and test must each name a node, and none in common")
    return Graph(Path(path).stem, _undirected(edges, nodes), features.astype(np.float32), labels.astype(np.int32), train, test)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            if isinstance(stored, np.ndarray):
                raise ExperimentError(f"{path} holds one array; allowed is a .npz file of several")
            return {name: _plain(stored, name, path) for name in stored.files}
    except FileNotFoundError:
        raise ExperimentError(f"there is no file {path}") from None
    except IsADirectoryError:
        raise ExperimentError(f"{path} is a folder; give a .npz file, {FORMAT}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise ExperimentError(f"{path} cannot be read as a .npz file of plain arrays: {reason}; {FORMAT}") from None


def _plain(stored: Any, name: str, path: Path) -> np.ndarray:
    try:
        return stored[name]
    except ValueError as error:
        if "pickle" not in str(error) and "Object" not in str(error):
            raise
        raise ExperimentError(
            f"{path}: {name} is an array of Python objects, which only unpickling could read, and that may run any code;"
            f" save strings as np.array({name}, dtype=str) and numbers with a numeric dtype"
        ) from None


def _pairs(edges: np.ndarray, path: Path) -> Int[np.ndarray, "edges 2"]:
    if edges.shape[0] == 2 and edges.shape[1] != 2:
        edges = edges.T
    if edges.shape[1] != 2:
        raise ExperimentError(f"{path}: edges has shape {edges.shape}; allowed are (edges, 2) and (2, edges)")
    if not np.issubdtype(edges.dtype, np.integer):
        raise ExperimentError(f"{path}: edges are {edges.dtype}; allowed are integers: edges.astype(int)")
    return edges


def _classes(labels: np.ndarray, path: Path) -> tuple[np.ndarray, Int[np.ndarray, " nodes"]]:
    """The distinct labels in order, and of each node the place of its label among them."""
    integers = np.issubdtype(labels.dtype, np.integer)
    if not integers and labels.dtype.kind not in "US":
        raise ExperimentError(f"{path}: labels are {labels.dtype}; allowed are integers from 0, and strings")
    if integers and labels.size and labels.min() < 0:
        raise ExperimentError(f"{path}: labels are integers from {labels.min()}; allowed are integers from 0, and strings")
    return np.unique(labels, return_inverse=True)


def _sparse(arrays: dict[str, np.ndarray], prefix: str, path: Path) -> np.ndarray:
    from scipy import sparse

    try:
        data, indices, pointers, shape = (arrays[f"{prefix}_{part}"] for part in ("data", "indices", "indptr", "shape"))
        matrix = sparse.csr_array((data, indices, pointers), shape=tuple(shape))
        matrix.check_format()
        return matrix.toarray()
    except KeyError as error:
        raise ExperimentError(f"{path} has no array {error}; it has {', '.join(sorted(arrays))}") from None
    except (ValueError, TypeError, IndexError) as error:
        raise ExperimentError(f"{path}: {prefix}_data, _indices, _indptr and _shape are no sparse matrix: {error}") from None


def _mask(values: np.ndarray, name: str, nodes: int, path: Path) -> Bool[np.ndarray, " nodes"]:
    if values.dtype != bool or len(values) != nodes:
        raise ExperimentError(f"{path}: {name} is {values.dtype} {values.shape}; allowed are truth values ({nodes},)")
    return values


def _undirected(edges: np.ndarray, nodes: int) -> Int[np.ndarray, "edges 2"]:
    ordered = np.sort(np.asarray(edges, np.int64).reshape(-1, 2), axis=1)
    codes = np.unique(ordered[ordered[:, 0] != ordered[:, 1]] @ np.array([nodes, 1]))
    return np.stack([codes // nodes, codes % nodes], axis=1)


def _split(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The usual split of semi-supervised node classification: a few of each class to train on, many of the others to test."""
    rng = np.random.default_rng(seed)
    train = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        train[members[: min(LABELLED, max(1, len(members) // 2))]] = True
    test = np.zeros(len(labels), bool)
    test[rng.permutation(np.flatnonzero(~train))[:TESTED]] = True
    return train, test
