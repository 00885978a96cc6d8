"""The fixture itself: a catalog on every kind of database, empty for each test."""

from __future__ import annotations

import pytest

from snaploader.workspace.catalog import Catalog
from snaploader.workspace.policy import DEFAULT_POLICY


@pytest.mark.parametrize("attempt", [1, 2])
def test_each_test_gets_an_empty_catalog_of_its_own(catalog: Catalog, database: str, attempt: int) -> None:
    with catalog.transaction() as transaction:
        transaction.set_owner_status("someone", transaction.owner_status(str(attempt)))
    with catalog.reading() as reader:
        assert reader.workspaces() == []
        assert [policy.name for policy in reader.policies()] == [DEFAULT_POLICY]
    assert catalog.dialect == database
