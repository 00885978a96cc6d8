"""Where each host's state directory lies, so that a copy of it is told apart.

Revision ID: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add a column, NULL for hosts that were known before."""
    op.add_column("hosts", sa.Column("state_place", sa.Text()))
