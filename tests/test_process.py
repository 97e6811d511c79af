"""How polygpt says it is to be called."""

import os
import sys

from polygpt.process import command_line


def test_a_command_is_named_by_its_path_where_it_is_not_on_the_path(monkeypatch, tmp_path):
    program = tmp_path / ".venv" / "bin" / "polygpt"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(program)])
    monkeypatch.setenv("PATH", "")
    assert command_line("generate", "my runs/a") == ".venv/bin/polygpt generate 'my runs/a'"
    monkeypatch.setenv("PATH", os.fspath(program.parent))
    assert command_line("generate", "a") == "polygpt generate a"
