"""What is forked behaves as a Python that was started, to the program inside it and to the one who asked for it."""

import subprocess
import sys
import time

import pytest
from warm_python import warm_python

PRINTED = (
    "import os, sys; print(__name__, sys.argv[1:], os.getcwd(), os.environ['A'], 'HOME' in os.environ); sys.exit(3)"
)


@pytest.mark.parametrize("way", ["code", "file", "module"])
def test_a_program_has_its_arguments_folder_environment_and_status(way, tmp_path):
    (tmp_path / "program.py").write_text(PRINTED)
    given = {"code": ["-c", PRINTED], "file": ["program.py"], "module": ["-m", "program"]}[way]

    def run(python: str) -> tuple[int, bytes]:
        done = subprocess.run([python, *given, "a b", "-u"], capture_output=True, cwd=tmp_path, env={"A": "b"})
        return done.returncode, done.stdout

    assert run(warm_python()) == run(sys.executable)
    assert run(warm_python())[0] == 3


def test_programs_know_nothing_of_the_hub_nor_of_one_another():
    code = "import sys; print({m.split('.')[0] for m in sys.modules} & {'transformers', 'huggingface_hub', 'marked'})"
    for _ in range(2):
        done = subprocess.run([warm_python(), "-c", code + "; sys.modules['marked'] = sys"], capture_output=True)
        assert done.stdout == b"set()\n"


def test_an_error_and_a_signal_are_told():
    done = subprocess.run([warm_python(), "-c", "1 / 0"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert subprocess.run([warm_python(), "-c", "import os; os.kill(os.getpid(), 9)"]).returncode != 0


def test_a_program_ends_with_the_one_who_asked_for_it(tmp_path):
    code = "import itertools, time\nfor i in itertools.count(): open('count', 'w').write(str(i)); time.sleep(0.02)"
    asked = subprocess.Popen([warm_python(), "-c", code], cwd=tmp_path)
    while not (tmp_path / "count").exists():
        assert asked.poll() is None
        time.sleep(0.02)
    asked.kill()
    asked.wait()
    time.sleep(0.5)
    stands = (tmp_path / "count").read_text()
    time.sleep(0.2)
    assert (tmp_path / "count").read_text() == stands
