"""Run notebooks and store their outputs as git wants them: `python tests/store.py nbs/build/19_widgets.ipynb ...`.

A widget lives in a kernel, so what is stored of one is its still picture.
"""
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

LIVE = 'application/vnd.jupyter.widget-view+json'


def store(path: Path):
    "Run a notebook in its folder and write it, without live widgets."
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=None, store_widget_state=False, resources=dict(metadata=dict(path=path.parent))).execute()
    for output in (o for cell in notebook.cells for o in cell.get('outputs', [])): output.get('data', {}).pop(LIVE, None)
    nbformat.write(notebook, path)
    subprocess.run([Path(sys.executable).parent / 'nbdev_clean', '--fname', path], check=True)


if __name__ == '__main__':
    for name in sys.argv[1:]: store(Path(name))
