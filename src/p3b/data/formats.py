"""Which files are images: all that the installed Pillow decodes, with its plugins."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import PurePath

from PIL import Image

PLUGINS = {
    "pillow_heif": (".heic", ".heif", ".hif", ".heics", ".heifs"),
    "pillow_jxl": (".jxl",),
    "pillow_avif": (".avif",),
    "pillow_jpls": (".jls",),
}
"""Packages that teach Pillow formats, and the endings that ask for them."""
PACKAGES = {"pillow_heif": "pillow-heif", "pillow_jxl": "pillow-jxl-plugin", "pillow_avif": "pillow-avif-plugin"}
"""What to install, where that has another name."""

_COMMON = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"))
"""Known without loading all of Pillow's plugins, which takes a tenth of a second."""
_ONLY_IDENTIFIED = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF")
"""Formats that Pillow tells by name and cannot decode."""
_RELIABLE = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "AVIF", "JPEG2000", "BMP", "HEIF", "JXL", "QOI", "PSD")
"""Formats whose first bytes are telling enough to trust in a file of another name."""


def ending_of(name: str) -> str:
    """The ending of a file name in lower case, with its dot; "" where there is none."""
    return PurePath(name).suffix.lower()


def has_image_ending(ending: str) -> bool:
    """Whether files of this ending (with its dot, in lower case) are images that can be decoded here."""
    return ending in _COMMON or ending in _decoded_endings()


def begins_like_an_image(first: bytes) -> bool:
    """Whether the first 16 bytes of a file are those of an image format that can be decoded here."""
    _decoded_endings()
    for name in _RELIABLE:
        accepts = Image.OPEN[name][1] if name in Image.OPEN else None
        if accepts is not None and accepts(first) is True:
            return name != "BMP" or first[6:10] == bytes(4)  # "BM" alone may begin a text
    return False


def missing_plugin(ending: str) -> str | None:
    """The package that would decode files of this ending, where it is not installed."""
    if has_image_ending(ending):
        return None
    package = next((package for package, endings in PLUGINS.items() if ending in endings), None)
    return None if package is None else PACKAGES.get(package, package)


@functools.cache
def load_plugins() -> None:
    """Let Pillow decode what installed plugins know. Each process needs it once."""
    for package in PLUGINS:
        if importlib.util.find_spec(package) is not None:
            module = importlib.import_module(package)
            if package == "pillow_heif":  # the others register themselves when they are imported
                module.register_heif_opener()


@functools.cache
def _decoded_endings() -> frozenset[str]:
    load_plugins()
    known = Image.registered_extensions()
    return frozenset(
        ending
        for ending, name in known.items()
        if (name in Image.OPEN or name == "MPO") and name not in _ONLY_IDENTIFIED  # MPO is opened as JPEG
    )
