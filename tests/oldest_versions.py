"""
Run the core's tests with the oldest libraries that pyproject.toml admits, in a virtual environment of its own.

    python tests/oldest_versions.py
"""

import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = "building cache generation lora merging modeling pipeline preferences saving versions"
CORE = [f"tests/test_{name}.py" for name in CORE.split()]


def oldest() -> dict[str, str]:
    """Lower bounds of what the package needs, by library."""
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return dict(re.match(r"([\w-]+)>=([\d.]+)", need).groups() for need in needs)


def oldest_to_run() -> str:
    """The lower bound of transformers for models."""
    return re.search(r'OLDEST_TO_RUN = "([\d.]+)"', (ROOT / "modeling_pcm_ensemble/requirements.py").read_text())[1]


def main():
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()[1:])
    bounds = oldest() | {"transformers": oldest_to_run()}  # an older one only imports the package
    versions = tested | {name: f"{version}.*" for name, version in bounds.items()}
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
        venv.create(f"{folder}/venv", with_pip=True)
        python = f"{folder}/venv/bin/python"
        pip = [python, "-m", "pip"]
        subprocess.run([*pip, "install", "-q", "-c", constraints, "-e", ".[test]"], cwd=ROOT, check=True)
        subprocess.run([*pip, "show", *oldest()], check=True)
        tests = [python, "-m", "pytest", "-m", "not real_model and not slow", *CORE]
        sys.exit(subprocess.run(tests, cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
