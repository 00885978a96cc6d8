"""The catalog: what is known of workspaces, in a database.

SQLite by default, with nothing to install; PostgreSQL by URL, for many hosts. One code path for both.

`reader` asks and `transaction` changes, by the `tables`; `engines` knows by what the databases differ, and
`migrate` renews the schema, which docs/formats/catalog.md describes.
"""

from __future__ import annotations

from snaploader.workspace.catalog.catalog import Catalog
from snaploader.workspace.catalog.reader import DueWorkspace, HostState, Reader
from snaploader.workspace.catalog.transaction import Transaction

__all__ = ["Catalog", "DueWorkspace", "HostState", "Reader", "Transaction"]
