"""Check the documentation as far as that goes without Quarto: `make docs-check`, which is part of `make
test-all`.

    python tests/docs_check.py
    python tests/docs_check.py --pages FOLDER [--check]

Every notebook goes through nbdev's processing, is put together as Quarto does it, and then goes through
pandoc, the engine inside Quarto, into a temporary folder. Of the pages this checks that links, anchors,
images, citations and cross-references resolve, that formulas parse (by pandoc and by KaTeX), that each page
has its title, description and opening, and as a chapter its exercises, that displayed equations have a
label and figures a text for those who do not see them, that nothing asks another host, that links of names
lead to what the page means, that scripts and drawings arrive as they were stored, and that explorers show
what Python gives now. Nothing is skipped: what is needed and not there ends the check with a sentence that
says what to do.

The second form writes the pages into a folder, to be read in a browser, and checks them only if asked. That
is a preview and not the page that Quarto makes: text, formulas, figures, explorers and links are the site's,
the layout is not.

Pandoc comes in the package pypandoc-binary, node in playwright, and KaTeX in jupyterlab.
"""
import argparse
import importlib.util
import itertools
import json
import math
import os
import posixpath
import re
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from dataclasses import dataclass, field
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).resolve().parents[1]
# a comment in the page, followed by the number of the cell that what comes next is from
MARK = 'docs-check cell '
CROSS_REFERENCES = 'eq fig tbl sec lst thm lem cor prp cnj def exm exr sol rem alg nte tip wrn imp cau vid'.split()
LABEL = re.compile(rf'\{{#((?:{"|".join(CROSS_REFERENCES)})-[\w.:-]+)[^}}]*\}}')
# a formula to the eye, but not to pandoc
STRAY = re.compile(r'\$\$|\$[^$]*(?:\\[a-zA-Z]|\^|_\{|\b[A-Za-z]_[A-Za-z0-9]\b)[^$]*\$')
OPTIONS = re.compile(r'(?:#\|.*\n?)*')  # at the start of a code cell
FETCHED = {  # attributes whose address a browser asks for by itself
    'audio': ['src'], 'embed': ['src'], 'feimage': ['href', 'xlink:href'], 'iframe': ['src'],
    'image': ['href', 'xlink:href'],
    'img': ['src', 'srcset'], 'input': ['src'], 'link': ['href'], 'object': ['data'], 'script': ['src'],
    'source': ['src', 'srcset'], 'track': ['src'], 'use': ['href', 'xlink:href'], 'video': ['src', 'poster']}
# rel of a <link> that only says something
NOT_FETCHED = {'canonical', 'alternate', 'author', 'license', 'help', 'next', 'prev'}
STYLE_ASKS = re.compile(r'''(?:@import\s*|url\(\s*)["']?\s*((?:https?:)?//[^"')\s]+)''', re.I)
SCRIPT_ASKS = re.compile(r'''(?:\b(?:fetch|import|importScripts|WebSocket|EventSource|Worker|sendBeacon|open)\s*\(|\bimport\b[^;'"`]*|\bfrom|\.(?:src|href)\s*=)'''
                         r'''[^;\n]{0,40}?["'`]((?:https?:|wss?:)?//[^"'`\s]+)''')
HTML_TAGS = set('''a abbr address area article aside audio b base bdi bdo blockquote body br button canvas caption cite code col colgroup data datalist dd del
    details dfn dialog div dl dt em embed fieldset figcaption figure footer form h1 h2 h3 h4 h5 h6 head header hgroup hr html i iframe img input ins kbd label legend
    li link main map mark menu meta meter nav noscript object ol optgroup option output p picture pre progress q rp rt ruby s samp script search section select slot
    small source span strong style sub summary sup table tbody td template textarea tfoot th thead time title tr track u ul var video wbr svg math'''.split())
# must end where they begin
CLOSED = ('a', 'blockquote', 'details', 'div', 'figure', 'iframe', 'ol', 'section', 'span', 'summary', 'svg',
          'table', 'ul')
BRINGS_REQUIRE = ('text/html', 'application/javascript', 'application/vnd.jupyter.widget-view+json')
KATEX = '''
const [chunk, input] = process.argv.slice(1), read = f => require('fs').readFileSync(f, 'utf8')
globalThis.self = globalThis
require(chunk)
const modules = Object.assign({}, ...Object.keys(globalThis).filter(k => /packChunk/.test(k)).flatMap(k => globalThis[k].map(c => c[1])))
const load = id => { const m = { exports: {} }; modules[id](m, m.exports, load); return m.exports }
load.d = (to, from) => { for (const k in from) Object.defineProperty(to, k, { enumerable: true, get: from[k] }) }
load.r = () => {}
const katex = Object.keys(modules).map(load).map(m => m.default ?? m).find(m => m.renderToString)
const fault = ([tex, displayMode]) => {
  try { katex.renderToString(tex, { displayMode, throwOnError: true, strict: 'ignore', trust: true }); return null }
  catch (e) { return e.message } }
console.log(JSON.stringify(JSON.parse(read(input)).map(fault)))
'''


class Missing(Exception):
    "Something that the check needs is not there."


class Problem(NamedTuple):
    "One thing that is wrong."
    file: str          # from the root
    cell: int | None   # number in the notebook, from 1; None: the file as a whole
    text: str          # what is wrong

    def __str__(self): return f'{self.file}: ' + (f'cell {self.cell}: ' if self.cell else '') + self.text


# ---- the tools

def pandoc_path() -> str:
    "Where pandoc is."
    try:
        import pypandoc
        return pypandoc.get_pandoc_path()
    except (ImportError, OSError):
        raise Missing(f'pandoc is missing: run `make env`, or `{sys.executable} -m pip install -c '
                      f'constraints.txt pypandoc-binary`') from None


def node_path() -> str:
    "Where node is: playwright brings one."
    try:
        from playwright._impl._driver import compute_driver_executable
        return str(compute_driver_executable()[0])
    except ImportError:
        raise Missing(f'node is missing: run `make env`, or `{sys.executable} -m pip install -c '
                      f'constraints.txt playwright`') from None


def katex_path() -> Path:
    "The file of JupyterLab that holds KaTeX."
    found = importlib.util.find_spec('jupyterlab')
    if not found:
        raise Missing(f'KaTeX is missing: run `make env`, or `{sys.executable} -m pip install -c '
                      f'constraints.txt jupyterlab`')
    holding = [p for p in sorted((Path(found.origin).parent / 'static').glob('*.js'))
               if b'"KaTeX parse error: "' in p.read_bytes()]
    if not holding:
        raise Missing(
            'This jupyterlab does not bring KaTeX: install the version in constraints.txt with `make env`.')
    return holding[0]


def pandoc(
    text: str,     # what to convert
    source: str,   # its format
    *options: str, # such as '--mathml'
) -> tuple:        # HTML, and the messages from the kind `information` up, each a dict
    "Convert to HTML and collect every message."
    with TemporaryDirectory() as folder:
        log = Path(folder) / 'log.json'
        command = [pandoc_path(), '-f', source, '-t', 'html', '--syntax-highlighting=none', f'--log={log}',
                   *options]
        done = subprocess.run(command, input=text, capture_output=True, text=True, encoding='utf-8')
        messages = json.loads(log.read_text(encoding='utf-8')) if log.exists() and log.stat().st_size else []
    if done.returncode:
        messages.append(dict(type='Error', verbosity='ERROR',
                             pretty=done.stderr.strip() or f'pandoc ended with {done.returncode}'))
    return done.stdout, messages


