"""Names of videos: a path, a file name, or a name without an ending. A dot may stand anywhere in them."""

from __future__ import annotations

import os
import re
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from video_opd.convert.formats.format import Unusable
from video_opd.convert.formats.values import shown

# Only these are endings. QVHighlights' bP5KfdFJzC4_660.0_810.0 has none.
_ENDING = re.compile(
    r"\.(?:3gp|asf|avi|divx|dv|f4v|flv|gif|h26[45]|hevc|m2ts|m[24]v|mj2|mkv|mov|mp4|mpe?g|mts|mxf|og[gmv]|qt"
    r"|rm|rmvb|ts|vob|webm|wmv|y4m)",
    re.I,
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # two letters at least: "C:" is a drive


def video_path(name: str) -> str:
    """``name`` as a POSIX path. Raises Unusable if it names no file.

    A backslash separates folders, ``~/`` is the home folder, and a URL stands for its path.
    """
    text = name.strip()
    if not text or "\0" in text:
        raise Unusable("no video", shown(name))
    if _URL.match(text):
        return _url_path(text)
    if text.startswith("~/"):
        text = os.path.expanduser(text)
    path = PurePosixPath(text.replace("\\", "/"))
    if not path.name:
        raise Unusable("no video", shown(name))
    return path.as_posix()


def _url_path(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:  # brackets that hold no address
        raise Unusable("no video", shown(url)) from None
    path = unquote(parts.path)
    if not PurePosixPath(path).name or "\0" in path or (parts.query and not ending_of(path)):
        raise Unusable("no video", f"{shown(url)} names no file")
    return path if parts.scheme.lower() == "file" else path.lstrip("/")


def ending_of(path: str) -> str:
    """The ending of a video file, dot included; "" if there is none."""
    suffix = PurePosixPath(path).suffix
    return suffix if _ENDING.fullmatch(suffix) else ""


def stem_of(path: str) -> str:
    """The file name without its ending."""
    return PurePosixPath(path).name.removesuffix(ending_of(path))


def bare_name(path: str) -> str:
    """The file name without all of its endings: ``abc`` for ``v/abc.mov.mp4``."""
    name = PurePosixPath(path).name
    while ending := ending_of(name):
        name = name.removesuffix(ending)
    return name
