"What happens to notebooks on their way to the site: links of names, HTML outputs, signatures."
from pathlib import Path

import pytest
from execnb.nbio import dict2nb, mk_cell
from nbdev.process import NBProcessor

import docs_check
import processors


def processed(root: Path, path: str, cells: list, *procs) -> list:
    "Cells after some processors, as if they were those of a page."
    notebook = dict2nb(dict(cells=cells, metadata=dict(kernelspec=dict(name='python3', language='python'))))
    notebook.path_ = str(root / 'nbs' / path)
    one = NBProcessor(nb=notebook, procs=list(procs))
    one.process()
    return one.nb.cells


def shown(source: str, data: dict):
    "A cell with one output."
    cell = mk_cell(source)
    cell.outputs = [dict(output_type='display_data', metadata={}, data=data)]
    return cell


def linked(root: Path, path: str, code: str, text: str) -> str:
    "A sentence on a page with some code."
    return processed(root, path, [mk_cell(code), mk_cell(text, 'markdown')], processors.OwnLinks)[-1].source


@pytest.fixture(autouse=True)
def at_the_root(root, monkeypatch): monkeypatch.chdir(root)


CORE = '#| default_exp core\n#| export\nclass Transformer: pass'

@pytest.mark.parametrize('path, code, text, link', [
    ('build/03_core.ipynb', CORE, 'a `Transformer`', 'a [`Transformer`](core.html#transformer)'),
    ('build/07_scores.ipynb', 'from sparsecod.core import Transformer', 'a `Transformer`',
     'a [`Transformer`](core.html#transformer)'),
    ('index.ipynb', 'from sparsecod.data import Corpus', '`Corpus.from_texts()`',
     '[`Corpus.from_texts()`](build/data.html#corpus.from_texts)'),
    ('reproduce/01_depth.ipynb', 'from sparsecod.studies import (RunConfig,\n    run_study)', '`run_study()`',
     '[`run_study()`](../tools/studies.html#run_study)'),
])
def test_a_name_that_the_page_uses_is_linked(root, path, code, text, link):
    assert linked(root, path, code, text) == link


@pytest.mark.parametrize('path, code, text', [
    # names of other modules
    ('build/03_core.ipynb', CORE, 'the method `run`, the blocks `layers`, a `ratio`'),
    ('build/06_adapters.ipynb', 'import torch', '`embed` and `open_model`'),  # nothing is imported
    ('build/05_train.ipynb', 'from sparsecod.studies import run_study', '`finished`, `Transformer`'),
    # RunConfig has such a field
    ('tools/05_studies.ipynb', 'from sparsecod.train import train', 'the field `train` of a run'),
    ('build/03_core.ipynb', 'class Transformer: pass', '`Transformer`'),  # one of its own, not exported
    ('build/03_core.ipynb', CORE,
     'see [`Transformer`](03_core.ipynb) and [the `Transformer` of ours](03_core.ipynb)'),
    ('build/03_core.ipynb', CORE, '```python\n`Transformer`\n```\n\n    `Transformer`'),
    ('build/03_core.ipynb', CORE, '````{=html}\n```\nx = `Transformer`\n````'),
])
def test_any_other_name_is_left_alone(root, path, code, text):
    assert linked(root, path, code, text) == text


def test_links_in_outputs_spare_raw_blocks(root):
    text = 'A `Transformer`.\n\n```{=html}\n<script>x = `Transformer`</script>\n```\n'
    after = processed(root, 'build/03_core.ipynb', [mk_cell(CORE), shown('1', {'text/markdown': text})],
                      processors.OwnLinks)[-1].outputs[0]['data']['text/markdown']
    assert after == text.replace('`Transformer`.', '[`Transformer`](core.html#transformer).')


@pytest.mark.parametrize('text', ['<b>x</b>', '<script>const a = `x`, b = ````` `y` `````</script>',
                                  '<p>\n\n    four\n</p>', ['<p>\n', '```\n', '</p>']])
