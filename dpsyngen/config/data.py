"""The private images, as they are declared."""

from dataclasses import dataclass
from math import prod
from typing import Literal

from dpsyngen.config.checks import require

SOURCES_ON_DISK = ("folder", "zip", "webdataset", "npy")
"""Values of data.source that may stay on disk; none of them brings test images."""
SOURCES_WITH_PATH = (*SOURCES_ON_DISK, "npz", "cifar10")
"""Values of data.source that need data.path."""
AUTO_IN_MEMORY_BYTES = 2**31
"""The most that data.in_memory auto reads into memory."""


@dataclass(frozen=True)
class DataConfig:
    """The private images. What is declared here is public: the size, the classes and the image shape."""

    source: Literal["mnist", "fashion_mnist", "cifar10", "folder", "zip", "webdataset", "npz", "npy"] = "mnist"
    """mnist is embedded; fashion_mnist is found or downloaded; cifar10 is its binary version; folder and zip have one subfolder per class;
    webdataset is .tar files with an image and a .cls per sample; npz has images, labels; npy is a folder with images.npy and labels.npy,
    which stay on disk."""
    path: str | None = None
    """The folder, .zip or .npz file; .tar files as name-{000..123}.tar, or their folder; cifar-10-binary.tar.gz or what is in it; for
    fashion_mnist a folder with the four idx files, when they are not in the usual place."""
    test_path: str | None = None
    """Real images that evaluation may use, in the same form as path. mnist, fashion_mnist, cifar10 and medmnist files bring theirs."""
    in_memory: Literal["auto", "always", "never"] = "auto"
    """Whether folder, zip, webdataset and npy are read once, or again from disk for every batch; auto reads them once if they are not npy and
    take at most 2 GiB as uint8. Images and order are the same. The other sources are always in memory."""
    index: str | None = None
    """A folder that keeps the index of a zip or webdataset source, so that it is built once and not at each start. It holds labels and
    places of private images: never publish it. null builds it in the system's folder for temporary files."""
    image_size: int = 28
    """Height and width in pixels; images of another size are resized."""
    channels: Literal[1, 3] = 1
    """1 for grayscale, 3 for RGB; images are converted."""
    num_classes: int = 10
    """How many classes there are; 0 for images without labels."""
    class_names: tuple[str, ...] | None = None
    """The class subfolders in the order of their labels; null takes their sorted names from the data, with a caveat."""
    expected_size: int | None = 60000
    """The public number of training images, which normalises and sets q; null counts them, with a caveat."""
    held_out: int = 0
    """How many of the last training images are kept out of training, for choosing settings."""
    public: bool = False
    """Declare the images public, so that metrics against them may enter the release."""
    description: str = ""
    """What the images are, in your words, for the model card."""

    def __post_init__(self) -> None:
        require(self.image_size >= 8 and self.image_size % 4 == 0, "data.image_size", "a multiple of 4, at least 8", self.image_size)
        require(self.num_classes >= 0, "data.num_classes", "an integer >= 0", self.num_classes)
        require(self.expected_size is None or self.expected_size > 0, "data.expected_size", "an integer > 0 or null", self.expected_size)
        require(self.held_out >= 0, "data.held_out", "an integer >= 0", self.held_out)
        if self.source in SOURCES_WITH_PATH:
            require(self.path is not None, "data.path", f"a path, since data.source is {self.source}", self.path)
        if self.class_names is not None:
            require(len(self.class_names) == self.num_classes, "data.class_names", f"{self.num_classes} names (data.num_classes)", self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.channels, self.image_size, self.image_size)

    def held_in_memory(self, count: int) -> bool:
        """Whether `count` images are read once, rather than again for every batch."""
        if self.source not in SOURCES_ON_DISK or self.in_memory == "always":
            return True
        return self.in_memory == "auto" and self.source != "npy" and count * prod(self.image_shape) <= AUTO_IN_MEMORY_BYTES
