"""Public formats of annotations, by name. docs/data.md describes each."""

from __future__ import annotations

import difflib

from video_opd.convert.formats.captions import ACTIVITYNET, CHARADES
from video_opd.convert.formats.didemo import DIDEMO
from video_opd.convert.formats.format import Format
from video_opd.convert.formats.hirest import MOMENTS, STEPS
from video_opd.convert.formats.interlink import INTERLINK
from video_opd.convert.formats.own import OWN
from video_opd.convert.formats.queryd import QUERYD
from video_opd.convert.formats.qvhighlights import QVHIGHLIGHTS
from video_opd.convert.formats.sources import Source
from video_opd.convert.formats.time_r1 import TRAINING, TVGBENCH
from video_opd.convert.formats.timelens import BENCH, HUNDRED_K
from video_opd.convert.formats.video_opd_dataset import VIDEO_OPD_DATASET
from video_opd.convert.formats.videomind import VIDEOMIND
from video_opd.convert.formats.vtimellm import VTIMELLM
from video_opd.errors import UserError

__all__ = ["FORMATS", "get_format", "recognise"]

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        BENCH,
        HUNDRED_K,
        TRAINING,
        TVGBENCH,
        CHARADES,
        ACTIVITYNET,
        QVHIGHLIGHTS,
        DIDEMO,
        MOMENTS,
        STEPS,
        QUERYD,
        VTIMELLM,
        INTERLINK,
        VIDEOMIND,
        VIDEO_OPD_DATASET,
        OWN,
    )
}


def get_format(name: str) -> Format:
    """A format by name. Raises UserError for an unknown one."""
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name, FORMATS, 1, 0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"unknown format {name!r}; {hint}video-opd data convert --list-formats names them all")


def recognise(source: Source) -> Format:
    """The one format that the first entries match. Raises UserError for none and for several."""
    head = source.head()
    if not head:
        raise UserError(f"{source.path}: is empty; there is nothing to convert")
    found = [format for format in FORMATS.values() if source.kind in format.kinds and format.matches(head)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(
            f"{source.path}: looks like none of the known formats ({', '.join(FORMATS)}); "
            "name one: video-opd data convert FORMAT INPUT"
        )
    names = " and ".join(format.name for format in found)
    raise UserError(
        f"{source.path}: looks like {names}; say which: video-opd data convert {found[0].name} INPUT …"
    )
