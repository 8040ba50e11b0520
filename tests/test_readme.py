"""The README and the documents are true: commands, links, and the CI script's copy of a command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
README = (HERE / "README.md").read_text(encoding="utf-8")


def test_ci_sets_up_and_tests_with_the_readmes_own_line() -> None:
    (line,) = [
        line for line in README.splitlines() if line.startswith("python3 -m venv") and "pytest" in line
    ]
    script = (HERE / ".ci/run").read_text(encoding="utf-8")
    assert f'test_command="{line}"' in script


@pytest.mark.parametrize(
    "document", [HERE / "README.md", *sorted((HERE / "docs").rglob("*.md"))], ids=lambda p: p.name
)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_every_file_the_architecture_names_exists() -> None:
    text = (HERE / "docs/architecture.md").read_text(encoding="utf-8")
    table = text[text.index("| you look for") : text.index("## Four ideas")]
    named = re.findall(r"`([\w/]+\.py|[\w/]+/)`", table)
    assert len(named) > 20
    for name in named:
        assert any((HERE / base / name).exists() for base in ("asyncsup", "")), name


def test_the_repository_speaks_of_the_project_alone() -> None:
    """No path of a machine and no registry's host in what is shipped."""
    folders = ("asyncsup", "target_sdk", "docs", "examples", "benchmarks", "tests", ".ci")
    texts = [
        path
        for folder in folders
        for path in (HERE / folder).rglob("*")
        if path.suffix in {".py", ".md", ".toml"}
    ]
    for path in [
        *texts,
        HERE / "README.md",
        HERE / "CHANGELOG.md",
        HERE / "pyproject.toml",
        HERE / ".ci/run",
    ]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/work/(main|shared)\b", text), path
        assert not re.search(r"pypi\.org|files\.pythonhosted|registry\.npmjs", text), path
