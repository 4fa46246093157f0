"""What happens to a notebook on its way to the site, besides nbdev's own processing; settings.ini names
these processors.

nbdev links any name in backticks to whatever symbol of any module is called so, by an absolute address.
`OwnLinks` takes its place: a name is linked if it means that symbol on this page, and the link stays on the
site. `html_for_quarto` turns HTML outputs into raw blocks, as Quarto would load scripts from other hosts
for them. `Folded` folds the cells that are tagged so. `ShownOnce` leaves out the documentation of symbols
whose source is shown; `Signatures` shows what a class is called with where nbdev shows (*args, **kwargs),
and slants the whole first paragraph of a docstring, as nbdev does its first line.
"""
import ast
import importlib
import inspect
import posixpath
import re
from functools import cache
from pathlib import Path

from execnb.nbio import mk_cell
from nbdev.config import get_config
from nbdev.process import Processor

# a link, left alone, or a name in backticks
NAME = re.compile(r'\[(?:[^\[\]]|\[[^\[\]]*\])*\]\([^)]*\)|`([A-Za-z_][\w.]*)(\(\))?`')
FENCE = re.compile(r' {0,3}(`{3,}|~{3,})')
SHOWN = re.compile(r'^show_doc\((\w+)', re.M)  # the cells in which nbdev documents a symbol
HEADING = re.compile(r'^#+ (\w+)$', re.M)  # of one word: links to a symbol of that name lead there
# nbdev slants the first line only
SUMMARY = re.compile(r'^\*([^*\n]+)\*\n((?:[\w`(\[$=+][^*\n]*\n?)+)', re.M)
BARE = re.compile(r'^def (\w+)\(\s*\*args,\s*\*\*kwargs\s*\)', re.M)


def joined(
    text,      # a string, or a list of lines
) -> str:
    "Text of a notebook's field."
    return ''.join(text)


