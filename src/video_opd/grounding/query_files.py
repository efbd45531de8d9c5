"""Files of queries about one video: plain lines, or JSON Lines. Standard library only."""

from __future__ import annotations

from pathlib import Path

from video_opd.errors import UserError
from video_opd.jsonl import read_jsonl
from video_opd.progress import log


def read_queries(path: str | Path, video: str | Path) -> list[str]:
    """The queries of a file: one a line, or, where its first character is ``{``, rows with a ``"query"``.

    Rows that name another video are left out, with a word about it, so that a data file serves too: a
    ``"video"`` is this one if its file name is. Raises UserError for a file without a query for the video.
    """
    path, video = Path(path), Path(video)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UserError(f"{path}: cannot be read ({reason}); name a file with a query a line") from None
    if text.lstrip().startswith("{"):
        queries = _of_rows(path, video)
    else:
        queries = [line.strip() for line in text.splitlines() if line.strip()]
    if not queries:
        raise UserError(f"{path}: no query in it for {video.name}; write one a line")
    return queries


def _of_rows(path: Path, video: Path) -> list[str]:
    queries, others = [], 0
    for number, row in read_jsonl(path):
        query, about = row.get("query"), row.get("video")
        if not isinstance(query, str) or not query.strip():
            raise UserError(f'{path}:{number}: a row needs a "query" that is a text and not empty')
        if about is not None and Path(str(about)).name != video.name:
            others += 1
        else:
            queries.append(query)
    if others:
        log(f"{path}: {others} rows about other videos left out")
    return queries