def katex_faults(
    formulas: list,  # pairs: TeX, and whether it stands on a line of its own
) -> list:           # for each what KaTeX finds wrong, or None
    "Parse formulas with KaTeX."
    if not formulas: return []
    with TemporaryDirectory() as folder:
        given = Path(folder) / 'formulas.json'
        given.write_text(json.dumps(formulas), encoding='utf-8')
        done = subprocess.run([node_path(), '-e', KATEX, str(katex_path()), str(given)], capture_output=True,
                              text=True, encoding='utf-8')
    if done.returncode:
        raise Missing(f'KaTeX of the installed jupyterlab does not run; install the versions in '
                      f'constraints.txt with `make env`.\n{done.stderr}')
    return json.loads(done.stdout)


# ---- what there is

@dataclass
class Site:
    "A checkout with its settings."
    root: Path
    settings: dict                              # settings.ini
    quarto: dict                                # _quarto.yml
    pages: dict = field(default_factory=dict)   # path of the notebook from the folder of notebooks -> Page

    @property
    def nbs(self) -> Path: return self.root / self.settings['nbs_path']

    def name(self, path: str) -> str:
        "The name of a notebook in messages."
        return f"{self.settings['nbs_path']}/{path}"


@dataclass
class Page:
    "One processed notebook and what its page holds."
    path: str               # from the folder of notebooks
    source: dict            # the notebook as it is stored
    notebook: dict          # as nbdev processed it
    fault: str = ''         # why nbdev could not process it whole
    meta: dict = field(default_factory=dict)  # front matter
    labels: list = field(default_factory=list)  # of code cells
    text: str = ''          # the page as one markdown document
    pictures: dict = field(default_factory=dict)  # stored pictures: name -> data address
    rendered: str = ''      # HTML by pandoc
    html: 'Reader' = None
    messages: list = field(default_factory=list)  # pairs: cell, what pandoc says

    @property
    def output(self) -> str:
        "Where the page is written, from the root of the site."
        return posixpath.join(posixpath.dirname(self.path), self.meta.get('output-file')
                              or posixpath.basename(self.path).replace('.ipynb', '.html'))

    def numbers(self) -> list:
        """For each processed cell its number in the notebook; what nbdev put in has the number of the cell
        before."""
        number, last, found = {c.get('id'): i for i, c in enumerate(self.source['cells'], 1)}, 1, []
        for cell in self.notebook['cells']:
            last = number.get(cell.get('id'), last)
            found.append(last)
        return found


def is_hidden_name(path: Path) -> bool:
    "Files that nbdev and Quarto leave out."
    return any(part[0] in '._' for part in path.parts)


def read_site(
    root: Path,  # a checkout
) -> Site:
    "Read the settings."
    parser = ConfigParser(delimiters=['='], interpolation=None)
    parser.read(root / 'settings.ini', encoding='utf-8')
    return Site(root, dict(parser['DEFAULT']),
                yaml.safe_load((root / '_quarto.yml').read_text(encoding='utf-8')))


# ---- nbdev

def process_notebooks(
    target: Path,  # folder for the processed notebooks
):
    """Run nbdev's processing, the function behind `nbdev_proc_nbs`, in this process; the working folder is
    the root of the checkout."""
    from nbdev.config import get_config
    from nbdev.processors import FilterDefaults
    from nbdev.serve_drv import main

    class WithoutDocs(FilterDefaults):
        "For what can still be seen of a notebook whose documentation fails."
        def base_procs(self):
            return [p for p in super().base_procs() if p.__name__ not in ('add_show_docs', 'exec_show_docs')]

    nbs, faults = get_config().nbs_path, {}
    for path in sorted(nbs.rglob('*.ipynb')):
        name = path.relative_to(nbs)
        if is_hidden_name(name): continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try: main((path, target / name, FilterDefaults))
        except Exception as fault:
            said = re.sub(r' in cell \d+ :', ':', str(fault))  # a number that counts the processed cells
            faults[name.as_posix()] = said + (f' ({type(fault.__cause__).__name__}: {fault.__cause__})'
                                              if fault.__cause__ else '')
            main((path, target / name, WithoutDocs))
    (target / 'faults.json').write_text(json.dumps(faults), encoding='utf-8')


def read_pages(
    site: Site,
    target: Path,  # an empty folder
) -> dict:         # path from the folder of notebooks -> Page
    "Process all notebooks in a process of their own and read what came out."
    env = ({k: v for k, v in os.environ.items() if k != 'IN_TEST'}
           | dict(OMP_NUM_THREADS='1', MPLBACKEND='Agg', HF_HUB_OFFLINE='1'))
    done = subprocess.run([sys.executable, str(Path(__file__).resolve()), '--process', str(target)],
                          cwd=site.root, env=env, capture_output=True, text=True, encoding='utf-8')
    if done.returncode:
        raise Missing(f'The processing by nbdev ended with an error:\n{done.stdout}{done.stderr}')
    faults, read = (json.loads((target / 'faults.json').read_text(encoding='utf-8')),
                    lambda p: json.loads(p.read_text(encoding='utf-8')))
    paths = sorted(p.relative_to(target).as_posix() for p in target.rglob('*.ipynb'))
    return {p: Page(p, read(site.nbs / p), read(target / p), faults.get(p, '')) for p in paths}


# ---- from a processed notebook to a page

def joined(
    text,      # a string, or a list of lines
) -> str:
    "Text of a notebook's field."
    return ''.join(text)


def options(
    source: str,  # of a code cell
) -> dict:
    "The options of a cell, its first lines that start with #|, as YAML."
    lines = OPTIONS.match(source)[0].splitlines()
    found = yaml.safe_load('\n'.join(line[2:] for line in lines)) if lines else {}
    if not isinstance(found or {}, dict): raise yaml.YAMLError(f'these are no options: {found!r}')
    return found or {}


def fenced(
    text: str,       # what to show as it stands
    kind: str = '',  # what follows the fence
) -> str:            # a fenced block
    "A block with a fence longer than any inside."
    fence = '`' * max(3, 1 + max((len(run) for run in re.findall('`+', text)), default=0))
    return f'{fence}{kind}\n{text.rstrip()}\n{fence}'


def output_text(
    output: dict,   # of a code cell
    page: Page,     # that it belongs to; pictures are kept there
    alt: str = '',  # what a picture shows, in words
) -> str:           # markdown
    "What Quarto shows of an output."
    if output['output_type'] == 'stream': return fenced(joined(output['text']))
    if output['output_type'] == 'error': return fenced('\n'.join(output.get('traceback', [])))
    data = output.get('data', {})
    if 'text/html' in data: return fenced(joined(data['text/html']), '{=html}')
    if 'text/markdown' in data: return joined(data['text/markdown'])
    if 'image/svg+xml' in data: return fenced(joined(data['image/svg+xml']), '{=html}')
    for kind in data:
        if not kind.startswith('image/'): continue
        name = f'data:image/png,{len(page.pictures)}-'  # short, for pandoc
        page.pictures[name] = f'data:{kind};base64,{"".join(joined(data[kind]).split())}'
        return f'![]({name})' + (f'{{alt={json.dumps(alt, ensure_ascii=False)}}}' if alt else '')
    return fenced(joined(data.get('text/plain', '')))


