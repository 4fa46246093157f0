"""The ground the project stands on: chapters' form, imports, packaging, links, and the tools that test all
of it."""
import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml

from drift import find_drift

ROOT = Path(__file__).resolve().parents[1]
TOOLS = Path(sys.executable).parent  # the commands of the running environment
NBS = ROOT / 'nbs'
NOTEBOOKS = sorted(p for p in NBS.rglob('*.ipynb')
                   if not any(part[0] in '._' for part in p.relative_to(NBS).parts))
CHAPTERS = [p for p in NOTEBOOKS if p.parent != NBS]
PROGRESS = re.compile(r'\r|\x1b\[|\d+%\||\bit/s\b|\bs/it\b')  # what tqdm and pip leave in a stored output
LINK = re.compile(r'\]\(\s*<?([^)\s>]+)>?[^)]*\)|(?:src|href)="([^"]+)"')


def settings() -> dict:
    "The fields of settings.ini."
    parser = ConfigParser(delimiters=['='], interpolation=None)
    parser.read(ROOT / 'settings.ini', encoding='utf-8')
    return dict(parser['DEFAULT'])


def name(path: Path) -> str:
    "A file's name from the root, for messages and test ids."
    return path.relative_to(ROOT).as_posix()


def cells(
    path: Path,       # a notebook
    kind: str | None = None, # 'code' or 'markdown'; None takes both
) -> list:            # (number from 1, cell type, source, outputs)
    "The cells of a notebook, empty ones left out."
    loaded = json.loads(path.read_text(encoding='utf-8'))['cells']
    found = [(i, c['cell_type'], ''.join(c['source']), c.get('outputs', [])) for i, c in enumerate(loaded, 1)]
    return [c for c in found if c[2].strip() and kind in (None, c[1])]


def directives(source: str) -> list:
    "The `#|` lines of a cell, without the marker."
    return [line[2:].strip() for line in source.splitlines() if line.startswith('#|')]


def is_hidden(source: str) -> bool:
    "Does the site leave this code cell out?"
    return any(re.match(r'(hide|default_exp|include:\s*false)\b', d) for d in directives(source))


def prose(source: str) -> list:
    "The lines of a markdown cell that are neither headings nor blank."
    return [line for line in source.splitlines() if line.strip() and not line.startswith('#')]


def headings(source: str) -> list:
    "The first-level headings of a markdown cell; a comment in a fenced block is none."
    return re.findall(r'^# .+', re.sub(r'^```.*?^```', '', source, flags=re.M | re.S), flags=re.M)


def run(*command, **options):
    "Run a command at the root of the checkout and capture what it says."
    return subprocess.run(list(map(str, command)),
                          **{'cwd': ROOT, 'capture_output': True, 'text': True, **options})


def best_time(
    code: str,        # Python code that prints seconds
    bound: float,     # good enough: stop here
    tries: int = 4,   # a busy machine gets this many
) -> float:           # the least of the printed seconds
    "Time code in fresh interpreters and take the best of a few tries."
    times = []
    while len(times) < tries and (not times or min(times) >= bound):
        done = run(sys.executable, '-c', code)
        assert done.returncode == 0, done.stderr
        times.append(float(done.stdout.split()[-1]))
    return min(times)


every_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
every_chapter = pytest.mark.parametrize('path', CHAPTERS, ids=name)


# ---- the form of the chapters

@every_notebook
def test_one_title_and_a_description(path):
    first = cells(path)[0]
    titles = [(i, t) for i, _, source, _ in cells(path, 'markdown') for t in headings(source)]
    assert first[1] == 'markdown' and len(
        titles) == 1, f'{name(path)}: want one "# Title" in the first cell, found {titles}'
    assert re.match(r'# .+\n+> .+',
                    first[2]), f'{name(path)}: the first cell is "# Title", then "> one sentence"'


