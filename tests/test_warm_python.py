"""What is forked behaves as a Python that was started, to the program inside it and to the one who asked for it."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from warm_python import DIED, warm_python

PRINTED = """
import os, sys
print(__name__, globals().get("__file__"), sys.path[0], sys.argv, os.getcwd(), os.environ["A"], "HOME" in os.environ)
sys.exit(3)
"""


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
    code = """
import sys
unknown = {"modeling_pcm_ensemble", "transformers", "huggingface_hub", "marked"}
print({module.split(".")[0] for module in sys.modules} & unknown)
sys.modules["marked"] = sys
"""
    for _ in range(2):
        assert subprocess.run([warm_python(), "-c", code], capture_output=True).stdout == b"set()\n"


def test_an_error_and_a_signal_are_told():
    done = subprocess.run([warm_python(), "-c", "1 / 0"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert subprocess.run([warm_python(), "-c", "import os; os.kill(os.getpid(), 9)"]).returncode == -9 % 256


def test_a_program_ends_with_the_one_who_asked_for_it(tmp_path):
    code = "import itertools, time\nfor i in itertools.count(): open('count', 'w').write(str(i)); time.sleep(0.02)"
    asked = subprocess.Popen([warm_python(), "-c", code], cwd=tmp_path, stdout=subprocess.PIPE)
    while not (tmp_path / "count").exists():
        assert asked.poll() is None
        time.sleep(0.02)
    asked.kill()
    asked.communicate()  # until the program has closed its end
    stands = (tmp_path / "count").read_text()
    time.sleep(0.2)
    assert (tmp_path / "count").read_text() == stands


def test_where_no_process_listens_any_more_it_is_said(tmp_path):
    (tmp_path / "python").write_text("")
    script = Path(__file__).with_name("warm_python.py")
    command = [sys.executable, str(script), "ask", str(tmp_path / "python"), "-c", ""]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == DIED
