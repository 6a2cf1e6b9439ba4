"""Runs the tests with the oldest or the newest versions that pyproject.toml admits.

    python tests/ranges.py oldest              every dependency at the lowest version of its range
    python tests/ranges.py newest              at the highest that pip finds
    python tests/ranges.py oldest -- tests/test_recipe.py

Makes a virtual environment of its own (`.venv-oldest`, `.venv-newest`), which `make clean` removes. torch stays at the
version of requirements.lock, since its other builds are downloads of gigabytes: `--torch` takes it along. The tools of
the extra `dev` are the newest in both. The exit code is that of pytest.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)>=(?P<lowest>[\d.]+)[^;]*(?:;(?P<marker>.*))?")


def requirements() -> list[re.Match[str]]:
    """Every requirement with a lowest version, of whet itself and of what its extras add for users."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [texts for name, texts in project["optional-dependencies"].items() if name != "dev"]
    texts = [text for texts in (project["dependencies"], *extras) for text in texts]
    matches = [REQUIREMENT.fullmatch(text) for text in texts]
    return [match for match in matches if match is not None]


def locked(name: str) -> str:
    """The version in requirements.lock."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    versions = {line.partition("==")[0].replace("_", "-"): line.partition("==")[2].split() for line in lines}
    return versions[name.replace("_", "-")][0]


def constraints(end: str, with_torch: bool) -> list[str]:
    """pip's constraints for one end of every range."""
    lines = [] if with_torch else [f"torch=={locked('torch')}"]
    for match in requirements():
        marker = f" ;{match['marker']}" if match["marker"] else ""
        if match["name"] != "torch" or with_torch:
            lines.append(f"{match['name']}=={match['lowest']}.*{marker}" if end == "oldest" else match[0])
    return lines


def install(end: str, with_torch: bool) -> Path:
    """The Python of an environment with these versions."""
    folder = ROOT / f".venv-{end}"
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, with_pip=True)
    pins = folder / "constraints.txt"
    pins.write_text("\n".join(constraints(end, with_torch)) + "\n", encoding="utf-8")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if not with_torch:
        subprocess.run([*pip, f"torch=={locked('torch')}"], check=True)
    newest = ["--upgrade", "--upgrade-strategy", "eager"] if end == "newest" else []
    done = subprocess.run([*pip, *newest, "--constraint", str(pins), "--editable", f"{ROOT}[dev]"], check=False)
    if done.returncode:
        sys.exit(f"these versions do not go together; see {pins}")
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("end", choices=["oldest", "newest"])
    parser.add_argument("--torch", action="store_true", help="torch too, instead of the locked one")
    parser.add_argument("tests", nargs="*", help="arguments for pytest (all tests)")
    options = parser.parse_args()
    python = install(options.end, options.torch)
    shown = subprocess.run([str(python), "-m", "pip", "freeze", "--exclude-editable"], capture_output=True, text=True,
                           check=True).stdout.splitlines()  # fmt: skip
    names = {match["name"].lower().replace("_", "-") for match in requirements()}
    print(*(line for line in shown if line.partition("==")[0].lower().replace("_", "-") in names), sep="\n", flush=True)
    spread = [] if options.tests else ["-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder"]
    return subprocess.run([str(python), "-m", "pytest", *spread, *options.tests], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
