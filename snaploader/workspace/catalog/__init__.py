"""The catalog: what is known of workspaces, in a database.

SQLite by default, with nothing to install; PostgreSQL by URL, for many hosts. One code path for both. The
schema is in `tables`, its versions in `migrations`; docs/formats/catalog.md describes it.
"""

from __future__ import annotations

from snaploader.workspace.catalog.catalog import Catalog
from snaploader.workspace.catalog.reader import DueWorkspace, Reader
from snaploader.workspace.catalog.transaction import Transaction

__all__ = ["Catalog", "DueWorkspace", "Reader", "Transaction"]