def is_picture(output: dict) -> bool:
    "Is an output a stored picture that is shown as such?"
    data = output.get('data', {})
    return (any(kind.startswith('image/') for kind in data)
            and not data.keys() & {'text/html', 'text/markdown'})


def cell_text(
    cell: dict,   # processed
    page: Page,   # that it belongs to; labels are noted there
) -> str:         # markdown
    "A cell as Quarto puts it into the page."
    source = joined(cell['source'])
    if cell['cell_type'] != 'code': return source
    o = options(source)
    if o.get('include') is False: return ''
    if o.get('label'): page.labels.append(str(o['label']))
    shown = ([] if o.get('echo') is False
             else [fenced(source[OPTIONS.match(source).end():], '{.python .cell-code}')])
    alts = o.get('fig-alt') or ''
    alts = iter(alts) if isinstance(alts, list) else itertools.repeat(str(alts))
    results = ([] if o.get('output') is False
               else [output_text(out, page, next(alts, '') if is_picture(out) else '')
                     for out in cell.get('outputs', [])])
    if o.get('output') == 'asis': return '\n\n'.join(shown + results)
    return '\n\n'.join([f'::: {{#{cell.get("id", "none")} .cell}}', *shown,
                        *(f'::: {{.cell-output}}\n\n{r}\n\n:::' for r in results), ':::'])


def compose(
    page: Page,
) -> tuple:     # markdown, and for each of its lines the number of the cell
    "Put a processed notebook together as one markdown document, with a mark before each cell."
    parts, cells = [], []
    for number, cell in zip(page.numbers(), page.notebook['cells']):
        try: text = cell_text(cell, page)
        except yaml.YAMLError as fault:
            page.messages.append((number, f'the options of the cell (lines with #|) are not YAML: {fault}'))
            continue
        if not parts and cell['cell_type'] == 'raw' and (front := re.match(r'---\n(.*?)\n---', text, re.S)):
            page.meta = yaml.safe_load(front[1]) or {}
        else: text = f'```{{=html}}\n<!-- {MARK}{number} -->\n```\n\n{text}'
        parts.append(f'{text}\n\n')
        cells += [number] * parts[-1].count('\n')
    return ''.join(parts), cells


class Reader(HTMLParser):
    "What a page holds, each with the cell it comes from."
    BLOCKS = {'p', 'li', 'td', 'th', 'dd', 'dt', 'div', 'section', 'figure', 'figcaption', 'table', 'pre',
              'details', 'summary', 'blockquote', *(f'h{i}' for i in range(1, 7))}
    # their text is not prose
    QUIET = {'pre', 'code', 'script', 'style', 'annotation', 'math', 'svg', 'textarea'}

    def __init__(self, text: str, cell: int | None = None):
        super().__init__()
        self.cell, self.inside, self.prose = cell, Counter(), []
        self.ids, self.links, self.fetched, self.cites, self.formulas, self.headings, self.labels, self.asks, self.strays = {}, [], [], [], [], [], [], [], []
        self.dashes = []
        self.odd_tags, self.open, self.unclosed = [], [], []
        # cells of displayed formulas without a label; the cell of one that may still get it
        self.bare, self.unlabelled = [], None
        self.tex, self.display, self.unread, self.opening, self.opened = None, False, False, 0, False
        self.feed(text)
        self.close()
        self.flush()
        self.unclosed += [(cell, f'<{tag}> is never closed') for tag, cell in self.open]

    def handle_comment(self, text):
        if text.strip().startswith(MARK):
            self.flush()
            self.cell = int(text.strip()[len(MARK):])

    def handle_startendtag(self, tag, attributes): self.start(tag, dict(attributes))

    def handle_starttag(self, tag, attributes):
        self.start(tag, dict(attributes))
        self.inside[tag] += 1
        if tag in CLOSED: self.open.append((tag, self.cell))

    def handle_endtag(self, tag):
        if tag in self.BLOCKS: self.flush()
        if tag == 'span': self.unread = False
        if tag == 'annotation' and self.tex is not None:
            self.formulas.append((self.cell, ''.join(self.tex), self.display))
            self.tex = None
        if tag == 'math' and self.display: self.unlabelled = self.cell or 0
        self.inside[tag] = max(0, self.inside[tag] - 1)
        if tag in CLOSED: self.close_tag(tag)

    def close_tag(self, tag):
        "Note tags that end without a beginning, or around others that have not ended."
        if tag not in [t for t, _ in self.open]:
            self.unclosed.append((self.cell, f'</{tag}> closes nothing'))
            return
        while self.open[-1][0] != tag:
            left, cell = self.open.pop()
            self.unclosed.append((cell, f'<{left}> is not closed before </{tag}>'))
        self.open.pop()

    def start(self, tag, a):
        if tag not in HTML_TAGS and '-' not in tag and not self.inside['svg'] and not self.inside['math']:
            self.odd_tags.append((self.cell, tag))
        if tag in self.BLOCKS: self.flush()
        if tag in ('table', 'pre', 'svg',
                   'img') or re.fullmatch('h[1-6]', tag) or 'cell' in (a.get('class') or '').split():
            self.opened = True
        if a.get('id'): self.ids.setdefault(a['id'], []).append(self.cell)
        if tag == 'a' and a.get('name'): self.ids.setdefault(a['name'], []).append(self.cell)
        if tag in ('a', 'area') and 'href' in a: self.links.append((self.cell, a['href'] or ''))
        if re.fullmatch('h[1-6]', tag): self.headings.append((self.cell, int(tag[1])))
        if tag == 'span' and 'citation' in (a.get('class') or '').split():
            self.cites += [(self.cell, key) for key in (a.get('data-cites') or '').split()]
        # pandoc could not read it, and says so
        if tag == 'span' and 'math' in (a.get('class') or '').split(): self.unread = True
        if tag == 'math': self.display = a.get('display') == 'block'
        if tag == 'annotation' and a.get('encoding') == 'application/x-tex': self.tex = []
        if a.get('style'):
            self.asks += [(self.cell, f'style="...{host}"') for host in STYLE_ASKS.findall(a['style'])]
        if tag == 'iframe' and a.get('srcdoc'): self.asks += Reader(a['srcdoc'], self.cell).everything_asked()
        if tag == 'link' and set((a.get('rel') or '').split()) & NOT_FETCHED: return
        for name in FETCHED.get(tag, []):
            if a.get(name):
                self.fetched += [(self.cell, tag, name, part.split()[0])
                                 for part in (a[name].split(', ') if name == 'srcset' else [a[name]])]

    def handle_data(self, text):
        if self.unlabelled is not None and text.strip(): self.want_label(text)
        if self.inside['annotation'] and self.tex is not None: self.tex.append(text)
        elif self.inside['style']:
            self.asks += [(self.cell, f'<style> with {host}') for host in STYLE_ASKS.findall(text)]
        elif self.inside['script']:
            self.asks += [(self.cell, f'<script> that asks {host}') for host in SCRIPT_ASKS.findall(text)]
        if not self.unread and not any(self.inside[tag] for tag in self.QUIET): self.prose.append(text)
        if self.inside['p'] and not self.opened: self.opening += len(text.split())

    def want_label(self, text: str = ''):
        "A displayed formula has ended, and this is what comes next in its paragraph."
        if not re.match(r'\s*\{#eq-', text): self.bare.append(self.unlabelled or None)
        self.unlabelled = None

    def flush(self):
        "A block of prose ends: look for labels, and for formulas that were not taken as such."
        if self.unlabelled is not None: self.want_label()
        text, self.prose = ''.join(self.prose), []
        self.labels += LABEL.findall(text)
        self.strays += [(self.cell, stray) for stray in STRAY.findall(text)]
        self.dashes += [(self.cell, option) for option in OPTION.findall(text)]

    def everything_asked(self) -> list:
        "Pairs: cell, and what asks another host."
        return self.asks + [(cell, f'<{tag} {name}="{to}">') for cell, tag, name, to in self.fetched
                            if re.match(r'(?:https?:)?//', to.strip(), re.I)]