@every_chapter
def test_opens_with_a_paragraph(path):
    shown = [c for c in cells(path) if not (c[1] == 'code' and is_hidden(c[2]))]
    opening = [line for line in prose(shown[0][2]) + prose(shown[1][2]) if not line.startswith('>')]
    assert shown[1][1] == 'markdown' or opening, f'{name(path)}: a paragraph before the first code cell'
    assert len(' '.join(opening).split()) >= 20, f'{name(path)}: say in the opening what the chapter is for'


@every_chapter
def test_prose_between_code(path):
    "In chapters that teach; the tools' pages are to be looked up."
    if path.parent.name == 'tools': return
    in_a_row = []
    for i, kind, source, _ in cells(path):
        if kind == 'markdown': in_a_row = [] if prose(source) else in_a_row
        elif not is_hidden(source): in_a_row.append(i)
        assert len(in_a_row) <= 3, f'{name(path)}: cells {in_a_row} are code without a sentence between them'


@every_chapter
def test_open_code_of_a_page_is_short(path):
    "What is longer is machinery, and folded by the tag `fold`."
    folded = [c['metadata'].get('tags', []).count('fold')
              for c in json.loads(path.read_text(encoding='utf-8'))['cells']]
    lines = [line for i, _, source, _ in cells(path, 'code') for line in source.splitlines()
             if line.strip() and not line.startswith(('#|', 'show_doc(')) and not folded[i - 1]
             and not any(re.match(r'(hide|default_exp|export$|include:\s*false|echo:\s*false)', d)
                         for d in directives(source))]
    assert len(lines) <= 300, f'{name(path)}: {len(lines)} lines of code are open'


def test_lines_of_code_are_short():
    "Of the package, without what nbdev writes at the top of a module; a page shows these lines as they are."
    for path in sorted((ROOT / 'sparsecod').glob('[!_]*.py')):
        written = path.read_text(encoding='utf-8').split('# %% ../nbs', 1)[1]
        long = [line for line in written.splitlines() if len(line) > 110]
        assert not long, f'{name(path)}: break {long}'


@every_notebook
def test_every_cell_is_tested(path):
    for i, kind, source, _ in cells(path):
        off = ([d for d in directives(source) if re.match(r'eval:\s*false', d)] if kind == 'code'
               else re.findall(r'^skip_exec.*', source, re.M))
        assert not off, f'{name(path)}: cell {i} says {off}, so nothing ever runs it; use a test flag'


@every_notebook
def test_stored_outputs_are_fit_to_print(path):
    for i, _, _, outputs in cells(path, 'code'):
        assert all(o['output_type'] != 'error' for o in outputs), f'{name(path)}: cell {i} stores an error'
        texts = [''.join(o.get('text', [])) for o in outputs]
        texts += [''.join(v) for o in outputs for k, v in o.get('data', {}).items() if k == 'text/plain']
        bars = [t[:80] for t in texts if PROGRESS.search(t)]
        assert not bars, f'{name(path)}: cell {i} stores the text of a progress bar: {bars}'


@every_notebook
def test_links_between_notebooks(path):
    for i, _, source, _ in cells(path, 'markdown'):
        missing = missing_files(source, path.parent)
        assert not missing, f'{name(path)}: cell {i} links to {missing}, which does not exist'


def missing_files(
    text: str,      # markdown
    folder: Path,   # the folder that its links start from
) -> list:          # link targets that do not exist
    "Local files that a text links to and that are not there."
    text = re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.S)
    targets = [(a or b).split('#')[0] for a, b in LINK.findall(text)]
    local = [t for t in targets if t and not re.match(r'[a-z][a-z0-9+.-]*:|//', t)]
    return [t for t in local if not (folder / t).exists()]


# ---- the package

def exported_modules() -> dict:
    "Module name -> notebook, in reading order."
    found = {}
    for path in CHAPTERS:
        for _, _, source, _ in cells(path, 'code'):
            for d in directives(source):
                if d.startswith('default_exp '): found[d.split()[1]] = path
    return found


