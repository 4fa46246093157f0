"The check of the docs: a small site in order passes, and each planted fault is found and named."
import json
import re
import shutil
import subprocess
import sys

import pytest

import docs_check
from sparsecod.explorers import stored_points, variance_explorer

TEXT = ('This small page is in order: it has a [link to the other page](02_other.ipynb#a-section), one to '
        '[its own section](#numbers), a picture, ![A dot](dot.svg), '
        'a citation of [@known2020], the formula $x^2$ and a reference to @eq-one.')


def markdown(*lines) -> dict:
    "A markdown cell."
    return dict(cell_type='markdown', metadata={}, source='\n'.join(lines))


def code(
    source: str,  # of the cell
    *outputs,     # dictionaries: MIME type -> text; or whole outputs
) -> dict:
    "A code cell with stored outputs."
    whole = [o if 'output_type' in o else dict(output_type='execute_result', execution_count=None,
                                               metadata={}, data=o) for o in outputs]
    return dict(cell_type='code', metadata={}, execution_count=None, source=source, outputs=whole)


def page(
    explorer: str = '',  # HTML; '': a plain output in its place
) -> list:
    "The cells of a page in order."
    shown = {'text/html': explorer} if explorer else {'text/markdown': 'Some *text*.'}
    return [markdown('# Sane', '', '> A page in order.'), markdown(TEXT),
            markdown('## Numbers', '', '$$a = b$$ {#eq-one}'),
            code('1 + 1', {'text/plain': '2'}), code('#| echo: false\nexplorer', shown)]


def replaced(old: str, new: str, at: int = 2):
    "A fault: another text in the source of cell `at`."
    def plant(cells):
        assert old in cells[at - 1]['source']
        cells[at - 1]['source'] = cells[at - 1]['source'].replace(old, new)
    return plant


def added(*cells):
    "A fault: more cells, from number 6."
    return lambda page: page.extend(cells)


def other_output(change):
    "A fault: the explorer's HTML is another one."
    def plant(cells):
        data = cells[4]['outputs'][0]['data']
        before, data['text/html'] = data['text/html'], change(data['text/html'])
        assert before != data['text/html']
    return plant


def stored_data(text: str, change) -> str:
    "Change the data inside an explorer."
    at = re.search(r'(<script type="application/json"[^>]*>)(.*?)</script>', text, re.S)
    change(data := json.loads(at[2]))
    return text[:at.start(2)] + json.dumps(data, ensure_ascii=False, separators=(',', ':')) + text[at.end(2):]


def other_point(data: dict):
    "Another simulated number than the stored one."
    data['spec']['datasets']['simulated'][-1]['variance'][1][0] *= 1.01


NO_LINKS = markdown('A page without links to itself as a notebook.')
# a picture
DOT = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='
EXERCISES = ('### Exercises\n\n1. One?\n2. Two?\n3. Three?\n\n<details><summary>Solutions</summary>\n\n1. '
             'Yes.\n2. No.\n\n    ```\n1. This is code.\n    ```\n3. Both.\n\n</details>')
def ending(old: str, new: str):
    "A fault: another text in the exercises, with which a page ends; they are cell 7."
    assert old in EXERCISES
    return added(markdown(EXERCISES.replace(old, new)))