RAW = re.compile(r'<(script|style|svg)\b.*?</\1>', re.S | re.I)
HARMED = re.compile(r'</?table\b|\{\{<', re.I)  # what Quarto looks for in raw HTML: tables and shortcodes
OPTION = re.compile(r'(?:^|(?<=\s))–[a-z][\w-]*')  # two hyphens that pandoc took for a dash
# only information to pandoc, but text is lost
SHOWN_NOT_RENDERED = ('BlockNotRendered', 'InlineNotRendered', 'SkippedContent')


def note_messages(
    page: Page,
    messages: list,   # from `pandoc`
    text: str = '',   # what pandoc read
    cells: list = (), # for each line of it the cell
):
    "Keep pandoc's warnings with the cells they are about."
    for m in messages:
        if m['verbosity'] not in ('WARNING', 'ERROR') and m['type'] not in SHOWN_NOT_RENDERED: continue
        raw = (m['contents']['c'][1] if isinstance(m.get('contents'), dict)
               and m['contents'].get('t', '').startswith('Raw') else m.get('contents'))
        at = text.find(raw) if isinstance(raw, str) and raw.strip() else -1
        line = text[:at].count('\n') if at >= 0 else m.get('line', 0) - 1
        says = re.sub(r'\s+', ' ', m.get('pretty') or m.get('message') or m['type']).split(' expecting ')[0]
        page.messages.append((cells[line] if 0 <= line < len(cells) else None,
                              f'pandoc says: {textwrap.shorten(says, 240)}'))


def numbered(
    notebook: dict,
) -> dict:          # a copy
    "Pandoc reads no result without an execution count, and nbdev_clean takes the counts out."
    copy = json.loads(json.dumps(notebook))
    for cell in copy['cells']:
        for out in cell.get('outputs', []):
            if out['output_type'] == 'execute_result': out['execution_count'] = 0
    return copy


def render(
    page: Page,
):
    "Send a page through pandoc, as a notebook and put together as Quarto does, and read it."
    _, messages = pandoc(json.dumps(numbered(page.notebook)), 'ipynb', '--mathml')
    # those come again below, with their cells
    whole = [m for m in messages if m['type'] != 'CouldNotConvertTeXMath'
             and m['type'] not in SHOWN_NOT_RENDERED]
    note_messages(page, whole)
    page.text, cells = compose(page)
    html, messages = pandoc(page.text, 'markdown', '--mathml')
    note_messages(page, messages, page.text, cells)
    page.rendered, page.html = html, Reader(html)
    for label in [*page.labels, *page.html.labels]: page.html.ids.setdefault(label, [None])


# ---- checks; each takes the site and gives a list of problems

def documented_cell(page: Page) -> int | None:
    "The number of the cell with the function whose documentation failed, if it was that."
    name = re.search(r'show_doc\((\w+)', page.fault)
    found = [i for i, c in enumerate(page.source['cells'], 1) if name
             and re.search(rf'^(?:def|class) {name[1]}\b', joined(c['source']), flags=re.M)]
    return found[0] if found else None


def check_processing(site: Site) -> list:
    "nbdev and pandoc took every notebook without complaint, and no two pages are written to one file."
    wrong = [Problem(site.name(p.path), documented_cell(p),
                     f'nbdev cannot process this notebook, so the site cannot be built: '
                     f'{" ".join(p.fault.split())}') for p in site.pages.values() if p.fault]
    wrong += [Problem(site.name(p.path), cell, text) for p in site.pages.values()
              for cell, text in p.messages]
    outputs = Counter(p.output for p in site.pages.values())
    return wrong + [Problem(site.name(p.path), None, f'another notebook is written to {p.output} too')
                    for p in site.pages.values() if outputs[p.output] > 1]


def repository_fault(
    site: Site,
    path: str,  # of an address on the host of the repository, after its name
) -> str:       # what is wrong, '' if nothing
    "Is a file of this repository there that an address names?"
    found = re.match(r'/(?:blob|tree|raw|edit)/([^/]+)/([^#?]+)(?:#L(\d+))?', path)
    if not found or found[1] != site.settings.get('branch', 'main'): return ''
    file = site.root / unquote(found[2])
    if not file.exists(): return f'{found[2]} is not in the repository'
    if found[3] and int(found[3]) > len(file.read_text(encoding='utf-8').splitlines()):
        return f'{found[2]} has no line {found[3]}'
    return ''


def anchor_fault(page: Page, anchor: str) -> str:
    """Is an anchor on a page? A page that nbdev could not process whole may lack some; that is reported
    already."""
    if not anchor or page.fault or unquote(anchor) in page.html.ids: return ''
    return f'{page.path} has no anchor #{unquote(anchor)}'


def link_fault(
    site: Site,
    target: str,          # of a link
    folder: Path,         # that relative links start from
    top: Path,            # that they must stay in
    page: Page = None,    # it stands on; None: on README.md
    ids: tuple = (),      # anchors of README.md
) -> str:                 # what is wrong, '' if nothing
    "Does a link lead somewhere? Other hosts are not asked."
    target = target.strip()
    if not target: return 'it is empty'
    if target.startswith('#'):
        return (anchor_fault(page, target[1:]) if page else '' if target[1:] in ids
                else f'there is no anchor {target}')
    docs, git = (site.settings.get(k, '') for k in ('doc_host', 'git_url'))
    docs += site.settings.get('doc_baseurl', '')
    outputs = {p.output: p for p in site.pages.values()}
    if docs and (target == docs or target.startswith(docs + '/')):
        path, _, anchor = target[len(docs):].partition('#')
        path = path.strip('/') or 'index.html'
        return (anchor_fault(outputs[path], anchor) if path in outputs else '' if (site.nbs / path).is_file()
                else f'the site has no page {path}')
    for host in (git, git.replace('https://github.com/', 'https://colab.research.google.com/github/')):
        if host and target.startswith(host + '/'): return repository_fault(site, target[len(host):])
    if re.match(r'[a-z][a-z0-9+.-]*:|//', target, re.I): return ''
    path, anchor = unquote(urlsplit(target).path), urlsplit(target).fragment
    file = Path(os.path.normpath(top / path.lstrip('/') if path.startswith('/') else folder / path))
    if not file.is_relative_to(top):
        return f'it leads out of {top.relative_to(site.root).as_posix()}/, so it is broken on the site'
    known = site.pages.get(file.relative_to(site.nbs).as_posix()) if file.is_relative_to(site.nbs) else None
    if page and not known: known = outputs.get(file.relative_to(site.nbs).as_posix())
    if known: return anchor_fault(known, anchor)
    if not file.exists(): return f'{path} does not exist'
    return f'{path} is a folder' if page and file.is_dir() and not (file / 'index.ipynb').exists() else ''


