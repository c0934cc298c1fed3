"""The container recipes, which cannot be built here: what they copy, install and call is there, by the rules of lint.

The rules are hadolint's (DL3006, DL3007: a base image with a tag that stays; DL3008 is left to Debian; DL3009: package
lists removed; DL3015: no recommended packages; DL3000: absolute WORKDIR; DL3025: CMD as a list; DL3042: no pip cache).
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from dsft.cli.main import VERBS
from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "examples" / "containers"
DOCKERFILE, APPTAINER = FOLDER / "Dockerfile", FOLDER / "dsft.def"
WHEEL_IS_MADE_OF = {"pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "csrc", "dsft"}
"""As tests/packaging/test_wheel.py builds it."""
SECTIONS = ("files", "post", "environment", "runscript")


def instructions() -> list[tuple[str, str]]:
    """Those of the Dockerfile, with their arguments on one line."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined)]


def sections() -> dict[str, list[str]]:
    """Lines of each section of the Apptainer recipe; what stands before the first is ``header``."""
    found: dict[str, list[str]] = {"header": []}
    name = "header"
    for line in APPTAINER.read_text().splitlines():
        if line.startswith("%"):
            name = line[1:].strip()
            found[name] = []
        elif line.strip() and not line.startswith("#"):
            found[name].append(line.strip())
    return found


def base_images() -> list[str]:
    header = dict(line.split(": ", 1) for line in sections()["header"])
    assert header.keys() == {"Bootstrap", "From"}
    return [header["From"], *(rest for name, rest in instructions() if name == "FROM")]


def test_both_recipes_start_from_the_same_image_with_a_tag_that_stays() -> None:
    first, second = base_images()
    assert first == second
    assert re.fullmatch(r"[\w/.-]+:\d[\w.-]+", first), first


def test_what_is_copied_is_there_and_enough_to_build_dsft() -> None:
    copied: dict[str, str] = {}
    for name, rest in instructions():
        if name in ("COPY", "ADD"):
            *sources, target = rest.split()
            copied |= {source: target for source in sources}
    files = dict(line.split() for line in sections()["files"])
    assert copied.keys() == files.keys() == WHEEL_IS_MADE_OF | {"constraints.txt"}
    for source in copied:
        assert (REPOSITORY / source).exists(), source
        assert copied[source] in ("./", source)  # a folder that is copied to ./ would lose its name
        assert (REPOSITORY / source).is_file() or copied[source] == source
        assert files[source] == f"/opt/dsft/{source}"


def test_the_dockerfile_by_the_rules_of_lint() -> None:
    names = [name for name, _ in instructions()]
    assert set(names) <= {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "CMD"}
    assert names[0] == "FROM"
    assert names.count("CMD") == 1
    for name, rest in instructions():
        if name == "WORKDIR":
            assert Path(rest).is_absolute()
        elif name == "CMD":
            assert json.loads(rest)[0] == "dsft"
        elif name == "ENV":
            assert re.fullmatch(r"[A-Z_]+=\S+", rest), rest


@pytest.mark.parametrize("recipe", [DOCKERFILE, APPTAINER], ids=lambda path: path.name)
def test_installing(recipe: Path) -> None:
    text = recipe.read_text()
    assert text.count("apt-get install -y --no-install-recommends") == text.count("apt-get install") == 1
    assert "rm -rf /var/lib/apt/lists/*" in text
    (pip,) = [line for line in text.splitlines() if "pip install" in line]
    assert "--no-cache-dir" in pip
    assert re.search(r"-c (/opt/dsft/)?constraints\.txt", pip)


def test_the_sections_of_the_apptainer_recipe_are_shell() -> None:
    assert list(sections()) == ["header", *SECTIONS]
    for name in SECTIONS[1:]:
        subprocess.run(["sh", "-n"], input="\n".join(sections()[name]), text=True, check=True)


@pytest.mark.parametrize("recipe", [DOCKERFILE, APPTAINER], ids=lambda path: path.name)
def test_the_commands_that_it_names_exist(recipe: Path) -> None:
    text = recipe.read_text()
    (built,) = re.findall(r"(?:-f|dsft\.sif) (examples/\S+)", text)
    assert REPOSITORY / built == recipe
    verbs = re.findall(r"\bdsft (?!dsft)([a-z]+)(?: \S+\.yaml)?$", text, re.MULTILINE)
    assert verbs
    assert set(verbs) <= set(VERBS)
