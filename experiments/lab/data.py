"""Real data that installed packages ship, folders of the user's images, and stand-ins that need no package at all.

Nothing is ever downloaded. Graphs are in `experiments.lab.graphs`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Int32

from experiments.lab.experiment import ExperimentError

PHOTOGRAPH = (150, 150, 3)  # what the images of a folder are resized to: 67,500 features
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, eq=False)
class Samples:
    """Labelled samples.

    Attributes:
      features: in [0, 1], one row a sample.
      labels: of each sample, from 0.
      classes: the names of the classes, in the labels' order.
      shape: of one sample, as a picture.
    """

    features: Float32[np.ndarray, "samples features"]
    labels: Int32[np.ndarray, " samples"]
    classes: tuple[str, ...]
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> "Samples":
        """The samples of some rows (indices, or one truth value a sample)."""
        return Samples(self.features[rows], self.labels[rows], self.classes, self.shape)


def digits() -> Samples:
    """scikit-learn's 1797 handwritten digits, 8x8 grey levels, 10 classes (UCI, Alpaydin and Kaynak 1998)."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    names = tuple(str(digit) for digit in range(10))
    return Samples((pixels / 16).astype(np.float32), labels.astype(np.int32), names, (8, 8))


def faces() -> Samples:
    """scikit-image's 100 photographs of faces (Labeled Faces in the Wild) and 100 of other things, 25x25 grey levels."""
    from skimage.data import lfw_subset

    pictures = lfw_subset()
    return Samples(
        pictures.reshape(len(pictures), -1).astype(np.float32),
        np.repeat(np.arange(2, dtype=np.int32), 100),
        ("face", "no face"),
        pictures.shape[1:],
    )


def prose() -> str:
    """scikit-learn's descriptions of its data sets: 43,000 characters of technical English."""
    from importlib.resources import files

    folder = files("sklearn.datasets") / "descr"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".rst"))
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


def folders(first: Path, second: Path, *, most: int, seed: int = 0) -> Samples:
    """Two folders of images, one a class, each image resized to 150x150 in three colours.

    Args:
      first: the folder of class 0; its images lie in it directly.
      second: the folder of class 1.
      most: how many images to take of each, drawn at random where there are more.
      seed: of that draw.

    Raises:
      ExperimentError: a folder is missing, or has fewer than two images; a file cannot be read; the two are one folder.
    """
    first, second = Path(first), Path(second)
    if most < 2:
        raise ExperimentError(f"the number of images a class is {most}; give 2 or more")
    files = [_images(folder) for folder in (first, second)]
    if first.resolve() == second.resolve():
        raise ExperimentError(f"both classes are the folder {first}; give two folders")
    rng = np.random.default_rng(seed)
    drawn = [[paths[index] for index in sorted(rng.permutation(len(paths))[:most])] for paths in files]
    pixels = [np.stack([_pixels(path) for path in paths]) for paths in drawn]
    return Samples(
        np.concatenate(pixels),
        np.repeat(np.arange(2, dtype=np.int32), [len(paths) for paths in drawn]),
        (first.name, second.name) if first.name != second.name else (str(first), str(second)),
        PHOTOGRAPH,
    )


def synthetic(key: int = 0, *, samples: int = 60, shape: Sequence[int] = (5, 5), classes: int = 2) -> Samples:
    """A stand-in that needs no package: each class a smooth pattern, each sample that pattern with noise, in [0, 1]."""
    rng = np.random.default_rng(key)
    features = int(np.prod(shape))
    phase = np.linspace(0, np.pi, features)
    patterns = np.stack([np.sin((label + 1) * phase) for label in range(classes)])
    labels = np.arange(samples, dtype=np.int32) % classes
    values = 0.5 + 0.25 * patterns[labels] + 0.08 * rng.standard_normal((samples, features))
    names = tuple(f"pattern {label + 1}" for label in range(classes))
    return Samples(values.clip(0, 1).astype(np.float32), labels, names, tuple(shape))


def held_out(labels: Int32[np.ndarray, " samples"], share: float, seed: int = 0) -> Bool[np.ndarray, " samples"]:
    """Which samples to hold out: the same share of every class, drawn at random.

    Raises:
      ValueError: a class would have no sample on one side.
    """
    rng = np.random.default_rng(seed)
    out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = round(share * len(members))
        if not 0 < count < len(members):
            raise ValueError(f"share is {share}: of the {len(members)} samples of class {label}, {count} would be held out")
        out[rng.permutation(members)[:count]] = True
    return out


def _images(folder: Path) -> list[Path]:
    try:
        names = sorted(folder.iterdir())
    except FileNotFoundError:
        raise ExperimentError(f"there is no folder {folder}") from None
    except NotADirectoryError:
        raise ExperimentError(f"{folder} is not a folder; give a folder of images") from None
    except OSError as error:
        raise ExperimentError(f"the folder {folder} cannot be read: {error.strerror}") from None
    images = [path for path in names if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()]
    if len(images) < 2:
        raise ExperimentError(
            f"the folder {folder} has {len(images)} images; 2 or more are needed ({', '.join(s[1:] for s in SUFFIXES)})"
        )
    return images


def _pixels(path: Path) -> Float32[np.ndarray, " features"]:
    from PIL import Image

    height, width, _ = PHOTOGRAPH
    try:
        with Image.open(path) as image:
            small = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise ExperimentError(f"the image {path} cannot be read: {reason}") from None
    return np.asarray(small, np.float32).ravel() / np.float32(255)