def own_imports(
    code: str,  # Python code; shell and magic lines are skipped
) -> set:       # names of this package's modules that it imports, at any depth of nesting
    "Which modules of the package does this code import?"
    tree = ast.parse('\n'.join(line for line in code.splitlines()
                               if not line.lstrip().startswith(('%', '!'))))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name.split('.')[1] for a in node.names if a.name.startswith('sparsecod.')}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ''
            if node.level: module = f'sparsecod.{module}'.rstrip('.')
            if module == 'sparsecod': found |= {a.name for a in node.names}
            elif module.startswith('sparsecod.'): found.add(module.split('.')[1])
    return found


def test_imports_point_one_way():
    imports = {}
    for module, path in exported_modules().items():
        sources = [source for _, _, source, _ in cells(path, 'code')]
        sources.append((ROOT / 'sparsecod' / f'{module}.py').read_text(encoding='utf-8'))
        imports[module] = {m for source in sources for m in own_imports(source)} - {module}
    # a CycleError names the modules that go round in a circle
    order = list(TopologicalSorter(imports).static_order())
    assert set(exported_modules()) <= set(order)


def test_no_public_name_is_in_two_modules():
    places = {}
    for module in exported_modules():
        for public in importlib.import_module(f'sparsecod.{module}').__all__:
            places.setdefault(public, []).append(module)
    assert not {public: modules for public, modules in places.items() if len(modules) > 1}


def test_package_needs_no_developer_tools():
    tools = [re.split(r'[<>=!~\[]', r)[0] for r in settings()['dev_requirements'].split()] + ['IPython']
    modules = [p.stem for p in sorted((ROOT / 'sparsecod').glob('*.py'))
               if p.stem not in ('__init__', '__main__')]
    code = f'''
import importlib, sys
for tool in {tools}: sys.modules[tool] = None  # importing it now fails
for module in {modules}: importlib.import_module('sparsecod.' + module)
'''
    done = run(sys.executable, '-c', code)
    assert done.returncode == 0, done.stderr


def test_modules_run_no_tests():
    "An assertion in an exported cell would run on every import."
    for path in sorted((ROOT / 'sparsecod').glob('*.py')):
        lines = [node.lineno for node in ast.parse(path.read_text(encoding='utf-8')).body
                 if isinstance(node, ast.Assert)]
        assert not lines, f'{name(path)}: lines {lines} assert at module level; take them out of the exported cell'


def test_core_imports_fast():
    code = '''
import time, torch
start = time.perf_counter()
from sparsecod.core import ModelConfig, Transformer
print(time.perf_counter() - start)
'''
    assert best_time(code, bound=2) < 2  # seconds beyond torch's own import


def test_help_answers_fast():
    done = run(TOOLS / 'sparsecod', '--help')
    assert done.returncode == 0 and 'reproduce' in done.stdout, done.stdout + done.stderr
    code = f'''
import subprocess, time
start = time.perf_counter()
subprocess.run([{str(TOOLS / 'sparsecod')!r}, '--help'], check=True, stdout=subprocess.DEVNULL)
print(time.perf_counter() - start)
'''
    assert best_time(code, bound=2) < 2  # seconds


# ---- the files around it

def project_files() -> list:
    "What git tracks or would track, as paths."
    listed = run('git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard')
    assert listed.returncode == 0, listed.stderr
    return [p for p in (ROOT / n for n in listed.stdout.split('\0') if n) if p.is_file()
            and not p.is_symlink()]


def test_every_figure_is_stored():
    missing = []
    for path in sorted((ROOT / 'nbs').rglob('*.ipynb')):
        for i, cell in enumerate(json.loads(path.read_text(encoding='utf-8'))['cells']):
            if cell['cell_type'] != 'code' or '#| fig-alt' not in ''.join(cell['source']): continue
            if not any('image/' in kind for output in cell['outputs'] for kind in output.get('data', {})):
                missing.append((name(path), i))
    assert not missing


