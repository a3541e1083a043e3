"""Images and labels of every experiment: `load("fashion_mnist")`.

Nothing is ever downloaded. `digits` comes with scikit-learn; `mnist` and
`fashion_mnist` are read from a folder of idx files, or, as `cifar10` and `imagenet`,
from a copy that tensorflow-datasets has prepared. What is not there fails at once and
says what to do.
"""

import gzip
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

IDX_FOLDERS = {  # where Debian's package and others put them
    "mnist": ("data/mnist", "/usr/share/datasets/mnist"),
    "fashion_mnist": ("data/fashion_mnist", "/usr/share/datasets/fashion-mnist"),
}
STATISTICS = {  # mean and standard deviation of the channels of images / 255
    "digits": ((0.0,), (16 / 255,)),  # grey values are 0 to 16 there
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class Arrays:
    """Images [n, height, width, channels] and labels [n] in memory."""

    images: np.ndarray  # uint8
    labels: np.ndarray  # int32

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    @property
    def fingerprint(self) -> str:
        """Return a checksum of the images, wherever they lie."""
        return f"{zlib.crc32(np.ascontiguousarray(self.images)):08x}"

    def read(self, rows: np.ndarray, seed: int = 0):
        """Return images and labels of these rows; nothing here depends on the seed."""
        del seed
        return self.images[rows], self.labels[rows]


class Data(NamedTuple):
    """Training and test set, and how to normalise and augment them."""

    train: Any  # Arrays, or a Stream: anything with len(...) and read(rows, seed)
    test: Any
    mean: tuple[float, ...]  # of the channels, for images / 255
    std: tuple[float, ...]
    augmented: bool  # whether batches are shifted and mirrored at random
    source: str = "made up"  # the folder they were read from


def load(name: str, folder: str | Path | None = None, validate: bool = False) -> Data:
    """Load a data set, into memory but for `imagenet`, which is read batch by batch.

    Args:
        name: one of `STATISTICS`.
        folder: where idx files, or prepared data sets of tensorflow-datasets, lie; the
            idx files in a subfolder of the data set's name, or directly. By default
            that of the environment variable `GSM_DATA`, and the usual places.
        validate: whether to train on the first five sixths of the training set and to
            test on the rest of it. Settings are to be chosen that way.

    Raises:
        ValueError: for an unknown name.
        FileNotFoundError: if the data are not there; the message says what to do.
        ImportError: if the data are there, and tensorflow-datasets is not.
    """
    if name not in STATISTICS:
        known = ", ".join(STATISTICS)
        raise ValueError(f"data {name!r} is unknown; there are {known}.")
    if name == "digits":
        train, test, source = digits()
    else:
        train, test, source = from_idx(name, folder) or from_tfds(name, folder)
    if validate:
        if not isinstance(train, Arrays):
            raise ValueError("a validation set is split off only from data in memory.")
        rows, cut = np.arange(len(train)), len(train) * 5 // 6
        train, test = (Arrays(*train.read(part)) for part in (rows[:cut], rows[cut:]))
    return Data(train, test, *STATISTICS[name], name == "cifar10", source)


def digits() -> tuple[Arrays, Arrays, str]:
    """Return scikit-learn's 1,797 digits: 1,437 to train on, 360 to test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = labels.astype(np.int32)
    how = {"test_size": 360, "random_state": 0, "stratify": labels}
    x, test_x, y, test_y = train_test_split(images, labels, **how)
    return Arrays(x, y), Arrays(test_x, test_y), "scikit-learn"


def from_idx(name: str, folder: str | Path | None):
    """Return training set, test set and folder of idx files; None if there are none."""
    kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
    for place in idx_folders(name, folder):
        paths = [
            find(place, f"{x}-{kind}") for x in ("train", "t10k") for kind in kinds
        ]
        if all(paths):
            x, y, test_x, test_y = map(read_idx, paths)
            train = Arrays(x[..., None], y.astype(np.int32))
            return train, Arrays(test_x[..., None], test_y.astype(np.int32)), str(place)
    return None


def idx_folders(name: str, folder: str | Path | None) -> list[Path]:
    """Where to look for idx files: in the folder that was named, and nowhere else."""
    if name not in IDX_FOLDERS:
        return []
    named = folder or os.environ.get("GSM_DATA")
    own = [Path(named) / name, Path(named)] if named else []
    return own if folder else [*own, *map(Path, IDX_FOLDERS[name])]


def tfds_folders(folder: str | Path | None) -> list[Path]:
    """Where to look for prepared data sets, in the same way."""
    if folder:
        return [Path(folder).expanduser()]
    named = [os.environ.get("GSM_DATA"), os.environ.get("TFDS_DATA_DIR")]
    usual = [*filter(None, named), "~/tensorflow_datasets"]
    return [Path(place).expanduser() for place in usual]


def find(folder: Path, name: str) -> Path | None:
    """Return the file in either of its usual spellings, compressed or not."""
    names = (name, name.replace("-idx", ".idx"))
    paths = (folder / (base + end) for base in names for end in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def read_idx(path: Path) -> np.ndarray:
    """Read an idx file of unsigned bytes, compressed if its name ends in .gz."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    # Two zeros, 8 for unsigned bytes, the rank, every size as a big-endian uint32.
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise ValueError(f"{path} is not an idx file of unsigned bytes.")
    shape = tuple(np.frombuffer(content, ">u4", content[3], 4).tolist())
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape))
    if values.size != np.prod(shape):
        raise ValueError(f"{path} has {values.size} bytes, its header says {shape}.")
    return values.reshape(shape)