ERROR = dict(output_type='error', ename='ValueError', evalue='it broke', traceback=['ValueError: it broke'])
FAULTS = {  # name -> what is planted, number of the cell (None: the whole page), words of the message
    'link': (replaced('02_other.ipynb#a-section', '02_gone.ipynb'), 2, "link to '02_gone.ipynb' is broken"),
    'link-out': (replaced('02_other.ipynb#a-section', '../../README.md'), 2, 'leads out of nbs/'),
    'link-site': (replaced('02_other.ipynb#a-section', 'https://example.org/small/build/other.html'), 2,
                  'leads from a copy of the site to the original'),
    'name-elsewhere': (added(markdown('## run', '',
                                      'Here is [`run`](#run), and '
                                      '[`run`](../build/name-elsewhere.html#run).')), 6,
                                      '`run` is linked to ../build/name-elsewhere.html#run, which it does '
                                      'not mean'),
    'name-mistaken': (added(code('from small.other import a_section'),
                            code('1', {'text/markdown': 'See [`other`](other.html#a-section).'})), 7,
                            '`other` is linked to other.html#a-section'),
    'dash': (replaced('a picture', 'an option --scale, a picture'), 2, "'–scale' was two hyphens"),
    'dash-first': (added(code('1', {'text/markdown': '--set train.steps=5 sets it.'})), 6,
                   "'–set' was two hyphens"),
    'raw-style': (added(code('1', {'text/html': '<style>p::before { content: "<table>" }</style>'})), 6,
                  "holds '<table'"),
    'raw-drawing': (added(code('1',
                               {'text/html': '<svg viewBox="0 0 1 1" role="img"><title>{{< video a '
                                             '>}}</title></svg>'})), 6, "holds '{{<'"),
    'raw-block': (added(code('1', {'text/markdown': '```{=html}\n<style>/* </TABLE> */</style>\n```'})), 6,
                  "holds '</TABLE'"),
    'raw-lost': (added(code('#| output: false\n1', {'text/html': '<svg viewBox="0 0 2 2"></svg>'})), 6,
                 'does not arrive on the page as it was stored'),
    'anchor': (replaced('#a-section', '#no-section'), 2, 'build/02_other.ipynb has no anchor #no-section'),
    'anchor-own': (replaced('](#numbers)', '](#letters)'), 2, 'has no anchor #letters'),
    'image': (replaced('dot.svg', 'gone.svg'), 2, "image 'gone.svg' is broken"),
    'image-html': (added(code('1', {'text/markdown': '```{=html}\n<img src="gone.svg">\n```'})), 6,
                   "image 'gone.svg' is broken"),
    'citation': (replaced('@known2020', '@unknown2021'), 2, 'citation @unknown2021 is in no bibliography'),
    'reference': (replaced('@eq-one', '@eq-two'), 2, 'cross-reference @eq-two has no target'),
    'reference-section': (lambda cells: (replaced('## Numbers', '## Numbers {#sec-numbers}', 3)(cells),
                                         replaced('#numbers', '#sec-numbers')(cells),
                                         replaced('@eq-one', '@sec-numbers')(cells)), 2,
                                         'needs number-sections'),
    'formula': (replaced('$x^2$', r'$\frac{x}{$'), 2, r'Could not convert TeX math \frac{x}{'),
    'formula-name': (replaced('$x^2$', r'$\nosuchthing x$'), 2, r'unexpected control sequence \nosuchthing'),
    'formula-katex': (replaced('$x^2$', '$x^a^b$'), 2, "KaTeX cannot read the formula 'x^a^b'"),
    'formula-output': (added(code('1', {'text/markdown': r'So $\nosuchthing$.'})), 6,
                       r'unexpected control sequence \nosuchthing'),
    'formula-blank': (replaced('$x^2$', '$ x^2 $'), 2, 'looks like a formula but is none'),
    'tex-lost': (replaced('$x^2$', r'\alpha'), 2, 'alpha'),
    'host-script': (added(markdown('<script src="https://cdn.example.com/a.js"></script>')), 6,
                    'asks another host: <script src="https://cdn.example.com/a.js">'),
    'host-image': (replaced('dot.svg', 'https://img.example.com/dot.svg'), 2,
                   'asks another host: <img src="https://img.example.com/dot.svg">'),
    'host-style': (added(markdown('<style>@import "//fonts.example.com/f.css";</style>')), 6,
                   '<style> with //fonts.example.com/f.css'),
    'host-inline-style': (
        added(markdown('<p style="background: url(https://a.example.com/b.png)">Text.</p>')), 6,
        'https://a.example.com/b.png'),
    'host-fetch': (added(markdown('<script>fetch("https://api.example.com/x")</script>')), 6,
                   'that asks https://api.example.com/x'),
    'host-frame': (
        added(markdown("<iframe srcdoc='<link rel=stylesheet href=https://a.example.com/b.css>'></iframe>")),
        6, '<link href="https://a.example.com/b.css">'),
    'error': (added(code('1 / 0', ERROR)), 6, 'a stored error is on the page: ValueError: it broke'),
    'second-title': (added(markdown('# Another title')), 6, 'second title'),
    'tag': (replaced('a picture', 'a <folder>'), 2, '<folder> is taken for an HTML tag'),
    'details': (added(markdown('<details><summary>Solution</summary>', '', 'Text.')), 6,
                '<details> is never closed'),
    'description': (replaced('> A page in order.', '', 1), 1, 'no description'),
    'opening': (lambda cells: cells.insert(1, markdown('## At once')), None, 'no opening'),
    'percent': (added(code("text = '''\n%lost = 1\n'''")), 6,
                "drops this line, which starts with %: '%lost = 1'"),
    'options': (added(code('#| label: "fig\n1')), 6, 'options of the cell'),
    'id-twice': (added(markdown('<p id="mine">One.</p>', '', '<p id="mine">Two.</p>')), 6,
                 "the id 'mine' is on the page 2 times"),
    'processing': (added(code("#| export\ndef early(x: 'Later'):\n    \"A type that is not there yet.\"")), 6,
                   "nbdev cannot process this notebook"),
    'script': (added(code('1', {'text/markdown': '```{=html}\n<script>draw()</script>\n```'})), 6,
               'is in no explorer'),
    'equation-bare': (added(markdown('So $$c = d,$$', 'as was said.')), 6,
                      'a displayed equation has no label'),
    'equation-alone': (added(markdown('$$c = d$$', '', 'Here is {#eq-two}.')), 6,
                       'a displayed equation has no label'),
    'equation-output': (added(code('1', {'text/markdown': '$$c = d$$'})), 6,
                        'a displayed equation has no label'),
    'label-twice': (added(markdown('$$c = d$$ {#eq-one}')), None,
                    "the label 'eq-one' is on the page 2 times"),
    'picture': (added(code('draw()', {'image/png': DOT})), 6, 'a picture needs words'),
    'picture-empty': (added(code('#| echo: false\n#| fig-alt: ""\ndraw()', {'image/png': DOT})), 6,
                      'a picture needs words'),
    'pictures': (added(code('#| fig-alt: [One]\ndraw()', {'image/png': DOT}, {'image/png': DOT})), 6,
                 'a picture needs words'),
    'exercises': (ending('### Exercises', '#### Exercises'), 7, 'a chapter ends with "### Exercises"'),
    'exercises-four': (ending('3. Three?', '3. Three?\n4. Four?'), 7,
                       'three exercises, numbered 1 to 3; here are 1, 2, 3, 4'),
    'exercises-unsolved': (ending('2. No.\n', ''), 7, 'three solutions, numbered 1 to 3; here are 1, 3'),
    'exercises-open': (ending('<details><summary>Solutions</summary>',
                              '<details open=""><summary>Solutions</summary>'), 7,
                              'a chapter ends with "### Exercises"'),
    'exercises-before': (ending('</details>', '</details>\n\nMore text.'), 7,
                         'a chapter ends with "### Exercises"'),
    'ways-in': (added(NO_LINKS), None, 'no link to open it in Colab'),
    'explorer-script': (other_output(lambda text: text.replace('finalize()', 'finalise()')), 5,
                        'its script, is not the present one'),
    'explorer-data': (other_output(lambda text: stored_data(text, other_point)), 5,
                      'its datasets are not what Python makes'),
    'explorer-formula': (other_output(lambda text: text.replace('64 * datum.w /', '65 * datum.w /')), 5,
                         'its concat are not what Python makes'),
    'explorer-form': (other_output(lambda text: text.replace('"made"', '"said"')), 5,
                      'it has not the present form'),
}


