"The Makefile in folders with awkward names, with a Python that only takes notes."
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FAKE = '''#!/bin/sh
# stands for Python: notes how it was called, and makes an environment as venv does
echo "$@" >> "{notes}"
[ "$2" = venv ] || exit 0
mkdir -p .venv/bin
cp "$0" .venv/bin/python
echo '#!/bin/sh' > .venv/bin/pip
echo "exec $PWD/.venv/bin/python" >> .venv/bin/pip
'''


@pytest.fixture(params=['plain', "o'brien", 'with a space', "it's a $HOME; \"quoted\" (1), 2"])
def clone(request, tmp_path):
    "A folder with the files that the Makefile reads, how to call make in it, and the calls of Python."
    folder, notes, python = tmp_path / request.param, tmp_path / 'notes', tmp_path / 'python'
    folder.mkdir()
    for name in ('Makefile', 'constraints.txt', 'settings.ini', 'pyproject.toml', 'setup.py'):
        shutil.copy(ROOT / name, folder)
    python.write_text(FAKE.format(notes=notes), encoding='utf-8')
    python.chmod(0o755)
    def make(*arguments):
        done = subprocess.run(['make', '--no-print-directory', f'PYTHON={python}', *arguments], cwd=folder,
                              capture_output=True, text=True, encoding='utf-8')
        calls = notes.read_text(encoding='utf-8').splitlines() if notes.exists() else []
        notes.unlink(missing_ok=True)
        return done, calls
    return folder, make


def test_the_environment_is_built_once(clone):
    folder, make = clone
    done, calls = make('env')
    assert done.returncode == 0 and sum('venv' in c
                                        for c in calls) == 1 and sum('install' in c
                                                                     for c in calls) == 2, done.stderr
    done, calls = make('env')
    assert done.returncode == 0 and calls == [], done.stderr                       # nothing to do
    (folder / 'constraints.txt').write_text('other versions\n', encoding='utf-8')
    done, calls = make('env')
    assert done.returncode == 0 and not any('venv' in c
                                            for c in calls) and sum('install' in c
                                                                    for c in calls) == 2, done.stderr


def test_every_recipe_is_one_for_the_shell(clone):
    folder, make = clone
    targets = re.findall(r'^([a-z-]+):.*##', (folder / 'Makefile').read_text(encoding='utf-8'), re.M)
    assert len(targets) > 8
    done, _ = make('--dry-run', *targets)
    assert done.returncode == 0, done.stderr
    checked = subprocess.run(['sh', '-n'], input=done.stdout, cwd=folder, capture_output=True, text=True,
                             encoding='utf-8')
    assert checked.returncode == 0, checked.stderr
