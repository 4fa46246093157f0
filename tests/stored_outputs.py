"""Run notebooks with nbval and compare the stored outputs of the cells tagged `nbval-check-output` with
fresh ones.

    python tests/stored_outputs.py nbs/reproduce/01_depth.ipynb ...

nbdev_clean takes the execution counts out of notebooks, and nbval refuses outputs without one ("Unrun
reference cell has outputs"). So the counts are put back while the notebooks are read; the files stay as
they are. """
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest

read_as_stored = nbformat.read


def read_with_counts(*args, **kwargs):
    "Read a notebook and number its code cells."
    nb = read_as_stored(*args, **kwargs)
    code = (c for c in nb.cells if c.cell_type == 'code')
    for i, cell in enumerate(code, 1): cell.execution_count = i
    return nb


def compare(path: str) -> tuple[int, str]:
    "Run one notebook in a process of its own; exit code and what it printed."
    done = subprocess.run([sys.executable, __file__, path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, encoding='utf-8')
    return done.returncode, done.stdout


if __name__ == '__main__':
    paths = sys.argv[1:]
    if len(paths) == 1:
        nbformat.read = read_with_counts
        sys.exit(pytest.main(['-q', '--nbval-lax', '--nbval-current-env', '-p', 'no:cacheprovider', *paths]))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool: results = list(pool.map(compare, paths))
    for path, (code, text) in zip(paths, results):
        print(f'{path}: ' + (text if code else text.strip().splitlines()[-1]))
    sys.exit(max(code for code, _ in results))
