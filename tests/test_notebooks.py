"""The notebooks run from the first cell to the last, in a kernel of their own."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize('path', sorted((ROOT / 'notebooks').glob('*.ipynb')), ids=lambda p: p.stem)
def test_notebook_runs(path, monkeypatch):
  nbformat = pytest.importorskip('nbformat')
  nbclient = pytest.importorskip('nbclient')
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  notebook = nbformat.read(path, as_version=4)
  kernel = nbclient.NotebookClient(
    notebook, timeout=600, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}
  )
  kernel.execute()  # raises CellExecutionError with the traceback of the cell
  outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == 'code']
  images = [o for group in outputs for o in group if 'image/png' in o.get('data', {})]
  assert len(images) == 5
