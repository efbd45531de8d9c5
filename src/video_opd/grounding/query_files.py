"""Reads files of queries about one video: plain lines, or JSON Lines. Uses the standard library only."""

from __future__ import annotations

import json
from pathlib import Path

from video_opd.errors import UserError
from video_opd.jsonl import read_jsonl
from video_opd.progress import log


def read_queries(path: str | Path, video: str | Path) -> list[str]:
    """Reads one query a line, or rows with a ``"query"`` if the first character of the file is ``{``.

    A data file will do: rows about another video are left out, and a message counts them. A row is about this
    video if it names no ``"video"``, or one with the same file name. Raises :class:`UserError` if the file
    holds no query for the video, and for a JSON list, whose lines are no queries.
    """
    path, video = Path(path), Path(video)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UserError(f"{path}: cannot be read ({reason}); name a file with a query a line") from None
    if text.lstrip().startswith("{"):
        queries = _queries_of_rows(path, video)
    elif _is_json_list(text):
        raise UserError(
            f'{path}: a JSON list; write one query a line, or JSON Lines: {{"query": "…"}} a line'
        )
    else:  # str.splitlines would also divide a query at a form feed or at U+2028
        queries = [line.strip() for line in text.split("\n") if line.strip()]
    if not queries:
        raise UserError(f"{path}: no query in it for {video.name}; write one a line")
    return queries


def _is_json_list(text: str) -> bool:
    if not text.lstrip().startswith("["):
        return False
    try:
        return isinstance(json.loads(text), list)
    except (ValueError, RecursionError):
        return False


def _queries_of_rows(path: Path, video: Path) -> list[str]:
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
