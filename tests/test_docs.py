"""The documents are true: every error code is explained, every symbol named in them exists."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
RAISED = re.compile(
    r"(?:DagmanError|reject|unknown|Problem|[a-z_]*error|_refuse\w*|_reject\w*)\(\s*(?:code=)?"
    r"\"([A-Z][A-Z0-9]{2,})\""
)


def test_every_error_code_is_explained_and_none_is_invented() -> None:
    explained = set(re.findall(r"^\| ([A-Z][A-Z0-9]+) \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE))
    raised = set(RAISED.findall(SOURCE)) | {"BUG"}
    assert raised <= explained
    assert all(f'"{code}"' in SOURCE or f"E-{code}" in SOURCE for code in explained)


def test_every_function_that_paper_to_code_names_exists() -> None:
    names = re.findall(
        r"`(dagman\.[a-z_.]+)\.([A-Za-z_]+(?:\.[a-z_]+)?)`", (ROOT / "docs" / "paper-to-code.md").read_text()
    )
    assert len(names) > 25
    for module, name in names:
        thing = importlib.import_module(module)
        for part in name.split("."):
            thing = getattr(thing, part)


@pytest.mark.parametrize(
    "document", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_every_path_that_a_document_links_to_exists(document: Path) -> None:
    for path in re.findall(r"\]\((?!http)([^)#]+)", document.read_text()):
        assert (document.parent / path).exists(), path


def test_generated_tables_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    from runpy import run_path

    monkeypatch.syspath_prepend(str(ROOT / "docs" / "evidence"))
    tables = run_path(str(ROOT / "docs" / "evidence" / "tables.py"))
    for path in tables["DOCUMENTS"]:
        assert tables["filled"](path.read_text()) == path.read_text(), f"{path} is not what `make docs` writes"