def check_links(site: Site) -> list:
    "Links, anchors and images of all pages."
    wrong = []
    for p in site.pages.values():
        where = dict(folder=(site.nbs / p.path).parent, top=site.nbs, page=p)
        links = [(cell, f'the link to {to!r}', to) for cell, to in p.html.links]
        links += [(cell, f'the image {to!r}' if tag == 'img' else f'<{tag} {name}={to!r}>', to)
                  for cell, tag, name, to in p.html.fetched if not (tag == 'use' and to.startswith('#'))]
        wrong += [Problem(site.name(p.path), cell, f'{what} is broken: {fault}')
                  for cell, what, to in dict.fromkeys(links) if (fault := link_fault(site, to, **where))]
        twice = [(i, cells) for i, cells in p.html.ids.items() if len(cells) > 1]
        wrong += [Problem(site.name(p.path), cells[-1], f'the id {i!r} is on the page {len(cells)} times')
                  for i, cells in twice]
    return wrong


def check_readme(site: Site) -> list:
    "Links, anchors and images of README.md."
    file = site.root / 'README.md'
    if not file.exists(): return [Problem('README.md', None, 'is missing')]
    html, messages = pandoc(file.read_text(encoding='utf-8'), 'gfm+gfm_auto_identifiers', '--mathml')
    page = Reader(html)
    wrong = [f'pandoc says: {m.get("pretty") or m["type"]}' for m in messages
             if m['verbosity'] in ('WARNING', 'ERROR')]
    targets = [('link to', to) for _, to in page.links] + [('image', to) for _, _, _, to in page.fetched]
    wrong += [f'the {what} {to!r} is broken: {fault}' for what, to in dict.fromkeys(targets)
              if (fault := link_fault(site, to, site.root, site.root, ids=page.ids))]
    wrong += [f'KaTeX cannot read the formula {tex!r}: {fault}'
              for (_, tex, _), fault in zip(page.formulas, katex_faults([f[1:] for f in page.formulas]))
              if fault]
    return [Problem('README.md', None, text) for text in wrong]


def bibliography_keys(site: Site, page: Page, wrong: list) -> set:
    "All keys that a page may cite; what is wrong with the files is added to `wrong`."
    listed = lambda o: [o] if isinstance(o, str) else list(o or [])
    files = ([site.nbs / f for f in listed(site.quarto.get('bibliography'))]
             + [(site.nbs / page.path).parent / f for f in listed(page.meta.get('bibliography'))])
    keys = set()
    for file in files:
        if not file.is_file():
            wrong.append(Problem('_quarto.yml', None, f'the bibliography {file.name} does not exist'))
            continue
        text = file.read_text(encoding='utf-8')
        if file.suffix == '.bib':
            keys |= set(re.findall(r'^\s*@(?!comment|string|preamble)\w+\s*\{\s*([^,\s]+)\s*,', text,
                                   flags=re.M | re.I))
        else:
            keys |= {entry['id'] for entry in (yaml.safe_load(text) if file.suffix != '.json'
                                               else json.loads(text))}
    return keys


def check_references(site: Site) -> list:
    "Citations and cross-references. Quarto resolves cross-references within a page."
    wrong = []
    numbered = ((site.quarto.get('format', {}).get('html') or {}).get('number-sections')
                or site.quarto.get('number-sections'))
    for p in site.pages.values():
        keys = bibliography_keys(site, p, wrong)
        for cell, key in dict.fromkeys(p.html.cites):
            kind = key.split('-')[0].lower()
            if kind in CROSS_REFERENCES and '-' in key:
                if key not in p.html.ids and key[0].lower() + key[1:] not in p.html.ids:
                    wrong.append(Problem(site.name(p.path), cell,
                                         f'the cross-reference @{key} has no target on this page: nothing is '
                                         f'labelled #{key}'))
                elif kind == 'sec' and not (numbered or p.meta.get('number-sections')):
                    wrong.append(Problem(site.name(p.path), cell,
                                         f'@{key} needs number-sections: true in _quarto.yml'))
            elif key not in keys:
                wrong.append(Problem(site.name(p.path), cell, f'the citation @{key} is in no bibliography'))
    return list(dict.fromkeys(wrong))


def check_formulas(site: Site) -> list:
    "Every formula parses by KaTeX; what pandoc says of it is among the messages already."
    formulas = [(p.path, *f) for p in site.pages.values() for f in p.html.formulas]
    faults = katex_faults([f[2:] for f in formulas])
    wrong = [Problem(site.name(path), cell, f'KaTeX cannot read the formula {tex!r}: {fault}')
             for (path, cell, tex, _), fault in zip(formulas, faults) if fault]
    return wrong + [Problem(site.name(p.path), cell,
                            f'{stray!r} looks like a formula but is none: no blank may follow the first $ or '
                            f'precede the last')
                    for p in site.pages.values() for cell, stray in p.html.strays]


def sidebar_pages(contents) -> list:
    "The files of a sidebar, in order."
    found = []
    for c in contents or []:
        if isinstance(c, str): found.append(c)
        else: found += [c[k] for k in ('href', 'file') if k in c] + sidebar_pages(c.get('contents'))
    return found


def quarto_files(
    node,             # a part of _quarto.yml
    key: str = '',    # that it stands under
) -> list:            # (key, file) for all that name one
    "The local files that _quarto.yml names."
    if isinstance(node, dict):
        return [f for k, v in node.items() for f in quarto_files(v, key if key == 'theme' else str(k))]
    if isinstance(node, list): return [f for v in node for f in quarto_files(v, key)]
    keys = ('href', 'file', 'logo', 'favicon', 'image', 'css', 'csl', 'include-in-header',
            'include-before-body', 'include-after-body')
    return ([(key, node)] if isinstance(node, str)
            and (key in keys or key == 'theme' and node.endswith(('.scss', '.css'))) else [])


def check_sidebar(site: Site) -> list:
    "The sidebar lists the notebooks, and _quarto.yml names no file that is not there."
    bars = site.quarto.get('website', {}).get('sidebar') or {}
    listed = [f for bar in (bars if isinstance(bars, list) else [bars])
              for f in sidebar_pages(bar.get('contents'))]
    wrong = [f'the sidebar lists {p}, which does not exist' for p in listed if p.endswith('.ipynb')
             and p not in site.pages]
    wrong += [f'the sidebar does not list {p}' for p in site.pages if p not in listed]
    wrong += [f'the sidebar lists {p} {n} times' for p, n in Counter(listed).items() if n > 1]
    named = [(key, f) for key, f in quarto_files(site.quarto) if f not in listed]
    wrong += [f'{key}: {f} is broken: {fault}' for key, f in named
              if (fault := link_fault(site, f, site.nbs, site.nbs, next(iter(site.pages.values()))))]
    sheets = [(f, site.nbs / f) for _, f in named if f.endswith(('.css', '.scss', '.html'))]
    for f, file in sheets:
        text = file.read_text(encoding='utf-8') if file.is_file() else ''
        asked = (Reader(text).everything_asked() if f.endswith('.html')
                 else [(None, host) for host in STYLE_ASKS.findall(text)])
        wrong += [f'{f} asks another host: {host}' for _, host in asked]
    return [Problem('_quarto.yml', None, text) for text in wrong]


def lost_lines(
    source: str,  # of a code cell
) -> list:        # its lines of code that start with %
    "Lines that nbdev takes for magics and drops though they are code."
    if not re.search(r'^\s*%', source, flags=re.M): return []
    from IPython.core.inputtransformer2 import TransformerManager
    kept = TransformerManager().transform_cell(source).splitlines()
    return [line for line in source.splitlines() if re.match(r'\s*%', line) and line in kept]


