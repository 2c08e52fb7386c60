"""Data: what packages ship, the user's folders and graph files, and one clear line for each mistake."""

import numpy as np
import pytest
from PIL import Image

from experiments.lab import data, graphs
from experiments.lab.experiment import ExperimentError


def test_digits_are_all_there():
    digits = data.digits()
    assert digits.features.shape == (1797, 64)
    assert digits.features.dtype == np.float32
    assert (digits.features.min(), digits.features.max()) == (0, 1)
    assert set(digits.labels) == set(range(10))


def test_faces_are_balanced_photographs():
    faces = data.faces()
    assert faces.features.shape == (200, 625)
    assert np.bincount(faces.labels).tolist() == [100, 100]
    assert 0 <= faces.features.min() < faces.features.max() <= 1


def test_held_out_takes_the_same_share_of_every_class():
    labels = np.repeat([0, 1, 2], [8, 40, 100])
    out = data.held_out(labels, 0.25, seed=3)
    assert np.bincount(labels[out]).tolist() == [2, 10, 25]
    assert (out == data.held_out(labels, 0.25, seed=3)).all()
    with pytest.raises(ValueError, match="of the 8 samples of class 0, 0 would be held out"):
        data.held_out(labels, 0.01)


def test_the_stand_in_needs_no_package_and_can_be_learnt():
    samples = data.synthetic(classes=3)
    centres = np.stack([samples.features[samples.labels == label].mean(0) for label in range(3)])
    nearest = np.argmin(((samples.features[:, None] - centres) ** 2).sum(-1), axis=1)
    assert (nearest == samples.labels).mean() > 0.9


@pytest.fixture
def folders(tmp_path):
    for name, colour in (("cats", (255, 0, 0)), ("dogs", (0, 0, 255))):
        (tmp_path / name).mkdir()
        for number, size in enumerate(((300, 200), (20, 30), (150, 150))):
            Image.new("RGB", size, colour).save(tmp_path / name / f"{number}.png")
        (tmp_path / name / "notes.txt").write_text("no image")
    Image.new("L", (10, 10), 255).save(tmp_path / "cats" / "grey.jpg")
    return tmp_path / "cats", tmp_path / "dogs"


def test_folders_of_any_images_become_150x150_in_three_colours(folders):
    samples = data.folders(*folders, most=10)
    assert samples.features.shape == (7, 67500)
    assert samples.classes == ("cats", "dogs")
    assert samples.labels.tolist() == [0] * 4 + [1] * 3
    assert samples.features[-1].reshape(data.PHOTOGRAPH)[75, 75].tolist() == [0, 0, 1]
    assert np.bincount(data.folders(*folders, most=2).labels).tolist() == [2, 2]


def test_bad_folders_are_one_clear_line(folders, tmp_path):
    cats, dogs = folders
    empty = tmp_path / "empty"
    empty.mkdir()
    for first, second, words in (
        (tmp_path / "birds", dogs, "there is no folder .*birds"),
        (cats / "0.png", dogs, "0.png is not a folder"),
        (cats, empty, "has 0 images; 2 or more are needed"),
        (cats, cats, "both classes are the folder"),
    ):
        with pytest.raises(ExperimentError, match=words) as caught:
            data.folders(first, second, most=5)
        assert "\n" not in str(caught.value)
    with pytest.raises(ExperimentError, match="a class is 1; give 2 or more"):
        data.folders(cats, dogs, most=1)
    (dogs / "broken.png").write_bytes((dogs / "0.png").read_bytes()[:40])
    with pytest.raises(ExperimentError, match=r"broken.png cannot be read"):
        data.folders(cats, dogs, most=5)


def test_shipped_graphs_have_their_known_sizes():
    karate = graphs.karate_club()
    assert (karate.features.shape, len(karate.edges), karate.train.sum()) == ((34, 34), 78, 2)
    near = graphs.digits_neighbours()
    degrees = np.bincount(near.edges.ravel())
    assert len(near.labels) == 1797
    assert degrees.min() >= 10
    assert near.train.sum() == 200
    blocks = graphs.citations()
    assert blocks.features.shape == (2708, 1433)
    assert np.bincount(blocks.labels).tolist() == list(graphs.CORA_CLASSES)
    assert ((blocks.features > 0).sum(1) == graphs.CORA_WORDS_A_PAPER).all()
    # Binomial counts: 5278 links give or take 73, 81 % of them within a class give or take .54 %; six deviations.
    assert abs(len(blocks.edges) - graphs.CORA_LINKS) < 6 * 73
    assert abs((blocks.labels[blocks.edges[:, 0]] == blocks.labels[blocks.edges[:, 1]]).mean() - graphs.CORA_HOMOPHILY) < 0.033