def names_of(
    cells: list,   # of a notebook, with their directives
    package: str,  # name of the package that the notebooks make
) -> dict:         # name -> the module that it is from
    "Which names of the package a notebook uses: those that it imports, and those that it exports."
    found, module = {}, None
    for cell in cells:
        if cell.cell_type != 'code': continue
        if said := cell.directives_.get('default_exp'): module = f'{package}.{said[0]}'
        try: tree = ast.parse(joined(cell.source))
        except SyntaxError: continue   # has a magic command
        own = module if cell.directives_.keys() & {'export', 'exports'} else None
        found |= {node.name: own for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
        found |= {a.name: node.module for node in imports for a in node.names if not a.asname}
    return {name: module for name, module in found.items() if (module or '').startswith(f'{package}.')}


@cache
def attributes(
    folder: Path,  # of a package
) -> set:
    "Names of methods and fields of all classes of a package: in backticks they may well mean these."
    found = set()
    for path in folder.glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.ClassDef):
                found |= {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
                found |= {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store): found.add(node.attr)
    return found


class OwnLinks(Processor):
    "Link the names in backticks that mean a symbol of the package on this page."
    def __init__(self, nb):
        super().__init__(nb)
        config = get_config()
        package, here = config.lib_path.name, Path(nb.path_).resolve().relative_to(config.nbs_path.resolve())
        symbols = (importlib.import_module(f'{package}._modidx').d['syms']
                   if (config.lib_path / '_modidx.py').exists() else {})
        self.names, self.unclear, self.folder = (names_of(nb.cells, package), attributes(config.lib_path),
                                                 here.parent.as_posix())
        # sparsecod.core.Transformer -> its page and anchor
        self.pages = {name: page for known in symbols.values() for name, (page, _) in known.items()}

    def link(self, found) -> str:
        "A name in backticks, with or without a link."
        name, call = found[1], found[2]
        if not name or name in self.unclear and not call: return found[0]
        page = self.pages.get(f'{self.names.get(name.split(".")[0])}.{name}')
        return f'[{found[0]}]({posixpath.relpath(page, self.folder)})' if page else found[0]

    def linked(
        self,
        text: str,  # Markdown
    ) -> str:
        "Link what is neither code nor HTML."
        lines, fence = text.split('\n'), ''
        for i, line in enumerate(lines):
            mark = FENCE.match(line)
            if fence:
                fence = ('' if mark and mark[1].startswith(fence)
                         and not line.strip(mark[1][0] + ' ') else fence)
            elif mark: fence = mark[1]
            elif not line.startswith('    '): lines[i] = NAME.sub(self.link, line)
        return '\n'.join(lines)

    def cell(self, cell):
        if cell.cell_type == 'markdown': cell.source = self.linked(joined(cell.source))
        for output in cell.get('outputs', []):
            if 'text/markdown' in output.get('data', {}):
                output['data']['text/markdown'] = self.linked(joined(output['data']['text/markdown']))


def html_for_quarto(cell):
    "An HTML output becomes a raw block of Markdown, in a fence longer than any inside."
    for output in cell.get('outputs', []):
        if 'text/html' not in output.get('data', {}): continue
        text = joined(output['data']['text/html'])
        fence = '`' * max(3, 1 + max(map(len, re.findall('`+', text)), default=0))
        output['data'] = {'text/markdown': f'{fence}{{=html}}\n{text}\n{fence}\n'}


def shown_names(cell) -> list:
    "What a cell defines for others, if the page shows its source."
    if cell.cell_type != 'code' or 'exports' not in (getattr(cell, 'directives_', None) or ()): return []
    named = [node.name for node in ast.parse(cell.source).body
             if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return [name for name in named if not name.startswith('_')]


class ShownOnce(Processor):
    "Of a symbol whose source is shown, all that stays of its documentation is the place that links lead to."
    def begin(self):
        known, cells = {name for cell in self.nb.cells for name in shown_names(cell)}, []
        taken = {title.lower() for cell in self.nb.cells for title in HEADING.findall(cell.source)
                 if cell.cell_type == 'markdown'}
        for cell in self.nb.cells:
            places = {name.lower(): None for name in shown_names(cell) if name.lower() not in taken}
            taken |= places.keys()
            if places: cells.append(mk_cell(''.join(f'[]{{#{place}}}' for place in places), 'markdown'))
            documents = SHOWN.search(cell.source)
            if not documents or documents[1] not in known: cells.append(cell)
        self.nb.cells = cells


class Folded(Processor):
    "The code of a cell that is tagged `fold` is there, behind a click that says what it defines."
    def cell(self, cell):
        if 'fold' not in cell.get('metadata', {}).get('tags', []): return
        named = [n.name.lstrip('_') for n in ast.parse(cell.source).body
                 if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        said = 'Code' + f': {", ".join(dict.fromkeys(filter(None, named)))}' * any(named)
        # nbdev says that exported code may be folded
        own = '\n'.join(line for line in cell.source.split('\n')
                        if not line.startswith(('#| code-fold:', '#| code-summary:')))
        cell.source = f'#| code-fold: true\n#| code-summary: "{said}"\n{own}'


class Signatures(Processor):
    "Show what a class is called with where nbdev sees (*args, **kwargs), and names without addresses."
    def __init__(self, nb):
        super().__init__(nb)
        self.names = names_of(nb.cells, get_config().lib_path.name)

    def signature(self, found) -> str:
        "The signature of a class, or what stood there."
        try:
            given = inspect.signature(getattr(importlib.import_module(self.names[found[1]]),
                                              found[1])).parameters.values()
        except (KeyError, AttributeError, TypeError, ValueError): return found[0]
        return f'def {found[1]}(' + ''.join(f'\n    {p},' for p in given) + ('\n' if given else '') + ')'

    def cell(self, cell):
        if not cell.source.endswith(')') or not SHOWN.search(cell.source): return
        for output in cell.outputs:
            text = BARE.sub(self.signature, joined(output['data']['text/markdown']))
            text = SUMMARY.sub(lambda m: f'*{m[1]} {" ".join(m[2].split())}*\n', text)
            output['data']['text/markdown'] = re.sub(r'<?__main__\.(\w+)(?: object at 0x[0-9a-f]+>)?',
                                                     lambda m: m[1] + '()' * m[0].startswith('<'), text)