def exercises_fault(
    text: str,  # of a chapter's last cell
) -> str:       # what is wrong, '' if nothing
    "A chapter ends with three exercises and their folded solutions."
    text = re.sub(r'^[ \t]*(```+).*?^[ \t]*\1', '', text, flags=re.M | re.S)
    found = re.search(r'^### Exercises\s*$(.*?)^<details>\s*<summary>Solutions</summary>(.*)</details>\s*\Z',
                      text, re.M | re.S)
    if not found:
        return 'a chapter ends with "### Exercises", and below them <details><summary>Solutions</summary>'
    if re.search(r'^#{1,6} |</?details', found[1] + found[2], re.M):
        return 'nothing else stands between the exercises and the end of the chapter'
    for part, what in zip(found.groups(), ('exercises', 'solutions')):
        numbers = re.findall(r'^(\d+)\.\s', part, re.M)
        if numbers != ['1', '2', '3']:
            return f'a chapter has three {what}, numbered 1 to 3; here are {", ".join(numbers) or "none"}'
    return ''


def pictures_fault(
    cell: dict,  # processed, with code
) -> str:        # what is wrong, '' if nothing
    "A stored picture has a text for those who do not see it."
    try: o = options(joined(cell['source']))
    except yaml.YAMLError: return ''                                     # told elsewhere
    if o.get('include') is False or o.get('output') is False: return ''
    n, alt = sum(map(is_picture, cell.get('outputs', []))), o.get('fig-alt')
    if n and not (all(alt) and len(alt) == n if isinstance(alt, list) else str(alt or '').strip()):
        return 'a picture needs words that say what it shows: a line #| fig-alt: "..."'
    return ''


def check_form(site: Site) -> list:
    """Each page has a title, a description and an opening, labels, exercises, one first-level heading,
    whole HTML, no lost line and no stored error."""
    wrong = []
    for p in site.pages.values():
        say = lambda text, cell=None: wrong.append(Problem(site.name(p.path), cell, text))
        if not p.meta.get('title'): say('the page has no title: the first cell is "# Title"', 1)
        if not p.meta.get('description'):
            say('the page has no description: "> one sentence" below the title', 1)
        if p.html.opening < 20:
            say(f'the page has no opening: a paragraph of 20 words or more before the first heading, code or '
                f'picture; there are {p.html.opening}')
        for cell, level in p.html.headings:
            if level == 1: say('a second first-level heading (#) is a second title', cell)
        for cell, tag in p.html.odd_tags:
            say(f'<{tag}> is taken for an HTML tag, so it does not show: put it into backticks', cell)
        for cell, text in p.html.unclosed: say(text, cell)
        for cell, option in p.html.dashes:
            say(f'{option!r} was two hyphens before pandoc made a dash of them: put the option into '
                f'backticks', cell)
        for cell in p.html.bare: say('a displayed equation has no label: {#eq-name} after the last $$', cell)
        for label, n in Counter(p.html.labels).items():
            if n > 1: say(f'the label {label!r} is on the page {n} times')
        if p.path != 'index.ipynb' and not p.path.startswith(('tools/', 'reference/')) and (
            fault := exercises_fault(joined(p.notebook['cells'][-1]['source']))):
            say(fault, p.numbers()[-1])
        source = {c.get('id'): joined(c['source']) for c in p.source['cells'] if c['cell_type'] == 'code'}
        for number, cell in zip(p.numbers(), p.notebook['cells']):
            if cell['cell_type'] != 'code': continue
            if fault := pictures_fault(cell): say(fault, number)
            for out in cell.get('outputs', []):
                if out['output_type'] == 'error':
                    say(f'a stored error is on the page: {out.get("ename")}: {out.get("evalue")}', number)
            try: shown = options(joined(cell['source'])).get('echo') is not False
            except yaml.YAMLError: shown = True
            for line in lost_lines(source.get(cell.get('id'), '')) if shown else []:
                say(f'nbdev drops this line, which starts with %: {line.strip()!r}', number)
    return wrong


def check_ways_in(site: Site) -> list:
    "Each page links to itself as a notebook: in Colab, and to download."
    git, branch, wrong = site.settings.get('git_url', ''), site.settings.get('branch', 'main'), []
    colab = git.replace('https://github.com/', 'https://colab.research.google.com/github/')
    for p in site.pages.values():
        there = {to for _, to in p.html.links}
        wanted = {'to open it in Colab': f'{colab}/blob/{branch}/{site.name(p.path)}',
                  'to download it': f'{git}/raw/{branch}/{site.name(p.path)}'}
        lacking = [f'{what}, {link}' for what, link in wanted.items() if link not in there]
        if lacking:
            wrong.append(Problem(site.name(p.path), None,
                                 f"the page has no link {', and none '.join(lacking)}"))
    return wrong


def check_hosts(site: Site) -> list:
    "No page asks another host for anything."
    wrong = []
    for p in site.pages.values():
        wrong += [Problem(site.name(p.path), cell, f'the page asks another host: {what}')
                  for cell, what in dict.fromkeys(p.html.everything_asked())]
        for number, cell in zip(p.numbers(), p.notebook['cells']):
            kinds = {kind for out in cell.get('outputs', []) for kind in out.get('data', {})
                     if kind in BRINGS_REQUIRE}
            wrong += [Problem(site.name(p.path), number,
                              f'an output of type {kind} makes the page load require.js and jQuery from '
                              f'another host: the procs of settings.ini must have processors:html_for_quarto')
                              for kind in sorted(kinds)]
    if site.quarto.get('format', {}).get('html', {}).get('html-math-method') != 'mathml':
        wrong.append(Problem('_quarto.yml', None,
                             'html-math-method must be mathml: MathJax comes from another host'))
    return wrong


def check_raw(site: Site) -> list:
    """Scripts, styles and drawings come through nbdev and pandoc as they were stored, and hold nothing that
    Quarto would take for its own."""
    wrong = []
    for p in site.pages.values():
        stored = [(i, part[0]) for i, cell in enumerate(p.source['cells'], 1)
                  for out in cell.get('outputs', [])
                  for kind in ('text/html', 'text/markdown')
                  for part in RAW.finditer(joined(out.get('data', {}).get(kind, '')))]
        for cell, part in dict.fromkeys(stored):
            begins = f'the <{RAW.match(part)[1]}> that begins with {part[:60]!r}'
            if part not in p.rendered:
                wrong.append(Problem(site.name(p.path), cell,
                                     f'{begins} does not arrive on the page as it was stored'))
            if harm := HARMED.search(part):
                wrong.append(Problem(site.name(p.path), cell,
                                     f'{begins} holds {harm[0]!r}, which Quarto may take for its own; write '
                                     f'the < in another way'))
    if (site.quarto.get('format', {}).get('html') or {}).get('html-table-processing') != 'none':
        wrong.append(Problem('_quarto.yml', None,
                             'html-table-processing must be none: Quarto looks for tables inside raw HTML '
                             'and tears scripts apart'))
    return wrong


NAMED = re.compile(r'\[`([\w.]+)(?:\(\))?`\]\(([^)\s]*\.html)#([^)\s]+)\)')


