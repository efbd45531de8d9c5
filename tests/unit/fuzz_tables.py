"""Broken annotations of other formats, tables of durations, and files of queries (see ``fuzz_cases.py``)."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from annotation_cases import MINIATURES, converted, write
from fuzz_cases import broken_json, odd_bytes, odd_tree, odd_value, outcome, run_command

from video_opd.grounding.query_files import read_queries

CELLS = (
    "", " ", "\x00", '"', '""', "=1+1", "-1", "nan", "inf", "1e999", "9" * 5000, "0x10", "1_0", "1,5",
    "12:61", "00:00:-1", "1:2:3:4", "v.mp4\n", "../../etc/passwd", "/", "x" * 5000, "\ud800", "[",
    "{}", "[[1, 2]]", '[{"clip": 1}]', '[{"clip": "0:05 - 0:00", "caption": ""}]', '[{"clip": "a - b"}]',
    "null", "[" * 5000,
)  # fmt: skip


def broken_table(rng: random.Random, text: str, delimiter: str) -> bytes:
    """A table with odd cells, or with rows and columns that are missing, repeated or too many."""
    if rng.random() < 0.3:
        return odd_bytes(rng, text)
    rows = list(csv.reader(io.StringIO(text), delimiter=delimiter))
    for _ in range(rng.choice((1, 1, 2, 3))):
        row = rng.choice(rows)
        at = rng.randrange(len(row)) if row else 0
        blow = rng.randrange(8)
        if blow == 0:
            del row[at:]
        elif blow == 1:
            row.insert(at, rng.choice(CELLS))
        elif blow == 2:
            rows.insert(rng.randrange(len(rows) + 1), list(row))
        elif blow == 3 and len(rows) > 1:
            rows.remove(row)
        elif row:
            row[at] = rng.choice(CELLS)
    file = io.StringIO()
    writer = csv.writer(
        file,
        delimiter=rng.choice((delimiter, delimiter, delimiter, ";")),
        quoting=rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)),
    )
    writer.writerows(rows)
    return file.getvalue().encode("utf-8", errors="surrogatepass")


def broken_lines(rng: random.Random, text: str) -> bytes:
    """Lines of ``VID start end##sentence`` with odd words."""
    if rng.random() < 0.3:
        return odd_bytes(rng, text)
    lines = text.splitlines()
    number = rng.randrange(len(lines))
    words = lines[number].split(" ")
    words[rng.randrange(len(words))] = rng.choice(CELLS)
    lines[number] = rng.choice((" ", " ", "\t", "##")).join(words)
    return "\n".join(lines).encode("utf-8", errors="surrogatepass")


def broken_annotations(rng: random.Random, good: Path) -> bytes:
    """The content of a source, with its bytes, its values or its cells broken."""
    suffix, blob = good.suffix, good.read_bytes()
    if suffix == ".pkl":
        from fuzz_cases import mutate

        return mutate(rng, blob)
    text = blob.decode()
    if suffix == ".tsv":
        return broken_table(rng, text, "\t")
    if suffix == ".txt":
        return broken_lines(rng, text)
    if suffix == ".jsonl" and rng.random() < 0.7:
        rows = odd_tree(rng, [json.loads(line) for line in text.splitlines()])
        rows = rows if isinstance(rows, list) else [rows]
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    return broken_json(rng, text) if suffix == ".json" else odd_bytes(rng, text)


def table_case(rng: random.Random, folder: Path) -> str:
    """What is converted reads as a data file, and every entry is a row or is listed (``converted``)."""
    name = rng.choice(sorted(MINIATURES))
    file, content = MINIATURES[name]
    path = write(folder / file, content)
    path.write_bytes(broken_annotations(rng, path))
    return outcome(lambda: converted(path, rng.choice((name, None))))


def durations_case(rng: random.Random, folder: Path) -> str:
    source = write(folder / "charades_sta_test.txt", MINIATURES["charades-sta"][1])
    if rng.random() < 0.5:
        table = folder / "durations.csv"
        table.write_bytes(broken_table(rng, "id,length,subject\nABCDE,30.5,x\nFGHIJ,12,y\n", ","))
    else:
        table = folder / "durations.json"
        known: Any = rng.choice(({"ABCDE": 30.5, "FGHIJ": 12}, [{"vid": "ABCDE", "duration": 30.5}]))
        table.write_bytes(broken_json(rng, json.dumps(known)))
    return run_command(
        "data", "convert", "charades-sta", source, "--durations", table, "--out", folder / "o.jsonl"
    )


def queries_case(rng: random.Random, folder: Path) -> str:
    path = folder / "q.txt"
    if rng.random() < 0.4:
        path.write_bytes(odd_bytes(rng, "a cat jumps\nthe door opens\n"))
    else:
        rows = [{"query": "a cat", "video": "v.mp4"}, {"query": "a door", "video": odd_value(rng)}]
        tree = odd_tree(rng, rows)
        rows = tree if isinstance(tree, list) else [tree]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def read() -> None:
        queries = read_queries(path, folder / "v.mp4")
        assert queries and all(isinstance(query, str) and query.strip() for query in queries)

    return outcome(read)


CASES: dict[str, Callable[[random.Random, Path], str]] = {
    "table": table_case,
    "durations": durations_case,
    "queries": queries_case,
}