def write_site(
    root,          # folder to make
    explorer: str, # HTML
    faults: dict,  # name -> what is planted; each gets a page of its own
    listed=(),     # more lines of the sidebar
    # what notebooks go through
    procs='processors:ShownOnce processors:Folded processors:Signatures processors:OwnLinks '
          'processors:html_for_quarto',
    tables='none', # what Quarto does with tables in raw HTML
):
    "A small checkout."
    (root / 'nbs' / 'build').mkdir(parents=True)
    (root / 'results').mkdir()
    (root / 'settings.ini').write_text('[DEFAULT]\nrepo = small\nlib_name = small\nlib_path = small\nversion '
                                       '= 0\nmin_python = 3.11\nlicense = apache2\nnbs_path = nbs\nrecursive '
                                       '= True\n'
                                       'doc_path = _docs\nbranch = main\ntitle = small\nauthor = '
                                       'nobody\nauthor_email = nobody@example.org\nuser = '
                                       'nobody\ndescription = A small site.\nkeywords = none\n'
                                       'status = 1\nlanguage = English\naudience = Developers\ncopyright = '
                                       'none\nblack_formatting = False\nput_version_in_init = '
                                       'False\ncustom_sidebar = True\n'
                                       f'doc_host = https://example.org\ndoc_baseurl = /small\ngit_url = '
                                       f'https://github.com/nobody/small\nskip_procs = add_links\nprocs = '
                                       f'{procs}\n', encoding='utf-8')
    chapters = {'build/01_sane.ipynb': page(explorer),
                'build/02_other.ipynb': [markdown('# Other', '', '> Another page.'),
                                         markdown(TEXT.replace('[@known2020]', 'nothing').replace(
        'to @eq-one', 'to nothing').replace('(#numbers)', '(#a-section)')),
        markdown('## A section', '', 'Text.')], 'index.ipynb': [
        markdown('# Home', '', '> Where it starts.'),
        markdown('The home page is short. It leads [to the first page](build/01_sane.ipynb), and it says a '
                 'few words, at least twenty of them, so that it has an opening.')]}
    for i, (name, plant) in enumerate(faults.items(), 10):
        chapters[f'build/{i}_{name}.ipynb'] = cells = page(explorer if name.startswith('explorer') else '')
        plant(cells)
    for name, cells in chapters.items():
        address = f'github.com/nobody/small/{{}}/main/nbs/{name}'
        links = markdown(
            f"[Colab](https://{address.replace('github.com', 'colab.research.google.com/github').format('blob')}), [file](https://{address.format('raw')})")
        if 'Exercises' not in cells[-1]['source'] and name != 'index.ipynb': cells.append(markdown(EXERCISES))
        if NO_LINKS not in cells: cells.insert(len(cells) - (name != 'index.ipynb'), links)
        for i, cell in enumerate(cells): cell['id'] = f'c{i}'
        (root / 'nbs' / name).write_text(
            json.dumps(dict(metadata=dict(kernelspec=dict(name='python3', language='python',
                                                          display_name='python3')), nbformat=4,
                                                          nbformat_minor=5, cells=cells)), encoding='utf-8')
    site = dict(project=dict(type='website'), bibliography='references.bib',
                format=dict(html={'html-math-method': 'mathml', 'html-table-processing': tables}),
                website=dict(sidebar=dict(contents=[
        'index.ipynb',
        dict(section='Build', contents=[*(n for n in chapters if n != 'index.ipynb'), *listed])])))
    (root / '_quarto.yml').write_text(json.dumps(site), encoding='utf-8')  # JSON is YAML
    (root / 'nbs' / 'references.bib').write_text(
        '@article{known2020,\n  title = {Known},\n  author = {Nobody},\n  year = {2020}\n}\n',
        encoding='utf-8')
    (root / 'nbs' / 'build' / 'dot.svg').write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 2"><circle cx="1" cy="1" r="1"/></svg>',
        encoding='utf-8')
    (root / 'README.md').write_text('# Small\n\n[The first page](nbs/build/01_sane.ipynb#numbers), and [a '
                                    'part](#a-part).\n\n## A part\n\n![A dot](nbs/build/dot.svg)\n',
                                    encoding='utf-8')
    return root


