"Text files are UTF-8 everywhere, whatever the locale of the machine: every call that opens text says so."
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def without_encoding(source: str) -> list[str]:
    "Calls that open text in whatever encoding the machine prefers."
    tree = ast.parse(re.sub(r'^(\s*)[%!].*$', r'\1pass', source, flags=re.M))
    found = []
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, 'id', '')
        owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ''
        keywords = {k.arg for k in call.keywords}
        if 'encoding' in keywords or None in keywords: continue
        modes = [a.value for a in [*call.args[:2], *(k.value for k in call.keywords if k.arg == 'mode')]
                 if isinstance(a, ast.Constant)]
        binary = any(isinstance(m, str) and re.fullmatch('[rwxa+]*b[rwxa+]*', m) for m in modes)
        opens = (name in ('read_text', 'write_text') and owner
                 or name in ('open', 'fdopen', 'NamedTemporaryFile') and not binary)
        if owner in ('webbrowser', 'os', 'Image') and name == 'open': opens = False
        if opens or name in ('run', 'Popen', 'check_output') and keywords & {'text', 'universal_newlines'}:
            found.append(ast.unparse(call))
    return found


def python_of(path: Path) -> list[str]:
    "The Python in a file: all of it, or the code cells of a notebook."
    text = path.read_text(encoding='utf-8')
    if path.suffix == '.py': return [text]
    return [''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type'] == 'code']


@pytest.mark.parametrize('folder', ['nbs', 'sparsecod', 'tests', 'benchmarks'])
def test_text_is_opened_with_an_encoding(folder):
    paths = [p for kind in ('*.py', '*.ipynb') for p in (ROOT / folder).rglob(kind)
             if '.ipynb_checkpoints' not in p.parts]
    wrong = {p.relative_to(ROOT).as_posix(): calls for p in paths for source in python_of(p)
             if (calls := without_encoding(source))}
    assert paths and not wrong


@pytest.mark.parametrize('source',
                         ['p.read_text()', "p.write_text('a')", 'open(p)', "open(p, 'w')", "p.open('a')",
                                    'subprocess.run(command, text=True)'])
def test_the_check_would_fail(source):
    assert without_encoding(source) == [ast.unparse(ast.parse(source))]


@pytest.mark.parametrize('source', ["open(p, 'rb')", "p.open('r+b')", "p.read_text(encoding='utf-8')",
                                    'write_text(p, text)',
                                    'subprocess.run(command)'])
def test_the_check_lets_pass(source):
    assert not without_encoding(source)
