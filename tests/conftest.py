"Shared set-up: tests draw no windows and ask no network."
import os
from pathlib import Path

import pytest

os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')


@pytest.fixture(scope='session')
def root() -> Path:
    "The root of the checkout."
    return Path(__file__).resolve().parents[1]


def pytest_addoption(parser):
    parser.addoption('--site', type=Path, metavar='FOLDER',
                     help='tests/test_site.py looks at these rendered pages instead of a preview')
    parser.addoption('--preview', type=Path, metavar='FOLDER',
                     help='tests/test_site.py looks at the preview in this folder and makes none')
