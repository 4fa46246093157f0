"""Run notebooks with nbval and compare the stored outputs of the cells tagged `nbval-check-output` with fresh ones.

    python tests/stored_outputs.py nbs/reproduce/01_depth.ipynb ...

nbdev_clean takes the execution counts out of notebooks, and nbval refuses outputs without one ("Unrun reference cell
has outputs"). So the counts are put back while the notebooks are read; the files stay as they are.
"""
import sys

import nbformat
import pytest

read_as_stored = nbformat.read


def read_with_counts(*args, **kwargs):
    "Read a notebook and number its code cells."
    nb = read_as_stored(*args, **kwargs)
    code = (c for c in nb.cells if c.cell_type == 'code')
    for i, cell in enumerate(code, 1): cell.execution_count = i
    return nb


if __name__ == '__main__':
    nbformat.read = read_with_counts
    sys.exit(pytest.main(['-q', '--nbval-lax', '--nbval-current-env', '-p', 'no:cacheprovider', *sys.argv[1:]]))
