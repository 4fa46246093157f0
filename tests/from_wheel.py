"""Install a wheel into an empty environment and run the README's example there: python tests/from_wheel.py
dist/sparsecod-0.1.0-py3-none-any.whl"""
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if __name__ == '__main__':
    wheel, = (Path(name).resolve() for name in sys.argv[1:])
    example, = re.findall(r'^```python\n(.*?)^```', (ROOT / 'README.md').read_text(encoding='utf-8'),
                          flags=re.M | re.S)
    with tempfile.TemporaryDirectory() as folder:
        venv.create(Path(folder) / 'env', with_pip=True)
        python = Path(folder) / 'env' / ('Scripts' if sys.platform == 'win32' else 'bin') / 'python'
        subprocess.run([python, '-m', 'pip', 'install', '--quiet', '-c', ROOT / 'constraints.txt', wheel],
                       check=True, cwd=folder)
        subprocess.run([python, '-m', 'pip', 'check'], check=True, cwd=folder)
        subprocess.run([python, '-c', example], check=True, cwd=folder)