@pytest.fixture(scope='module')
def explorer(root):
    return variance_explorer(stored_points(root)).html


@pytest.fixture(scope='module')
def small_site(tmp_path_factory, root, explorer):
    "Makes small checkouts."
    def make(faults={}, **more):
        made = write_site(tmp_path_factory.mktemp('docs') / 'small', explorer, faults, **more)
        (made / 'nbs' / 'tools').mkdir(exist_ok=True); shutil.copy(
            root / 'nbs' / 'tools' / '08_explorers.json', made / 'nbs' / 'tools')
        return made
    return make


@pytest.fixture(scope='module')
def found(small_site):
    "What the check says of a site with all faults at once."
    made = small_site({name: plant for name, (plant, _, _) in FAULTS.items()}, listed=['build/99_gone.ipynb'])
    for name, text in {'README.md': '[gone](nbs/gone.ipynb), [nowhere](#nowhere), ![no picture](gone.png) '
                                    'and [no page](https://example.org/small/build/gone.html)\n'}.items():
        (made / name).write_text((made / name).read_text(encoding='utf-8') + text, encoding='utf-8')
    (made / 'nbs' / 'build' / '98_unlisted.ipynb').write_text(
        (made / 'nbs' / 'build' / '02_other.ipynb').read_text(encoding='utf-8').replace(
            '02_other.ipynb)', '98_unlisted.ipynb)'), encoding='utf-8')
    return docs_check.check(made)[1]


