"""Small corpora on the disk, for the tests of text."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def write_rows(path: Path, rows: Sequence[Any], **options: Any) -> Path:
    """Write rows in the format that the ending says; `options` are those of parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"id": number, "text": row}) + "\n" for number, row in enumerate(rows))
    if path.suffix == ".parquet":
        table = pa.table({"id": list(range(len(rows))), "text": pa.array(rows, pa.string())})
        pq.write_table(table, path, **options)
    elif path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.name.endswith(".jsonl.zst"):
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(lines.encode())
    elif path.suffix == ".jsonl":
        path.write_text(lines)
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"id": number, "text": row} for number, row in enumerate(rows)]))
    else:
        path.write_text("\n\n".join(rows))
    return path
