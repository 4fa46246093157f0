"""Run notebooks and store their outputs as git wants them: `python tests/store.py
nbs/tools/12_widgets.ipynb ...`.

A widget lives in a kernel, so what is stored of one is its still picture. Pictures get a palette of 256
colours, which takes half the room and shows no difference in charts. """
import base64
import io
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

LIVE = 'application/vnd.jupyter.widget-view+json'


def smaller(png: str) -> str:
    "A picture with a palette; both in base 64."
    kept = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB').quantize(256,
                                                                          dither=Image.Dither.NONE).save(kept,
                                                                                                         'png', optimize=True)
    return min(png, base64.b64encode(kept.getvalue()).decode(), key=len)


def store(path: Path):
    "Run a notebook in its folder and write it, without live widgets."
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=None, store_widget_state=False,
                   resources=dict(metadata=dict(path=path.parent))).execute()
    for data in (output.get('data', {}) for cell in notebook.cells for output in cell.get('outputs', [])):
        data.pop(LIVE, None)
        if 'image/png' in data: data['image/png'] = smaller(data['image/png'])
    nbformat.write(notebook, path)
    subprocess.run([Path(sys.executable).parent / 'nbdev_clean', '--fname', path], check=True)


if __name__ == '__main__':
    for name in sys.argv[1:]: store(Path(name))
