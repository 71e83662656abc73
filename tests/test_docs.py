"""What README and docs print can be run: commands have the options they are shown with, links lead somewhere, README's code runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from mmenvs.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every ``mmenvs ...`` that stands by itself in a block of a page, without its comment."""
    found = []
    for page in PAGES:
        for kind, block in FENCE.findall(page.read_text()):
            lines = block.replace("\\\n", " ").splitlines() if kind in ("", "bash", "sh", "text") else []
            found += [line for line in lines if line.startswith("mmenvs ")]
    return sorted(set(found))


def blocks() -> list[str]:
    return [block for kind, block in FENCE.findall((ROOT / "README.md").read_text()) if kind == "python"]


def test_there_are_commands_and_code():
    assert len(commands()) > 20 and len(blocks()) > 3


@pytest.mark.parametrize("line", commands())
def test_commands_have_the_options_they_are_shown_with(line):
    group = typer.main.get_command(app)
    words = shlex.split(line, comments=True)[1:]
    context = group.make_context("mmenvs", words[:1])
    command = group.get_command(context, words[0])
    assert command is not None, words[0]
    command.make_context(words[0], words[1:], parent=context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    text = FENCE.sub("", page.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("http://", "https://", "#")):
            assert (page.parent / link.partition("#")[0]).exists(), link


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(blocks())))
def test_code_of_readme_runs(number, tmp_path):
    """As printed, but for the length of trainings."""
    code = blocks()[number].replace("20_000", "2_000")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
