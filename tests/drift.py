"""Fail when notebooks and package have drifted apart, or a notebook is not clean. `make test` runs this
first.

Export and clean run in a temporary copy, so the working tree stays as it is.
"""
import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
TOOLS = Path(sys.executable).parent  # the commands of the running environment


def _read(
    folder: Path,  # where to look, with everything below it
    pattern: str,  # names to take
    base: Path,    # folder that the names are relative to
) -> dict:         # contents by relative name
    "Contents of the files that match, caches and checkpoints left out."
    found = (p for p in folder.rglob(pattern) if p.is_file())
    names = {p.relative_to(base).as_posix(): p for p in found}
    return {n: p.read_bytes() for n, p in names.items() if '.ipynb_checkpoints' not in n
            and '__pycache__' not in n}


def _copy_sources(root: Path, copy: Path, package: str):
    "Copy what export reads: settings, notebooks, and of the package only its `__init__.py`."
    shutil.copytree(root / 'nbs', copy / 'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    for name in ('settings.ini', 'pyproject.toml', f'{package}/__init__.py'):
        if (root / name).exists():
            (copy / name).parent.mkdir(exist_ok=True)
            shutil.copy(root / name, copy / name)


def find_drift(
    root: Path = ROOT,  # a checkout
) -> list:              # one sentence for each thing that is wrong, empty if nothing is
    "Compare a checkout with a fresh export and clean of its notebooks."
    root = Path(root)
    settings = ConfigParser(delimiters=['='], interpolation=None)
    settings.read(root / 'settings.ini', encoding='utf-8')
    package = settings['DEFAULT']['lib_path']
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}  # with IN_TEST set, nbdev exports nothing
    with TemporaryDirectory() as folder:
        copy = Path(folder).resolve() / root.name
        copy.mkdir()
        _copy_sources(root, copy, package)
        for command in ('nbdev_export', 'nbdev_clean'):
            done = subprocess.run([TOOLS / command], cwd=copy, env=env, capture_output=True, text=True,
                                  encoding='utf-8')
            if done.returncode: return [f'{command} failed:\n{done.stdout}{done.stderr}']
        have, want = (_read(base / package, '*.py', base) for base in (root, copy))
        before, after = (_read(base / 'nbs', '*.ipynb', base) for base in (root, copy))
        project = [(base / 'pyproject.toml').read_bytes() for base in (root, copy)]
    wrong = [f'{n} differs from its notebook: run `make export`, or move the edit into the notebook.'
             for n in sorted(have.keys() & want.keys()) if have[n] != want[n]]
    wrong += [f'{n} is missing: run `make export`.' for n in sorted(want.keys() - have.keys())]
    wrong += [f'{n} comes from no notebook: delete it, or write it in a notebook.'
              for n in sorted(have.keys() - want.keys())]
    wrong += [f'{n} is not clean: run `make clean-notebooks`.' for n in sorted(before)
              if before[n] != after[n]]
    if project[0] != project[1]: wrong.append('pyproject.toml differs from settings.ini: run `make export`.')
    return wrong


if __name__ == '__main__':
    drift = find_drift()
    sys.exit('\n'.join(drift) if drift
             else print('Notebooks and package agree, and the notebooks are clean.'))