def test_normalized_adjacency_is_the_definition():
    graph = graphs.synthetic(nodes=12)
    dense = np.eye(12)
    dense[tuple(graph.edges.T)] = dense[tuple(graph.edges.T[::-1])] = 1
    root = np.diag(dense.sum(1) ** -0.5)
    np.testing.assert_allclose(graph.normalized_adjacency().toarray(), root @ dense @ root, rtol=1e-12)


GRAPH = {"edges": np.array([[0, 1], [1, 0], [2, 2], [3, 1]]), "features": np.eye(4), "labels": np.array([5, 5, 9, 9])}


def test_a_graph_file_is_read_and_tidied(tmp_path):
    np.savez(tmp_path / "mine.npz", **GRAPH)
    graph = graphs.load(tmp_path / "mine.npz")
    assert graph.name == "mine"
    assert graph.edges.tolist() == [[0, 1], [1, 3]]  # once each, without the loop
    assert graph.labels.tolist() == [0, 0, 1, 1]
    assert not (graph.train & graph.test).any()


def test_labels_may_be_strings_and_edges_lie_either_way(tmp_path):
    labels = np.array(["theory", "theory", "vision", "vision"])
    edges = np.array([[0, 1, 3], [1, 0, 1]])
    np.savez(tmp_path / "mine.npz", edges=edges, features=GRAPH["features"], labels=labels)
    np.savez(
        tmp_path / "geometric.npz", edge_index=edges, x=GRAPH["features"], y=GRAPH["labels"], train_mask=labels == "theory"
    )
    for name in ("mine", "geometric"):
        graph = graphs.load(tmp_path / f"{name}.npz")
        assert graph.edges.tolist() == [[0, 1], [1, 3]]
        assert graph.labels.tolist() == [0, 0, 1, 1]
    assert graph.train.tolist() == [True, True, False, False]


def test_the_benchmark_format_is_read(tmp_path):
    from scipy import sparse

    arrays = {"labels": GRAPH["labels"]}
    for prefix, matrix in (("adj", sparse.csr_array(np.eye(4, k=1))), ("attr", sparse.csr_array(np.eye(4)))):
        arrays |= {f"{prefix}_{part}": getattr(matrix, part) for part in ("data", "indices", "indptr", "shape")}
    np.savez(tmp_path / "cora.npz", **arrays)
    assert graphs.load(tmp_path / "cora.npz").edges.tolist() == [[0, 1], [1, 2], [2, 3]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"edges": None, "A": np.eye(4)}, r"no array 'edges' \(nor 'edge_index'\); it has A, features, labels; .*--help"),
        ({"edges": np.array([[0, 4]])}, "edges names nodes 0 to 4; allowed are 0 to 3"),
        ({"edges": np.array([[0.0, 1.0]])}, "allowed are integers"),
        ({"features": np.eye(3)}, "allowed is one row for each of the 4 labels"),
        ({"features": np.full((4, 2), np.nan)}, "must be finite"),
        ({"labels": np.array([0, 0, 0, 0])}, "has one class only"),
        ({"labels": np.array([0, 0, -1, 0])}, "allowed are integers from 0"),
        ({"labels": np.array([[0, 1]])}, r"labels has shape \(1, 2\)"),
        ({"train": np.array([1, 0, 0, 0])}, "allowed are truth values"),
        ({"train": np.ones(4, bool)}, "must each name a node"),
        ({"labels": np.array([0.0, 1.0, 0.0, 1.0])}, "labels are float64; allowed are integers from 0, and strings"),
        (
            {"labels": np.array(["a", "b", "a", "b"], object)},
            r"labels is an array of Python objects.*np.array\(labels, dtype=str\)",
        ),
        ({"edges": np.zeros((3, 3), int)}, r"edges has shape \(3, 3\); allowed are \(edges, 2\) and \(2, edges\)"),
        ({"test": np.ones(4, bool)}, "has an array 'test' and none called 'train'"),
    ],
)
def test_a_bad_graph_file_is_one_clear_line(tmp_path, change, words):
    arrays = {name: array for name, array in (GRAPH | change).items() if array is not None}
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ExperimentError, match=words) as caught:
        graphs.load(tmp_path / "bad.npz")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_graph_is_one_clear_line(tmp_path):
    with pytest.raises(ExperimentError, match="there is no file"):
        graphs.load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ExperimentError, match=r"cannot be read as a \.npz file"):
        graphs.load(tmp_path / "text.npz")
