"""The notebook runs top to bottom; only cells that need the internet are left out."""

import os

import nbformat
from conftest import ROOT
from nbclient import NotebookClient


def test_the_quickstart_runs_top_to_bottom(tmp_path):
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    network = [cell for cell in notebook.cells if "network" in cell.metadata.get("tags", [])]
    assert len(network) == 4
    assert all(line.startswith("#") for cell in network for line in cell.source.splitlines())
    assert not any(cell.get("outputs") for cell in notebook.cells)  # committed without outputs
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = (
        f"flags = ['--max_steps', '2', '--max_eval_samples', '12', '--max_predict_samples', '18', '--cache_dir', "
        f"{str(tmp_path / 'cache')!r}]\noutput_dir = {str(tmp_path / 'out')!r}"
    )
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "notebooks")}},
                   env=os.environ.copy()).execute()  # fmt: skip
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    assert kinds.count("image/png") == 2  # spectrograms and confusion matrix
    assert sum("audio" in str(output.get("data", {}).get("text/html", "")) for output in outputs) == 3
    assert any("test UAR" in output.get("text", "") for output in outputs)
    assert any("anger" in output.get("data", {}).get("text/plain", "") for output in outputs)