def from_tfds(name: str, folder: str | Path | None):
    """Return training set, test set and folder of what tensorflow-datasets prepared."""
    imagenet = name == "imagenet"
    builder = "imagenet2012" if imagenet else name
    # tensorflow-datasets itself would try to download for minutes: look first.
    prepared = lambda place: any((place / builder).glob("*/*.array_record*"))
    place = next(filter(prepared, tfds_folders(folder)), None)
    if place is None:
        raise FileNotFoundError(what_to_do(name, builder, folder))
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"{name} lies in {place}, but {error.name} is not installed: "
            "pip install tensorflow-datasets array_record"
        ) from error
    train, test = (
        tfds.data_source(builder, split=split, data_dir=place, download=False)
        for split in ("train", "validation" if imagenet else "test")
    )
    if imagenet:
        return Stream(train, random=True), Stream(test, random=False), str(place)
    return read_whole(train), read_whole(test), str(place)


def read_whole(source: Sequence[Any]) -> Arrays:
    """Read all records into memory."""
    records = [source[i] for i in range(len(source))]
    labels = np.array([record["label"] for record in records], np.int32)
    return Arrays(np.stack([record["image"] for record in records]), labels)


def what_to_do(name: str, builder: str, folder: str | Path | None) -> str:
    """Explain how to get a data set."""
    places = tfds_folders(folder)
    looked = ", ".join(str(place / builder) for place in places)
    lines = [f"{name} is not on this machine, and nothing is downloaded from here."]
    if name in IDX_FOLDERS:
        lines.append(
            "Either put its four idx files (compressed or not) into a folder and name "
            "it with --data or GSM_DATA; looked in: "
            f"{', '.join(map(str, idx_folders(name, folder)))}."
        )
    if name == "fashion_mnist":
        lines.append("Debian and Ubuntu: apt install dataset-fashion-mnist.")
    lines.append(
        "With tensorflow and tensorflow-datasets installed and a network, prepare it "
        f"once (looked in: {looked}):\n"
        '    python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{builder}', data_dir='{places[0]}', "
        "file_format='array_record').download_and_prepare()\""
    )
    if name == "imagenet":
        lines.append(
            f"ImageNet's two archives have to be in {places[0] / 'downloads/manual'} "
            "before; they need an account at image-net.org."
        )
    return "\n".join(lines)


class Stream:
    """Images that stay on disk, and are decoded and cropped as they are read."""

    def __init__(self, source: Sequence[Any], random: bool, size: int = 224):
        """Read from a sequence of records; crop and mirror at random for training."""
        self.source, self.random, self.size = source, random, size
        self.pool = ThreadPoolExecutor()  # decoding and resizing release the GIL
        self.fingerprint = f"{len(source)} images"  # there are too many to read them

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.source)

    def read(self, rows: np.ndarray, seed: int = 0):
        """Return images [rows, size, size, 3] and labels; crops depend on the seed."""
        pairs = self.pool.map(partial(self._one, seed), rows)
        images, labels = zip(*pairs, strict=True)
        return np.stack(images), np.array(labels, np.int32)

    def _one(self, seed: int, row: int):
        record = self.source[int(row)]
        rng = np.random.default_rng((seed, int(row))) if self.random else None
        return crop(record["image"], self.size, rng), record["label"]


def crop(image: np.ndarray, size: int, rng: np.random.Generator | None) -> np.ndarray:
    """Crop an image [height, width, 3] and resize it to [size, size, 3].

    At random, if there is a generator, and mirrored half of the time; else the central
    224 of the shorter side resized to 256.
    """
    from PIL import Image

    height, width = image.shape[:2]
    wide = high = min(height, width) * 224 / 256
    left, top = (width - wide) / 2, (height - high) / 2
    for _ in range(10 if rng else 0):
        # 8 to 100 % of the area at an aspect ratio of 3/4 to 4/3, as usual.
        area = height * width * rng.uniform(0.08, 1)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        some_wide, some_high = np.sqrt(area * aspect), np.sqrt(area / aspect)
        if some_wide <= width and some_high <= height:
            wide, high = some_wide, some_high
            left, top = rng.uniform(0, width - wide), rng.uniform(0, height - high)
            break
    box, bilinear = (left, top, left + wide, top + high), Image.Resampling.BILINEAR
    resized = np.asarray(Image.fromarray(image).resize((size, size), bilinear, box))
    return resized[:, ::-1] if rng is not None and rng.random() < 0.5 else resized
