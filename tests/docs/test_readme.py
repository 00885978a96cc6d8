"""The README's commands run as they stand there."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent.parent / "README.md"
SECTIONS = ("Using the command line", "Workspaces")
TIMEOUT_S = 300


def commands() -> str:
    """The shell commands of these sections, but for the installation."""
    text = README.read_text()
    blocks = []
    for title in SECTIONS:
        section = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
        blocks += [
            block for block in re.findall(r"```\n(.*?)```", section, re.DOTALL) if "pip install" not in block
        ]
    return "\n".join(blocks)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("mke2fs", path="/sbin:/usr/sbin"), reason="/sbin/mke2fs is missing (Debian: e2fsprogs)"
)
def test_the_commands_of_the_readme_do_what_it_says(tmp_path: Path) -> None:
    script = commands()
    assert script.count("snaploader") > 12
    script = script.replace(":8980", f":{free_port()}")
    home = tmp_path / "home"
    (tmp_path / "folder").mkdir()
    home.mkdir()
    done = subprocess.run(
        ["bash", "-euc", f"trap 'kill $(jobs -p)' EXIT\n{script}\nsnaploader workspace rm box box-2 --yes\n"],
        cwd=tmp_path / "folder",
        env={
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "LANG": "C.UTF-8",
        },
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done
    restored = tmp_path / "folder/out"
    assert (restored / "vmlinux").read_bytes() == (tmp_path / "folder/vmlinux").read_bytes()
    assert (restored / "disk.img").read_bytes() == (tmp_path / "folder/disk.img").read_bytes()
    assert "53 ef" in done.stdout  # the magic number of ext4, 56 bytes into the superblock