def test_html_comes_through_pandoc_as_it_is(root, text):
    more = {'text/plain': 'x', 'application/vnd.jupyter.widget-view+json': dict(model_id='a')}
    data = processed(root, 'build/03_core.ipynb', [shown('1', {'text/html': text, **more})],
                     processors.html_for_quarto)[0].outputs[0]['data']
    assert list(data) == ['text/markdown']
    assert docs_check.pandoc(f'Before.\n\n{data["text/markdown"]}\n\nAfter.',
                             'markdown')[0] == f'<p>Before.</p>\n{"".join(text)}\n<p>After.</p>\n'


def test_what_shows_its_source_is_not_documented_besides(root):
    code = ('#| exports\nA = 1\ndef one(): pass\nclass Two:\n    def three(self): pass\ndef two(): pass\ndef '
            'five(): pass', '#| export\ndef four(): pass')
    cells = [mk_cell('## Five', 'markdown'), mk_cell(code[0]), shown('show_doc(Two)', {}),
             shown('show_doc(one)', {}), mk_cell(code[1]), shown('show_doc(four)', {}), mk_cell('one()')]
    after = [cell.source for cell in processed(root, 'build/01_layers.ipynb', cells, processors.ShownOnce)]
    assert after == ['## Five', '[]{#one}[]{#two}', code[0].split('\n', 1)[1], code[1].split('\n', 1)[1],
                     'show_doc(four)', 'one()']


def test_code_is_folded_where_it_is_tagged(root):
    cells = [mk_cell('#| exports\ndef _one(): pass\nclass Two: pass'), mk_cell('one()'),
             mk_cell('#| code-fold: show\n1 + 1')]
    for cell in cells[::2]: cell['metadata'] = {'tags': ['fold']}
    after = [cell.source for cell in processed(root, 'build/01_layers.ipynb', cells, processors.Folded)]
    assert [source.startswith('#| code-fold: true\n#| code-summary: "Code')
            for source in after] == [True, False, True]
    assert 'one, Two"\ndef _one' in after[0] and after[2].endswith('"Code"\n1 + 1')


def documented(root: Path, module: str, name: str, text: str) -> str:
    "What becomes of the documentation that nbdev writes of a symbol."
    code = mk_cell(f'#| default_exp {module}\n#| export\nclass {name}: pass')
    return processed(root, f'build/{module}.ipynb',
                     [code, shown(f'show_doc({name})', {'text/markdown': text})],
                     processors.Signatures)[-1].outputs[0]['data']['text/markdown']


BARE = '```python\ndef {}(\n    *args, **kwargs\n):\n```'

@pytest.mark.parametrize('module, name, arguments',
                         [('bench', '_Cost', ['parameters: int', 'tokens: int', 'basis: str']),
                          ('widgets', '_Panel', []), ('cloze', '_Gap', [])])
def test_a_signature_names_its_arguments(root, module, name, arguments):
    text = documented(root, module, name, BARE.format(name))
    assert 'kwargs' not in text and f'def {name}(' in text and all(f'\n    {a},' in text for a in arguments)
    assert bool(arguments) <= (',' in text)


@pytest.mark.parametrize('text, expected', [
    ('*One line.*', '*One line.*'),
    ('*A sentence*\nof two\n(or three) lines.\n\nMore.', '*A sentence of two (or three) lines.*\n\nMore.'),
    ('*A sentence.*\n\nMore.', '*A sentence.*\n\nMore.'),
    ('*A list:*\n- one\n- two', '*A list:*\n- one\n- two')])
def test_the_first_paragraph_is_slanted_as_a_whole(root, text, expected):
    assert documented(root, 'widgets', 'Panel',
                      f'```python\ndef f():\n```\n\n{text}').endswith(f'\n\n{expected}')


def test_a_signature_shows_no_address(root):
    text = ('```python\ndef Panel(\n    parts:Parts=<__main__.Parts object at '
            '0x7f7516d033d0>,\n)->__main__.Layout | None:\n```')
    assert documented(root, 'widgets', 'Panel',
                      text) == text.replace('<__main__.Parts object at 0x7f7516d033d0>',
                                            'Parts()').replace('__main__.Layout', 'Layout')
