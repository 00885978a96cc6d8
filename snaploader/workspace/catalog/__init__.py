"""The catalog: what is known of workspaces, in a database.

SQLite by default, with nothing to install; PostgreSQL by URL, for many hosts. One code path for both.

    catalog       `Catalog`: opens the database, gives out blocks that read or write, survives forks
    reader        `Reader`: every query
    transaction   `Transaction`: every change, and when the lifecycle next has to look at a workspace
    tables        the tables, the types of their columns, and their rows as values of the model
    engines       addresses of databases, connections to them, locks between hosts, errors as this library's
    migrate       the schema's versions; they are in `migrations`, and docs/formats/catalog.md describes them
"""

from __future__ import annotations

from snaploader.workspace.catalog.catalog import Catalog
from snaploader.workspace.catalog.reader import DueWorkspace, HostState, Reader
from snaploader.workspace.catalog.transaction import Transaction

__all__ = ["Catalog", "DueWorkspace", "HostState", "Reader", "Transaction"]