def run(*given):
    "Run the check as a command."
    return subprocess.run([sys.executable, docs_check.__file__, *map(str, given)], capture_output=True,
                          text=True, encoding='utf-8')


def test_a_site_in_order_passes(small_site):
    done = run(small_site())
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'in order: 3 pages, 11 links, 2 images, 3 formulas, 2 citations and cross-references, 1 explorers' in done.stdout


@pytest.mark.parametrize('name', FAULTS)
def test_each_fault_is_named(found, name):
    _, cell, words = FAULTS[name]
    mine = [p for p in found if re.fullmatch(rf'nbs/build/\d+_{name}\.ipynb', p.file)]
    assert len(mine) == 1, '\n'.join(map(str, mine)) or f'{name}: nothing was found'
    assert mine[0].cell == cell and words in mine[0].text, mine[0]


def test_the_rest_of_that_site_is_in_order(found):
    known = {'README.md', '_quarto.yml'}
    assert not [p for p in found if p.file not in known
                and not re.search('|'.join(rf'_{name}\.ipynb' for name in FAULTS), p.file)]


def test_faults_around_the_pages(found):
    said = '\n'.join(map(str, found))
    for words in ('_quarto.yml: the sidebar lists build/99_gone.ipynb, which does not exist',
                  '_quarto.yml: the sidebar does not list build/98_unlisted.ipynb',
                  "README.md: the link to 'nbs/gone.ipynb' is broken",
                  "README.md: the link to '#nowhere' is broken", "README.md: the image 'gone.png' is broken",
                  'the site has no page build/gone.html'):
        assert words in said
    assert sum(p.file in ('README.md', '_quarto.yml') for p in found) == 6


def test_one_fault_is_enough(small_site):
    done = run(small_site(dict(image=FAULTS['image'][0])))
    assert done.returncode == 1 and "nbs/build/10_image.ipynb: cell 2: the image 'gone.svg' is broken" in done.stdout, done.stdout + done.stderr
    assert done.stderr.startswith('1 problem')


