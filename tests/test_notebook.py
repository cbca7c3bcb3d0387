"""The quick tour runs, from its first cell to its last, and has its output where it is read without being run."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "quicktour.ipynb"


def pictures(notebook: nbformat.NotebookNode) -> list[int]:
    """Numbers of the cells that show pictures."""
    found = []
    for number, cell in enumerate(notebook.cells):
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            found.append(number)
    return found


def without_warnings(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Leave out progress bars, and warnings, which name folders of the machine."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


@pytest.mark.real_model
def test_the_quick_tour_runs_and_has_its_pictures(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": tmp_path}}
    NotebookClient(notebook, timeout=600, resources=where, record_timing=False).execute()
    if os.environ.get("WRITE_PICTURES"):
        nbformat.write(without_warnings(notebook), NOTEBOOK)

    kept = nbformat.read(NOTEBOOK, as_version=4)
    assert all(cell.execution_count for cell in kept.cells if cell.cell_type == "code")
    assert "stderr" not in NOTEBOOK.read_text()
    assert pictures(notebook) == pictures(kept)
    assert len(pictures(kept)) == 2