def test_no_machine_paths():
    home = re.compile('|'.join([r'(?<![\w.~/])/(?:home|Users)/[a-z]\w+/', r'(?<![\w.~])/[r]oot/',
                                r'[A-Z]:\\+Users\\']))
    own = [str(p) for p in (ROOT, Path.home()) if len(p.parts) > 2]
    found = []
    for path in project_files():
        text = path.read_bytes().decode('utf-8', errors='ignore')
        found += [f'{name(path)}: {hit}' for hit in home.findall(text) + [o for o in own if o in text]]
    assert not found, found


def test_readme_links():
    readme = ROOT / 'README.md'
    missing = missing_files(readme.read_text(encoding='utf-8'), ROOT)
    assert not missing, f'README.md links to {missing}'


def test_readme_example_runs(tmp_path):
    example = re.findall(r'^```python\n(.*?)^```', (ROOT / 'README.md').read_text(encoding='utf-8'),
                         flags=re.M | re.S)
    assert example, 'README.md shows the library in use'
    done = run(sys.executable, '-c', example[0], cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr


def test_one_quarto_file():
    assert [name(p) for p in project_files()
            if p.name
            == '_quarto.yml'] == ['_quarto.yml'], 'nbs/_quarto.yml is a copy that make docs makes; git ignores it'
    site = yaml.safe_load((ROOT / '_quarto.yml').read_text(encoding='utf-8'))
    assert site['project']['output-dir'] == settings()['doc_path']
    assert site['format']['html']['html-math-method'] == 'mathml'  # MathJax would come from another host
    assert site['format']['html']['html-table-processing'] == 'none'  # scripts in raw HTML stay whole
    for theme in site['format']['html']['theme'].values():
        sheet = [NBS / t for t in theme if t.endswith('.scss')]
        assert sheet and '$web-font-path: false;' in sheet[0].read_text(
            encoding='utf-8'), f'{theme} would load web fonts'


def listed(contents: list) -> list:
    "The files of a sidebar, in order."
    return [f for c in contents for f in ([c] if isinstance(c, str) else listed(c.get('contents') or []))]


def test_sidebar_lists_every_page():
    site = yaml.safe_load((ROOT / '_quarto.yml').read_text(encoding='utf-8'))
    pages = listed(site['website']['sidebar']['contents'])
    assert pages == sorted(pages, key=lambda p: (['index.ipynb', 'build', 'reproduce', 'beyond', 'reference',
                                                  'tools'].index(p.split('/')[0]), p))
    assert set(pages) == {p.relative_to(NBS).as_posix()
                          for p in NOTEBOOKS}, 'sidebar in _quarto.yml and files in nbs/ disagree'


def test_versions_are_pinned_and_agree():
    pins = [line.split('#')[0].strip()
            for line in (ROOT / 'constraints.txt').read_text(encoding='utf-8').splitlines()]
    assert all(re.fullmatch(r'[A-Za-z0-9._-]+==[A-Za-z0-9.]+', pin) for pin in pins
               if pin), 'one plain pin a line, no local tags'
    names = {pin.split('==')[0].lower().replace('_', '-') for pin in pins if pin}
    wanted = f"{settings()['requirements']} {settings()['dev_requirements']}".split()
    assert {re.split(r'[<>=!~\[]', w)[0].lower().replace('_', '-') for w in wanted} <= names
    assert yaml.safe_load(
        (ROOT / 'CITATION.cff').read_text(encoding='utf-8'))['version'] == settings()['version']


def test_workflows_pin_what_they_use():
    for path in sorted((ROOT / '.github' / 'workflows').glob('*.yml')):
        text = path.read_text(encoding='utf-8')
        assert yaml.safe_load(text)['jobs']
        loose = [u for u in re.findall(r'uses:\s*(\S+)', text) if not re.search(r'@[0-9a-f]{40}$', u)]
        assert not loose, f'{name(path)}: name the full commit of {loose}'
        assert 'latest' not in text, f'{name(path)}: pin the machine and the tools'


# ---- the tools that test all of it

def test_canary():
    "nbdev's test command must fail on a false assertion, also beside a notebook that passes."
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    both = run(TOOLS / 'nbdev_test', '--path', 'tests/fixtures', '--n_workers', 2, env=env)
    failed = both.stderr.split('Failed On The Following Notebooks')[-1]
    assert both.returncode == 1 and 'the canary sings' in both.stderr, both.stdout + both.stderr
    assert 'canary.ipynb' in failed and 'sane.ipynb' not in failed


@pytest.fixture
def small_project(tmp_path) -> Path:
    "A project of two notebooks, exported and clean."
    root = tmp_path / 'sparsecod'
    (root / 'nbs').mkdir(parents=True)
    shutil.copy(ROOT / 'settings.ini', root)
    code = dict(cell_type='code', execution_count=None, metadata={}, outputs=[])
    nb = dict(metadata={}, nbformat=4, nbformat_minor=5, cells=[
        dict(code, id='a', source=['#| default_exp one']),
        dict(code, id='b', source=['#| export\n', 'answer = 42'])])
    (root / 'nbs' / '01_one.ipynb').write_text(json.dumps(nb), encoding='utf-8')
    nb['cells'][0]['source'] = ['#| default_exp two']
    (root / 'nbs' / '02_two.ipynb').write_text(json.dumps(nb), encoding='utf-8')
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    for command in ('nbdev_export', 'nbdev_clean'):
        assert run(TOOLS / command, cwd=root, env=env).returncode == 0
    return root


def test_stale_outputs_are_found(tmp_path):
    "A tagged cell's stored output must equal a fresh one; other cells only have to run."
    def cell(name, stored, **metadata):
        output = dict(output_type='execute_result', execution_count=None, metadata={},
                      data={'text/plain': [stored]})
        return dict(cell_type='code', id=name, execution_count=None, source=['2 + 2'], outputs=[output],
                    metadata=metadata)
    tagged = dict(tags=['nbval-check-output'])
    cells = [cell('true', '4', **tagged), cell('stale', '5', **tagged), cell('unchecked', '5')]
    notebook = tmp_path / 'stored.ipynb'
    notebook.write_text(json.dumps(dict(metadata={}, nbformat=4, nbformat_minor=5, cells=cells)),
                        encoding='utf-8')
    done = run(sys.executable, ROOT / 'tests' / 'stored_outputs.py', notebook, cwd=tmp_path)
    assert done.returncode and '1 failed, 2 passed' in done.stdout and 'Cell 1' in done.stdout, done.stdout + done.stderr


def test_drift_is_found(small_project):
    module, notebook = small_project / 'sparsecod' / 'one.py', small_project / 'nbs' / '01_one.ipynb'
    module.write_text(module.read_text(encoding='utf-8').replace('42', '43'), encoding='utf-8')
    (small_project / 'sparsecod' / 'left_over.py').write_text('', encoding='utf-8')
    nb = json.loads(notebook.read_text(encoding='utf-8'))
    nb['cells'][1]['execution_count'] = 7
    notebook.write_text(json.dumps(nb), encoding='utf-8')
    (small_project / 'sparsecod' / 'two.py').unlink()
    drift = '\n'.join(find_drift(small_project))
    for sentence in ('sparsecod/one.py differs', 'sparsecod/left_over.py comes from no notebook',
                     'sparsecod/two.py is missing', 'nbs/01_one.ipynb is not clean'):
        assert sentence in drift
    assert '02_two.ipynb' not in drift and len(drift.splitlines()) == 4


def test_readme_says_what_results_say():
    import readme
    _, inside, _ = readme.parts(readme.README.read_text(encoding='utf-8'))
    assert inside == readme.findings(), 'run `make readme`'


@pytest.mark.parametrize('path', sorted((ROOT / 'benchmarks').rglob('*.py')), ids=lambda path: path.stem)
def test_benchmarks_find_what_they_import(path):
    "Every name that a benchmark takes from the package is there."
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('sparsecod'):
            module = importlib.import_module(node.module)
            assert [a.name for a in node.names if not hasattr(module, a.name)] == [], node.module
