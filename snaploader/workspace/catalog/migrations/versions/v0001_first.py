"""The first schema.

Revision ID: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_WORD = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
"""Names sort by code points."""


def upgrade() -> None:
    """Create all tables."""
    op.create_table(
        "policies",
        sa.Column("name", _WORD, nullable=False),
        sa.Column("settings", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="policies_key"),
    )
    op.create_table(
        "owners",
        sa.Column("name", _WORD, nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="owners_key"),
        sa.CheckConstraint("status IN ('active', 'suspended')", name="owners_status_is_known"),
    )
    op.create_table(
        "hosts",
        sa.Column("name", _WORD, nullable=False),
        sa.Column("state_id", _WORD, nullable=False),
        sa.Column("state_directory", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="hosts_key"),
        sa.UniqueConstraint("state_id", name="hosts_have_one_state_id"),
    )
    op.create_table(
        "workspaces",
        sa.Column("id", _WORD, nullable=False),
        sa.Column("host", _WORD, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("owner", _WORD),
        sa.Column("base", _WORD, nullable=False),
        sa.Column("policy", _WORD, nullable=False),
        sa.Column("autostart_schedule", sa.Text(), nullable=False),
        sa.Column("slot", sa.BigInteger()),
        sa.Column("current_snapshot", _WORD, nullable=False),
        sa.Column("base_snapshot", _WORD, nullable=False),
        sa.Column("last_version", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("last_used_at", sa.BigInteger(), nullable=False),
        sa.Column("paused_at", sa.BigInteger()),
        sa.Column("dormant_at", sa.BigInteger()),
        sa.Column("deleting_at", sa.BigInteger()),
        sa.Column("due_at", sa.BigInteger()),
        sa.Column("spec", sa.Text(), nullable=False),
        sa.Column("operation_kind", sa.Text()),
        sa.Column("operation_token", _WORD),
        sa.Column("operation_host", _WORD),
        sa.Column("operation_started_at", sa.BigInteger()),
        sa.Column("operation_snapshot", _WORD),
        sa.Column("operation_version", sa.Integer()),
        sa.PrimaryKeyConstraint("id", name="workspaces_key"),
        sa.ForeignKeyConstraint(["owner"], ["owners.name"], name="workspaces_owner_is_known"),
        sa.ForeignKeyConstraint(["policy"], ["policies.name"], name="workspaces_policy_is_known"),
        sa.UniqueConstraint("host", "slot", name="workspaces_have_one_host_slot"),
        sa.CheckConstraint(
            "state IN ('running', 'stopped', 'paused', 'deleted')", name="workspaces_state_is_known"
        ),
        sa.CheckConstraint("last_version >= 0", name="workspaces_last_version_is_a_number"),
        sa.CheckConstraint(
            "(operation_kind IS NULL) = (operation_token IS NULL)"
            " AND (operation_kind IS NULL) = (operation_host IS NULL)"
            " AND (operation_kind IS NULL) = (operation_started_at IS NULL)",
            name="workspaces_operation_is_whole",
        ),
    )
    op.create_index("workspaces_by_host_due_at", "workspaces", ["host", "due_at"])
    op.create_index("workspaces_by_operation_host", "workspaces", ["operation_host"])
    op.create_index("workspaces_by_owner", "workspaces", ["owner"])
    op.create_index("workspaces_by_policy", "workspaces", ["policy"])
    op.create_table(
        "snapshots",
        sa.Column("name", _WORD, nullable=False),
        sa.Column("workspace_id", _WORD, nullable=False),
        sa.Column("runtime_name", _WORD, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("display_name", sa.Text(), nullable=False),
        sa.Column("parent", _WORD, nullable=False),
        sa.Column("manifest_ref", _WORD, nullable=False),
        sa.Column("is_remote", sa.Boolean(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="snapshots_key"),
        sa.ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], name="snapshots_workspace_id_is_known"),
        sa.UniqueConstraint("runtime_name", name="snapshots_have_one_runtime_name"),
        sa.CheckConstraint("kind IN ('version', 'pause', 'commit', 'base')", name="snapshots_kind_is_known"),
        sa.CheckConstraint("scope IN ('Full', 'Data')", name="snapshots_scope_is_known"),
        sa.CheckConstraint("source IN ('manual', 'pre_exec', 'rollback')", name="snapshots_source_is_known"),
        sa.CheckConstraint(
            "status IN ('pending', 'complete', 'orphaned', 'deleting')", name="snapshots_status_is_known"
        ),
        sa.CheckConstraint("size_bytes >= 0", name="snapshots_size_is_a_number"),
    )
    op.create_index("snapshots_by_workspace_id_created_at", "snapshots", ["workspace_id", "created_at"])
    op.create_index("snapshots_by_status", "snapshots", ["status"])
    op.create_table(
        "versions",
        sa.Column("id", _SERIAL, nullable=False),
        sa.Column("workspace_id", _WORD, nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("snapshot_name", _WORD, nullable=False),
        sa.Column("display_name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="versions_key"),
        sa.ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], name="versions_workspace_id_is_known"),
        sa.ForeignKeyConstraint(
            ["snapshot_name"], ["snapshots.name"], name="versions_snapshot_name_is_known", ondelete="CASCADE"
        ),
        sa.UniqueConstraint("workspace_id", "number", name="versions_have_one_workspace_id_number"),
        sa.UniqueConstraint("snapshot_name", name="versions_have_one_snapshot_name"),
        sa.CheckConstraint("number >= 1", name="versions_number_begins_at_1"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "events",
        sa.Column("id", _SERIAL, nullable=False),
        sa.Column("workspace_id", _WORD, nullable=False),
        sa.Column("type", _WORD, nullable=False),
        sa.Column("payload", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="events_key"),
        sa.ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], name="events_workspace_id_is_known"),
        sqlite_autoincrement=True,
    )
    op.create_index("events_by_workspace_id_id", "events", ["workspace_id", "id"])
    op.create_table(
        "runs",
        sa.Column("id", _SERIAL, nullable=False),
        sa.Column("workspace_id", _WORD, nullable=False),
        sa.Column("transition", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("completed_at", sa.BigInteger()),
        sa.Column("deadline", sa.BigInteger()),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="runs_key"),
        sa.ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], name="runs_workspace_id_is_known"),
        sa.CheckConstraint("transition IN ('start', 'stop', 'delete')", name="runs_transition_is_known"),
        sa.CheckConstraint("status IN ('running', 'succeeded', 'failed')", name="runs_status_is_known"),
        sqlite_autoincrement=True,
    )
    op.create_index("runs_by_workspace_id_id", "runs", ["workspace_id", "id"])
    op.execute("INSERT INTO policies (name, settings) VALUES ('default', '{\"onPause\":\"Full\"}')")
