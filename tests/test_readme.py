"""The READMEs: what they link to and name exists, and the first one stays short."""

import re

import pytest

from harness_params import SCHEMA
from tests.conftest import ROOT, product_files

FOLDERS = [ROOT / name for name in ("utils", "configs", "assets")]
READMES = [ROOT / "README.md", *sorted(path for folder in FOLDERS for path in folder.rglob("README.md"))]
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
# Files and modules as they are named in text: `utils/conv_type.py`, configs/grids/digits.yaml, python -m utils.show.
NAMED = re.compile(r"\b((?:utils|configs|tests|assets)/[\w./-]*\w\.(?:py|md|yaml|csv|sh|png|ipynb))\b")
MODULE = re.compile(r"python -m (utils\.\w+)")


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_readme_links_to_and_names_exists(path):
    text = path.read_text()
    links = [link for link in LINK.findall(text) if "://" not in link]
    missing = [link for link in links if not (path.parent / link).exists()]
    missing += [name for name in NAMED.findall(text) if not (ROOT / name).exists()]
    missing += [name for name in MODULE.findall(text) if not (ROOT / f"{name.replace('.', '/')}.py").exists()]
    assert not missing


def test_code_names_readmes_that_exist():
    texts = [path.read_text() for path in [*product_files(), *ROOT.glob("configs/*.yaml")]]
    named = {name for text in texts for name in re.findall(r"([\w/]*\bREADME\.md)\b", text)}
    assert named and not [name for name in named if not (ROOT / name).exists()]


def test_the_first_readme_is_short_and_leads_to_every_other():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) < 2000
    linked = {(ROOT / link).resolve() for link in LINK.findall(text) if "://" not in link}
    assert not [path for path in READMES if path != ROOT / "README.md" and path not in linked]


def test_every_option_that_readmes_name_is_one():
    sections = "|".join(sorted({section for section, _ in SCHEMA.entries}))
    texts = [re.sub(r"```python.*?```", "", path.read_text(), flags=re.DOTALL) for path in READMES]
    named = {name for text in texts for name in re.findall(rf"(?<![\w/.])((?:{sections})\.[a-z]\w+)", text)}
    assert named and not [name for name in sorted(named) if tuple(name.split(".")) not in SCHEMA.entries]
