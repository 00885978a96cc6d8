"""The latest ticks of each host's lifecycle, so that a jump of its clock is noticed.

Revision ID: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_WORD = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    """Create the table of ticks."""
    op.create_table(
        "ticks",
        sa.Column("host", _WORD, nullable=False),
        sa.Column("latest_at", sa.BigInteger(), nullable=False),
        sa.Column("previous_at", sa.BigInteger()),
        sa.PrimaryKeyConstraint("host", name="ticks_key"),
    )