def module_of(page: Page) -> str:
    "The module that a notebook makes, without the package; '' if none."
    found = re.search(r'^#\|\s*default_exp (\w+)$',
                      '\n'.join(joined(c['source']) for c in page.source['cells']), re.M)
    return found[1] if found else ''


def means(
    page: Page,
    name: str,    # that is linked
    module: str,  # that it is linked to, without the package
) -> bool:
    "Does a name stand for a symbol of this module on a page, because the notebook imports it or makes it?"
    code, first = ([joined(c['source']) for c in page.source['cells'] if c['cell_type'] == 'code'],
                   re.escape(name.split('.')[0]))
    if not module: return False
    if any(re.search(rf'\.{module} import\b[^#]*?\b{first}\b', c) for c in code): return True
    return (module_of(page) == module
            and any(re.search(r'^#\|\s*exports?$', c, re.M)
                    and re.search(rf'^(?:class|def) {first}\b', c, re.M) for c in code))


def check_names(site: Site) -> list:
    """A name that is linked by itself leads to what it means on this page, and no link leads to the site by
    its address."""
    wrong, own, modules = ([], site.settings.get('doc_host', '') + site.settings.get('doc_baseurl', ''),
                           {p.output: module_of(p) for p in site.pages.values()})
    for p in site.pages.values():
        wrong += [Problem(site.name(p.path), cell,
                          f'the link to {to!r} leads from a copy of the site to the original: link to the '
                          f'notebook') for cell, to in dict.fromkeys(p.html.links) if own
                          and to.startswith(own)]
        for number, cell in zip(p.numbers(), p.notebook['cells']):
            texts = ([joined(cell['source'])] * (cell['cell_type'] == 'markdown')
                     + [joined(out['data']['text/markdown']) for out in cell.get('outputs', [])
                        if 'text/markdown' in out.get('data', {})])
            for name, to, anchor in {found for text in texts for found in NAMED.findall(text)}:
                module = modules.get(posixpath.normpath(posixpath.join(posixpath.dirname(p.output), to)), '')
                if anchor.lower() != name.lower() or not means(p, name, module):
                    wrong.append(Problem(site.name(p.path), number,
                                         f'`{name}` is linked to {to}#{anchor}, which it does not mean on '
                                         f'this page'))
    return wrong


def agrees(a, b) -> bool:
    "Equal, numbers within a part in a thousand."
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(agrees(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list): return len(a) == len(b) and all(map(agrees, a, b))
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (a, b))
    return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-9) if numbers else a == b


EXPLORER = re.compile(r'<section class="sce".*?</section>', re.S)


def stored_html(
    page: Page,
) -> list:      # pairs: cell, text
    "The stored outputs of a page that can hold HTML."
    return [(number, joined(text)) for number, cell in zip(page.numbers(), page.notebook['cells'])
            for out in cell.get('outputs', [])
            for kind, text in out.get('data', {}).items() if kind in ('text/markdown', 'text/html')]


def stored_explorers(
    page: Page,
) -> list:      # pairs: cell, HTML of one explorer
    "The explorers in the stored outputs of a page."
    return [(cell, part) for cell, text in stored_html(page) for part in EXPLORER.findall(text)]


def explorer_faults(
    site: Site,
    explorer: str,  # HTML of one explorer
) -> list:          # what is wrong
    """Compare an explorer with what Python makes now of the records and the stored simulations, called as
    it was."""
    from sparsecod import explorers, report
    from sparsecod.studies import SCALES, load_results
    try:
        stored = json.loads(re.search(r'<script type="application/json" class="data">(.*?)</script>',
                                      explorer, re.S)[1])
        call, folder = dict(stored['made']), site.root / 'results'
        make, names = (vars(report) | vars(explorers))[call.pop('function')], call.pop('runs', None)
    except (AttributeError, KeyError, TypeError, ValueError): return ['it has not the present form']
    records = {r['name']: r for scale in SCALES if (folder / scale).is_dir()
               for r in load_results(folder, scale)} if names else {}
    if lacking := [name for name in names or [] if name not in records]:
        return [f'it shows runs that are not in results/: {lacking}']
    now = make([records[name] for name in names] if names
               else dict(variance_explorer=explorers.stored_points,
                         twins_explorer=explorers.stored_twins)[stored['made']['function']](site.root),
                         **call)
    data = json.loads(json.dumps(now.data))
    faults = [f'its {part} are not what Python makes of the records' for part in data if part != 'spec'
              and stored.get(part) != data[part]]
    faults += [f'its {part} are not what Python makes of the records' for part in data['spec']
               if not agrees(stored['spec'].get(part), data['spec'][part])]
    frame = lambda text: re.sub(r'<script type="application/json".*?</script>', '', text, flags=re.S)
    return faults + ([] if frame(now.html) == frame(explorer)
                     else ['the HTML around it, or its script, is not the present one'])


def check_explorers(site: Site) -> list:
    "Each explorer on a page is what Python makes now."
    wrong = []
    for p in site.pages.values():
        for cell, explorer in stored_explorers(p):
            faults = explorer_faults(site, explorer)
            wrong += [Problem(site.name(p.path), cell,
                              f'the explorer is out of date: {fault}. Run the cell again')
                              for fault in faults]
        wrong += [Problem(site.name(p.path), cell,
                          'a script in the output is in no explorer (<section class="sce">) of '
                          'sparsecod.explorers, so nothing compares it with Python')
                  for cell, text in stored_html(p) if '<script' in EXPLORER.sub('', text)]
    return wrong


CHECKS = (check_processing, check_links, check_readme, check_references, check_formulas, check_sidebar,
          check_form, check_ways_in, check_hosts, check_raw, check_names, check_explorers)


def check(
    root: Path = ROOT,  # a checkout
) -> tuple:             # the site, and a list of problems, empty if all is well
    "Process, render and check everything."
    pandoc_path(), node_path(), katex_path()  # say at once what is missing
    site = read_site(Path(root).resolve())
    with TemporaryDirectory() as folder: site.pages = read_pages(site, Path(folder))
    if not site.pages: raise Missing(f'There are no notebooks in {site.nbs}.')
    # most of it is Pandoc's work
    with ThreadPoolExecutor(os.cpu_count()) as pool: list(pool.map(render, site.pages.values()))
    return site, [problem for one in CHECKS for problem in one(site)]


# ---- the preview: pages to look at, without Quarto

