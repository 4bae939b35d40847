"""What is built and installed, and that README, CI and packaging say the same."""

import ast
import re
import stat
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest
from helpers.paths import ROOT

from hf_eagle3.host.install import MINIMUM_TRANSFORMERS
from hf_eagle3.modeling.modeling_eagle3 import REMOTE_CODE_FILES

pytestmark = pytest.mark.any_release

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

DRAFTER_FOLDER = "hf_eagle3/assets/smollm2-135m-instruct-eagle3"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "hf_eagle3/__init__.py").read_text(), re.MULTILINE)


def readme_command(name: str) -> str:
    """The line in README.md's code block after `<!-- name -->`."""
    found = re.search(rf"<!-- {name} -->\n```bash\n(.+)\n```", (ROOT / "README.md").read_text())
    assert found, f"README.md has no one-line bash block after <!-- {name} -->"
    return found[1]


def requirement_names(requirements: list) -> set[str]:
    return {re.split(r"[\[<>=!~ ]", requirement)[0] for requirement in requirements}


# ---- README and CI ----


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci/run").read_text()
    extract = re.search(r"^test_command=.*$", script, re.MULTILINE)[0]
    parts = re.search(r"^install=.*\nrun_tests=.*$", script, re.MULTILINE)[0]
    shell = f'{extract}\n{parts}\nprintf \'%s\\n\' "$test_command" "$install" "$run_tests"'
    out = subprocess.run(["bash", "-euc", shell], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    command, install, run_tests = out.splitlines()
    assert command == readme_command("test-command")
    assert f"{install} && {run_tests}" == command
    assert run_tests == "pytest"
    assert ".venv" in install
    assert "pip install" in install
    summary = 'tail -n 1 "$environments/newest.log"'
    assert '\nwithin newest $run_tests | tee "$environments/newest.log"\n' in script
    assert script.rstrip().endswith(f"\n{summary}"), "pytest's summary must be the last thing CI prints"
    newest = re.search(r"^NEWEST_TRANSFORMERS=([\d.]+)", script, re.MULTILINE)[1]
    assert f" transformers=={newest} " in command


def test_readme_commands_differ_only_in_extra_and_verb():
    demo = readme_command("demo-command")
    assert demo.replace("[demo]", "[test]").replace("hf-eagle3 demo", "pytest") == readme_command("test-command")


def test_ci_tests_the_oldest_transformers_that_the_package_admits():
    oldest = re.search(r"^OLDEST_TRANSFORMERS=(\d+\.\d+)", (ROOT / ".ci/run").read_text(), re.MULTILINE)[1]
    assert f"{oldest}.0" == MINIMUM_TRANSFORMERS
    assert f"transformers>={oldest}" in PROJECT["project"]["dependencies"]
    assert f"Transformers {oldest} and newer" in (ROOT / "README.md").read_text()


def test_dependency_groups_name_what_the_extras_name():
    extras, groups = PROJECT["project"]["optional-dependencies"], PROJECT["dependency-groups"]

    def of_extra(name: str) -> set[str]:
        own = requirement_names(extras[name]) - {"hf-eagle3"}
        nested = re.findall(r"hf-eagle3\[(.+)\]", " ".join(extras[name]))
        return own.union(*(of_extra(inner) for names in nested for inner in names.split(",")))

    def of_group(name: str) -> set[str]:
        own = requirement_names([entry for entry in groups[name] if isinstance(entry, str)])
        return own.union(*(of_group(entry["include-group"]) for entry in groups[name] if isinstance(entry, dict)))

    for name in groups:
        assert of_group(name) == of_extra(name), name


def test_dependencies_have_lower_bounds_only():
    lists = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    for requirement in chain.from_iterable(lists):
        assert "[" in requirement or ">=" in requirement, requirement
        assert not re.search(r"<|==|~=|!=", requirement), requirement


# ---- the package ----


def test_every_package_is_listed():
    packages = {path.parent.relative_to(ROOT) for path in (ROOT / "hf_eagle3").glob("**/__init__.py")}
    listed = {Path(*name.split(".")) for name in PROJECT["tool"]["setuptools"]["packages"]}
    assert listed == packages | {Path("hf_eagle3/modeling")}


def test_version_is_a_literal_and_in_one_place():
    tree = ast.parse((ROOT / "hf_eagle3/__init__.py").read_text())
    (assignment,) = (
        node for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "__version__"
    )
    assert isinstance(assignment.value, ast.Constant)  # so setuptools reads it without importing torch
    assert PROJECT["project"]["dynamic"] == ["version"]


def test_modeling_link_is_relative():
    link = ROOT / "hf_eagle3/modeling"
    assert link.is_symlink()
    assert link.readlink() == Path("../modeling")


def assert_code_is_in_the_drafters_folder(*built: Path) -> None:
    """The links of the clone are files in wheels and sdists, which are unpacked where links may lead nowhere."""
    for archive in built:
        is_wheel = archive.suffix == ".whl"
        folder = f"{'' if is_wheel else archive.name.removesuffix('.tar.gz') + '/'}{DRAFTER_FOLDER}"
        with zipfile.ZipFile(archive) if is_wheel else tarfile.open(archive) as opened:
            for name in REMOTE_CODE_FILES:
                if is_wheel:
                    assert not stat.S_ISLNK(opened.getinfo(f"{folder}/{name}").external_attr >> 16), name
                    code = opened.read(f"{folder}/{name}")
                else:
                    assert opened.getmember(f"{folder}/{name}").isreg(), name
                    code = opened.extractfile(f"{folder}/{name}").read()
                assert code == (ROOT / "modeling" / name).read_bytes()


@pytest.mark.slow
def test_wheel_and_sdist_hold_modeling_once(tmp_path):
    # Asked for without importing it here: setuptools replaces parts of the standard library on import.
    if int(metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("needs setuptools>=77, as pyproject.toml says")
    # Builds in a copy, so that no build folder is left in the clone; the files git would clone.
    source = tmp_path / "source"
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listing.returncode:
        pytest.skip("not a git clone")
    for name in filter(None, listing.stdout.decode().split("\0")):
        path, copy = ROOT / name, source / name
        if name.startswith(("hf_eagle3/", "modeling/", "README", "LICENSE", "pyproject")) and path.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.is_symlink():
                copy.symlink_to(path.readlink())
            elif not path.is_dir() and path.stat().st_size < 1 << 20:
                copy.write_bytes(path.read_bytes())
    build = "import setuptools.build_meta as b; print(b.build_sdist('dist')); print(b.build_wheel('dist'))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)

    (wheel,) = (source / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    for name in ("__init__", "configuration_eagle3", "modeling_eagle3"):
        assert [n for n in names if n.endswith(f"modeling/{name}.py")] == [f"hf_eagle3/modeling/{name}.py"]
    assert {n.split("/")[0] for n in names} == {"hf_eagle3", f"hf_eagle3-{VERSION[1]}.dist-info"}
    assert "hf_eagle3/py.typed" in names
    for path in (source / "hf_eagle3/assets").rglob("*"):
        assert path.is_dir() or str(path.relative_to(source)) in names
    assert_code_is_in_the_drafters_folder(*(source / "dist").glob("*"))

    # The wheel stands alone: `modeling` is found in it, not in the clone.
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    where = "import hf_eagle3.modeling as m, hf_eagle3; print(m.__file__, hf_eagle3.__version__)"
    run = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env={"PYTHONPATH": str(site), "PATH": ""}, capture_output=True
    )
    assert run.returncode == 0, run.stderr.decode()
    assert run.stdout.decode().split() == [str(site / "hf_eagle3/modeling/__init__.py"), VERSION[1]]


def test_installed_command_is_ours():
    assert PROJECT["project"]["scripts"] == {"hf-eagle3": "hf_eagle3.cli:main"}
