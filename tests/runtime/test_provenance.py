"""What run.json says of how a run was made."""

import shutil
import subprocess
import sys
from pathlib import Path

from mlx_traces.runtime import provenance


def test_a_package_below_another_projects_checkout_has_no_revision(tmp_path, monkeypatch):
    module = Path(provenance.__file__)
    copy = tmp_path / "venv" / module.name
    copy.parent.mkdir()
    shutil.copy(module, copy)
    monkeypatch.setattr(provenance, "__file__", str(copy))
    assert provenance.git_revision.__wrapped__() is None

    def git(*arguments):
        own = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", "-C", tmp_path, *own, *arguments], check=True, capture_output=True, text=True)

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "x")
    assert provenance.git_revision.__wrapped__() is None  # another project's checkout
    git("add", str(copy))
    git("commit", "-q", "-m", "y")
    assert provenance.git_revision.__wrapped__() == git("rev-parse", "--short=12", "HEAD").stdout.strip()
    copy.write_text("changed")
    assert provenance.git_revision.__wrapped__().endswith("+")


def test_a_command_of_any_bytes_is_text(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/script.py", "x\udcff", "é"])
    assert provenance.provenance()["command"] == "script.py x\\udcff é"
