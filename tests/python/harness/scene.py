"""The usual scene: one chain of images, every layer a named node, one export."""

import dataclasses
import pathlib

from . import images
from .daemon import blockdev, export

# So slow that a job started with it is still running when the test looks, and
# would be for minutes: nothing here depends on how fast the machine is.
SLOW = 64 * images.KIB


@dataclasses.dataclass
class Scene:
    """`layers[i]` is served as node `n<i>`, the top one by the export `drive0`."""

    folder: pathlib.Path
    layers: list
    seen: pathlib.Path  # what a guest sees, raw
    words: list

    @property
    def top(self):
        return self.layers[-1]

    @property
    def top_node(self):
        return f"n{len(self.layers) - 1}"

    def backing_of(self, number):
        """Which layer's file a layer's header points at, as a full path."""
        name = images.backing(self.layers[number])
        return name and (self.folder / name).resolve()


def make_scene(
    folder, layers=3, size=8 * images.MIB, seed=0, prefix="", drive="drive0", writable=()
):
    """`writable` tells the layers below the top that may be streamed into."""
    folder = pathlib.Path(folder)
    folder.mkdir(exist_ok=True)
    paths = images.make_chain(folder, layers, size, seed)
    seen = images.flatten(paths[-1], folder / "seen.raw")
    return Scene(folder, paths, seen, serve(paths, folder, prefix, drive, writable))


def serve(paths, folder, prefix="", drive="drive0", writable=()):
    """The daemon's words for a chain, from the bottom to the top."""
    words = []
    for number, path in enumerate(paths):
        backing = f"{prefix}n{number - 1}" if number else None
        options = {} if number in (len(paths) - 1, *writable) else {"read_only": "on"}
        words += blockdev(path, f"{prefix}n{number}", backing=backing, **options)
    words += export(f"{prefix}n{len(paths) - 1}", drive, folder / f"{drive}.sock")
    return words
