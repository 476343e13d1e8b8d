"""The lock file, the declared dependencies and their table in the docs say the same."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCKS = ("requirements.lock", "requirements-test.lock")


def _locked(name):
    """Requirement lines with their hashes, continuation lines joined."""
    text = re.sub(r"(?m)^\s*#.*\n?", "", (ROOT / name).read_text()).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip()]
    return [line for line in lines if not line.startswith(("-r ", "--"))]


def _declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(text) for text in project["dependencies"]]


def test_the_integration_runs_the_tests_and_what_checks_the_code():
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert script[-1] == "make test" and "set -euo pipefail" in script
    done = subprocess.run(
        ["make", "-n", "-W", "pyproject.toml", "test"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for command in ("ruff check .", "ruff format --check .", "mypy", "python -m pytest"):
        assert re.search(rf"(?m)^\S*/{re.escape(command)}$", done.stdout), command
    done = subprocess.run(
        ["make", "-n", "quickstart"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "python -m covid_flax.main --config=configs/quickstart.py" in done.stdout


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_package_has_one_version_and_hashes(name):
    lines = _locked(name)
    assert lines
    for line in lines:
        requirement = Requirement(line.split("--hash")[0].strip())
        specifiers = list(requirement.specifier)
        assert [s.operator for s in specifiers] == ["=="], line
        assert requirement.url is None
        hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})(?:\s|$)", line)
        assert hashes and len(hashes) == line.count("--hash="), requirement.name


def test_the_lock_satisfies_what_is_declared():
    versions: dict[str, set[str]] = {}
    for line in _locked("requirements.lock"):
        requirement = Requirement(line.split("--hash")[0].strip())
        name = canonicalize_name(requirement.name)
        versions.setdefault(name, set()).update(s.version for s in requirement.specifier)
    for requirement in _declared():
        assert any(s.operator == ">=" for s in requirement.specifier), f"{requirement}: no bound"
        locked = versions[canonicalize_name(requirement.name)]
        assert all(requirement.specifier.contains(version) for version in locked), requirement.name


def test_every_dependency_is_justified_and_no_other():
    text = (ROOT / "docs" / "dependencies.md").read_text()
    table = re.findall(r"^\| ([\w ,-]+?) \|", text, re.MULTILINE)[1:]
    named = {canonicalize_name(name.strip()) for row in table for name in row.split(",")}
    assert named == {canonicalize_name(r.name) for r in _declared()}


def test_the_package_imports_nothing_undeclared():
    declared = {canonicalize_name(r.name) for r in _declared()}
    distribution = {
        "absl": "absl-py",
        "orbax": "orbax-checkpoint",
        "PIL": "pillow",
        "sklearn": "scikit-learn",
    }
    own = {"covid_flax", "ml_collections_configs", *sys.stdlib_module_names}
    imported = set()
    for path in (ROOT / "covid_flax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            imported |= {(name.split(".")[0], path.name) for name in names}
    unknown = {
        (name, file)
        for name, file in imported
        if name not in own and canonicalize_name(distribution.get(name, name)) not in declared
    }
    assert unknown == {("optuna", "halving.py")}  # of the extra `sweep`
