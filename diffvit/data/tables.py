"""Parquet tables that lie in a `Storage` and fit the memory."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from diffvit.storage import Storage


def write_table(storage: Storage, name: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    storage.write(name, sink.getvalue())


def read_table(storage: Storage, name: str, schema: pa.Schema | None = None) -> pa.Table:
    return pq.read_table(pa.BufferReader(storage.read(name)), schema=schema)