def test_quarto_must_not_read_tables(small_site):
    said = [str(p) for p in docs_check.check(small_site(tables='default'))[1]]
    assert len(said) == 1 and said[0].startswith('_quarto.yml: html-table-processing')


def test_a_table_in_the_script_of_an_explorer(small_site):
    made = small_site(
        {'explorer-table': other_output(lambda text: text.replace('// Draw', '// <table> Draw'))})
    said = [str(p) for p in docs_check.check(made)[1]]
    assert any("holds '<table'" in text for text in said) and all('10_explorer-table.ipynb: cell 5' in text
                                                                  for text in said), said


def test_html_outputs_need_the_processor(small_site):
    table = added(code('1', {'text/html': '<table><tr><td>1</td></tr></table>', 'text/plain': '1'}))
    assert docs_check.check(small_site(dict(table=table)))[1] == []
    said = list(docs_check.check(small_site(dict(table=table), procs=''))[1])
    assert {p.cell for p in said} == {5, 6} and all('an output of type text/html' in p.text for p in said)


def test_a_preview_has_links_pictures_equations_and_citations(small_site, tmp_path):
    picture = code('#| fig-alt: "One dot."\ndot', {'image/png': DOT, 'text/plain': '<Figure>'})
    done = run(small_site(dict(picture=added(picture))), '--pages', tmp_path)
    assert done.returncode == 0 and '4 pages of a preview, not as Quarto makes them' in done.stdout, done.stdout + done.stderr
    text, home = (' '.join((tmp_path / name).read_text(encoding='utf-8').split())
                  for name in ('build/picture.html', 'index.html'))
    for part in (f'<img src="data:image/png;base64,{DOT}" alt="One dot."', '<a href="other.html#a-section">',
                 '<a href="#eq-one">Equation (1)</a>',
                 '<span class="number" id="eq-one">(1)</span>', '(<a href="#ref-known2020"',
                 '<a href="../index.html">Home</a>', '<a href="picture.html" aria-current="page">Sane</a>',
                 '<title>Sane</title>', 'A page in order.', 'made without Quarto'): assert part in text, part
    assert ((tmp_path / 'build' / 'dot.svg').exists() and '<a href="build/sane.html">' in home
            and '#|' not in text and 'docs-check' not in text)


def test_two_pages_need_two_files(small_site):
    made = small_site()
    shutil.copy(made / 'nbs' / 'build' / '02_other.ipynb', made / 'nbs' / 'build' / '03_other.ipynb')
    said = [str(p) for p in docs_check.check(made)[1]]
    assert 'nbs/build/03_other.ipynb: another notebook is written to build/other.html too' in said


@pytest.mark.parametrize('package, tool',
                         [('pypandoc', 'pandoc_path'), ('playwright._impl._driver', 'node_path')])
def test_a_missing_tool_is_an_error(monkeypatch, package, tool):
    monkeypatch.setitem(sys.modules, package, None)   # importing it now fails
    with pytest.raises(docs_check.Missing, match='make env'): getattr(docs_check, tool)()


def test_katex_must_be_there(monkeypatch):
    monkeypatch.setattr(docs_check.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(docs_check.Missing, match='make env'): docs_check.katex_path()


def test_formulas_by_katex():
    good, bad = docs_check.katex_faults([(r'\frac{1}{2}', False), (r'\frac{1}{', True)])
    assert good is None and 'KaTeX parse error' in bad


def test_numbers_may_differ_a_little():
    assert docs_check.agrees(dict(a=[1, None, 'x']), dict(a=[1.0001, None, 'x']))
    for other in (dict(a=[1.01, None, 'x']), dict(a=[1, 0, 'x']), dict(a=[1, None]), dict(b=[1, None, 'x'])):
        assert not docs_check.agrees(dict(a=[1, None, 'x']), other)