PREVIEW = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1c2226; --soft: #6b7680; --line: #d5dadf; --code: #f3f5f7; --link: #0b62a8; }
@media (prefers-color-scheme: dark) { :root { --ground: #15191d; --ink: #e4e8eb; --soft: #9aa5ae; --line: #3a4249; --code: #20262b; --link: #8cc4ee; } }
body { margin: 0; background: var(--ground); color: var(--ink); font: 1rem/1.6 system-ui, sans-serif; }
.preview { margin: 0; padding: .4rem 1rem; font-size: .85rem; color: var(--soft); border-bottom: 1px solid var(--line); }
main { max-width: 48rem; min-width: 0; padding: 0 1rem 2rem; }
nav { padding: 1rem; font-size: .9rem; border-top: 1px solid var(--line); }
nav ul { list-style: none; margin: 0 0 .8rem; padding: 0; } nav b { font-weight: 600; } nav a { display: block; padding: .25rem 0; } nav [aria-current] { font-weight: 600; }
@media (min-width: 62rem) { .columns { display: grid; grid-template-columns: 15rem minmax(0, 1fr); } nav { grid-row: 1; border: 0; border-right: 1px solid var(--line); } main { padding: 0 2rem 3rem; } }
a { color: var(--link); } h1, h2, h3, h4 { line-height: 1.25; margin: 2rem 0 .6rem; } .description { color: var(--soft); font-size: 1.1rem; }
pre { padding: .6rem .8rem; border-radius: .3rem; font-size: .85rem; line-height: 1.45; } pre[class] { background: var(--code); white-space: pre-wrap; }
code { font-family: ui-monospace, monospace; } :not(pre) > code { font-size: .9em; } .cell-output > pre { border-left: .2rem solid var(--line); color: inherit; }
table { border-collapse: collapse; font-size: .9rem; } th, td { padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
blockquote { margin: 1rem 0; padding-left: 1rem; border-left: .2rem solid var(--line); } .number { float: right; } .equation { display: flex !important; align-items: center; } .equation math { flex: 1; } iframe { max-width: 100%; }
"""


def relative(
    target: str,  # a page, from the root of the site
    page: Page,   # that links there
) -> str:         # address
    "The address of a page, from another one."
    return posixpath.relpath(target, posixpath.dirname(page.output) or '.')


def site_links(
    site: Site,
    html: str,
    page: Page,
) -> str:       # HTML
    "Links to notebooks as links from page to page."
    def other(found):
        target, sign, anchor = found[1].partition('#')
        file = posixpath.normpath(posixpath.join(posixpath.dirname(page.path), target))
        if target and file in site.pages: target = relative(site.pages[file].output, page)
        return f'href="{target}{sign}{anchor}"'
    return re.sub(r'href="([^"]*)"', other, html)


def preview_body(
    site: Site,
    page: Page,  # rendered
) -> str:        # HTML
    "The text of a page, with numbered equations, citations and pictures."
    numbers = {name: n for n, name in enumerate((label for label in LABEL.findall(page.text)
                                                 if label.startswith('eq-')), 1)}
    text = re.sub(r'@(eq-[\w.:-]*\w)', lambda m: f'[Equation ({numbers[m[1]]})](#{m[1]})' if m[1] in numbers
                  else m[0], page.text)
    files = site.quarto.get('bibliography') or []
    books = [f'--bibliography={site.nbs / f}' for f in ([files] if isinstance(files, str) else files)]
    html, _ = pandoc(text, 'markdown', '--mathml', '--citeproc', '--metadata=link-citations', *books)
    html = LABEL.sub(lambda m: f'<span class="number" id="{m[1]}">({numbers.get(m[1], "")})</span>', html)
    html = re.sub(r'<p>(<math display="block"(?:(?!</math>).)*</math>)\s*(<span class="number")',
                  r'<p class="equation">\1 \2', html, flags=re.S)
    html = re.sub(r'data:image/png,\d+-', lambda m: page.pictures[m[0]],
                  re.sub(f'<!-- {MARK}\\d+ -->', '', html))
    return site_links(site, html, page)


def preview_sidebar(
    site: Site,
    contents,    # of the sidebar
    page: Page,  # that it stands on
) -> str:        # HTML
    "The list of all pages."
    rows = []
    for c in contents or []:
        if isinstance(c, dict):
            rows.append(
                f'<li><b>{escape(c.get("section", ""))}</b>{preview_sidebar(site, c.get("contents"), page)}</li>')
        elif c in site.pages:
            other = site.pages[c]
            here = ' aria-current="page"' if other is page else ''
            rows.append(
                f'<li><a '
                f'href="{relative(other.output, page)}"{here}>{escape(str(other.meta.get("title", c)))}</a></li>')
    return f'<ul>{"".join(rows)}</ul>'


def preview_page(
    site: Site,
    page: Page,  # rendered
) -> str:        # HTML
    "One page, whole and in one file."
    title, about = (escape(str(page.meta.get(key, ''))) for key in ('title', 'description'))
    bar = site.quarto['website']['sidebar']
    styles = [site.nbs / f for f in [(site.quarto.get('format', {}).get('html') or {}).get('css') or []] if f]
    css = PREVIEW + ''.join(f.read_text(encoding='utf-8') for f in styles)
    return (f'<!DOCTYPE html>\n<html lang="{site.quarto.get("lang", "en")}">\n<head>\n<meta '
            f'charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<title>{title}</title>\n<meta name="description" content="{about}">\n<link rel="icon" '
            f'href="data:,">\n<meta name="quarto:offset" '
            f'content="{relative(".", page)}/">\n<style>{css}</style>\n</head>\n<body>\n'
            f'<p class="preview">A preview made without Quarto: text, figures, formulas and explorers are '
            f'those of the site, the layout is not.</p>\n<div class="columns">\n'
            f'<main class="content">\n<h1 class="title">{title}</h1>\n<p '
            f'class="description">{about}</p>\n{preview_body(site, page)}\n</main>\n'
            f'<nav aria-label="pages">{preview_sidebar(site, bar.get("contents"), page)}</nav>\n</div>\n</body>\n</html>\n')


def write_pages(
    target: Path,       # folder; pages in it are replaced
    root: Path = ROOT,  # a checkout
    site: Site | None = None,  # as from `check`; None: processed here
) -> Site:              # what was written
    "Write all pages as they can be had without Quarto."
    pandoc_path()
    if site is None:
        site = read_site(Path(root).resolve())
        with TemporaryDirectory() as folder: site.pages = read_pages(site, Path(folder))
        for page in site.pages.values(): page.text, _ = compose(page)
    Path(target).mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / 'sparsecod' / 'templates' / 'vega.js', target)
    for page in site.pages.values():
        file = Path(target) / page.output
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(html := preview_page(site, page), encoding='utf-8')
        for picture in re.findall(r'<img src="([^":]+)"', html):
            if not (shown := (site.nbs / page.path).parent / picture).is_file(): continue
            (file.parent / picture).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(shown, file.parent / picture)
    return site


def summary(site: Site) -> str:
    "What was checked, in numbers."
    count = lambda of: sum(len(of(p)) for p in site.pages.values())
    return (f'{len(site.pages)} pages, {count(lambda p: p.html.links)} links, '
            f'{count(lambda p: p.html.fetched)} images, {count(lambda p: p.html.formulas)} formulas, '
            f'{count(lambda p: p.html.cites)} citations and cross-references, {count(stored_explorers)} '
            f'explorers')


def main():
    "Check, and say what is wrong."
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('root', nargs='?', type=Path, default=ROOT,
                        help='the checkout (default: the one that this file is in)')
    parser.add_argument('--pages', type=Path, metavar='FOLDER',
                        help='write a preview of the pages into this folder, and check nothing')
    parser.add_argument('--check', action='store_true', help='with --pages: check all the same')
    # only process, for `read_pages`
    parser.add_argument('--process', type=Path, metavar='FOLDER', help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.process: return process_notebooks(given.process)
    try:
        if not given.pages or given.check: site, wrong = check(given.root)
        else: site, wrong = None, []
        if given.pages:
            site = write_pages(given.pages, given.root, site)
            print(f'{len(site.pages)} pages of a preview, not as Quarto makes them: open '
                  f'{given.pages / "index.html"}.')
            if not given.check: return
    except Missing as missing: sys.exit(f'docs-check cannot run: {missing}')
    for problem in wrong: print(problem)
    sys.exit(f'{len(wrong)} problems in the docs ({summary(site)}).') if wrong else print(
        f'The docs are in order: {summary(site)}.')


if __name__ == '__main__': main()
