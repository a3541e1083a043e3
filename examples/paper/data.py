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
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

STATISTICS = {  # mean and standard deviation of the channels of images / 255
    "digits": ((0.0,), (16 / 255,)),  # grey values are 0 to 16 there
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
BUILDERS = {"imagenet": "imagenet2012"}  # that tensorflow-datasets names otherwise
IDX = "Its four idx files will do in a folder that --data or GSM_DATA names. "
ELSEWHERE = {  # what else to do where the data are not there
    "mnist": IDX,
    "fashion_mnist": f"Debian, Ubuntu: apt install dataset-fashion-mnist. {IDX}",
    "imagenet": "Its two archives, for which image-net.org wants an account, go into "
    "the subfolder downloads/manual before. ",
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
        folder: where idx files, or prepared data sets of tensorflow-datasets, lie: in a
            subfolder of the data set's name, or directly. By default that of the
            environment variable `GSM_DATA`, and the usual places.
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
    train, test, source = digits() if name == "digits" else find(name, folder)
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


def find(name: str, folder: str | Path | None) -> tuple[Any, Any, str]:
    """Return training set, test set and the folder where they were found."""
    named = folder or os.environ.get("GSM_DATA")
    places = [Path(named) / name, Path(named)] if named else []
    if not folder:  # one that is named is the only one
        debian = Path("/usr/share/datasets", name.replace("_", "-"))
        places += [Path("data", name), debian, Path("~/tensorflow_datasets")]
    places = [place.expanduser() for place in places]
    for place in places:
        if found := from_idx(name, place) or from_tfds(name, place):
            return *found, str(place)
    where, prepared = ", ".join(map(str, places)), places[-1]
    raise FileNotFoundError(
        f"{name} is not on this machine, and nothing is downloaded from here; looked "
        f"in {where}. {ELSEWHERE.get(name, '')}With tensorflow and tensorflow-datasets "
        "installed and a network, prepare it once:\n"
        '    python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{BUILDERS.get(name, name)}', data_dir='{prepared}', "
        "file_format='array_record').download_and_prepare()\""
    )


def from_idx(name: str, place: Path) -> tuple[Arrays, Arrays] | None:
    """Return training and test set of MNIST's four files; None if one is missing."""
    if name not in ("mnist", "fashion_mnist"):
        return None
    parts = [f"{x}-{kind}" for x in ("train", "t10k") for kind in ("images", "labels")]
    # Both usual spellings, compressed or not.
    paths = [sorted(place.glob(f"{part}[-.]idx?-ubyte*")) for part in parts]
    if not all(paths):
        return None
    x, y, test_x, test_y = (read_idx(path) for path, *_ in paths)
    train = Arrays(x[..., None], y.astype(np.int32))
    return train, Arrays(test_x[..., None], test_y.astype(np.int32))


def read_idx(path: Path) -> np.ndarray:
    """Read an idx file of unsigned bytes, compressed if its name ends in .gz."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    # Two zeros, 8 for unsigned bytes, the rank, every size as a big-endian uint32.
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an idx file of unsigned bytes.")
    try:
        shape = np.frombuffer(content, ">u4", content[3], 4)
        return np.frombuffer(content, np.uint8, offset=4 + shape.nbytes).reshape(shape)
    except (IndexError, ValueError) as error:
        raise ValueError(f"{path} is cut off, or no idx file: {error}") from None


def from_tfds(name: str, place: Path) -> tuple[Any, Any] | None:
    """Return training and test set that tensorflow-datasets prepared, None if none."""
    builder, imagenet = BUILDERS.get(name, name), name == "imagenet"
    # tensorflow-datasets itself would try to download for minutes: look first.
    if not any((place / builder).glob("*/*.array_record*")):
        return None
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        install = "pip install tensorflow-datasets array_record"
        raise ImportError(f"{name} lies in {place}, but {error}: {install}") from error
    train, test = (
        tfds.data_source(builder, split=split, data_dir=place, download=False)
        for split in ("train", "validation" if imagenet else "test")
    )
    if imagenet:
        return Stream(train, random=True), Stream(test, random=False)
    return read_whole(train), read_whole(test)


def read_whole(source: Sequence[Any]) -> Arrays:
    """Read all records into memory."""
    records = [source[i] for i in range(len(source))]
    labels = np.array([record["label"] for record in records], np.int32)
    return Arrays(np.stack([record["image"] for record in records]), labels)


@dataclass(frozen=True)
class Stream:
    """Images that stay on disk, and are decoded and cropped as they are read."""

    source: Sequence[Any]
    random: bool  # whether to crop and mirror at random, for training
    size: int = 224

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.source)

    @property
    def fingerprint(self) -> str:
        """Return their number: there are too many to read them."""
        return f"{len(self)} images"

    def read(self, rows: np.ndarray, seed: int = 0):
        """Return images [rows, size, size, 3] and labels; crops depend on the seed."""

        def one(row):
            record = self.source[int(row)]
            rng = np.random.default_rng((seed, int(row))) if self.random else None
            return crop(record["image"], self.size, rng), record["label"]

        with ThreadPoolExecutor() as pool:  # decoding and resizing release the GIL
            images, labels = zip(*pool.map(one, rows), strict=True)
        return np.stack(images), np.array(labels, np.int32)


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
