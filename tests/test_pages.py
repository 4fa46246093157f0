"""Study pages as a laboratory: one settings cell drives a page, and what only holds for the recorded runs
is not asked of others."""
import json
import re
import shutil

import matplotlib
import pytest

from sparsecod import figures
from sparsecod.figures import page_records, results_folder
from sparsecod.studies import load_results

matplotlib.use('Agg')
PAGES = {'02_weight_decay': 'decay', '03_context_length': 'context', '04_grouped_query_attention': 'gqa',
         '05_mixture_of_experts': 'moe',
         '06_remedies': 'remedies', '07_recipe_ladder': 'ladder', '08_sparsity_and_variance': 'sources',
         '09_more_training': 'training'}


def code(root, page):
    "The cells of code of a page, without the one for Colab."
    notebook = json.loads((root / 'nbs' / 'reproduce' / f'{page}.ipynb').read_text(encoding='utf-8'))
    return [''.join(c['source']) for c in notebook['cells'] if c['cell_type'] == 'code'][1:]


@pytest.fixture
def copy(root, tmp_path):
    "The recorded runs in a folder of somebody's own, in which two kinds of sharing were not run."
    shutil.copytree(root / 'results' / 'laptop', tmp_path / 'laptop')
    for r in load_results(tmp_path, 'laptop', 'gqa'):
        if r['config']['model']['n_kv_heads'] == 1: (tmp_path / 'laptop' / f"{r['name']}.json").unlink()
    return tmp_path


def test_the_recorded_runs(root, capsys):
    records, recorded = page_records('gqa', 'laptop', 3, results_folder(root))
    assert (recorded and capsys.readouterr().out == ''
            and {r['id'] for r in records} == {r['id']
                                               for r in load_results(root / 'results', 'laptop', 'gqa')})
    both, _ = page_records(('training', 'budget'), 'laptop', 3, results_folder(root))
    assert len(both) == len({r['id'] for r in both}) > len(page_records('budget', 'laptop', 3,
                                                                        results_folder(root))[0])


@pytest.mark.parametrize('seeds', [1, [2], [0, 1]])
def test_other_seeds_are_other_runs(root, seeds, capsys):
    records, recorded = page_records('gqa', 'laptop', seeds, results_folder(root))
    assert not recorded and {r['seed'] for r in records} == set(range(seeds) if isinstance(seeds, int)
                                                                else seeds) and 'skipped' in capsys.readouterr().out


def test_another_folder_holds_other_runs(copy): assert not page_records('moe', 'laptop', 3, copy)[1]


def test_a_rerun(root, copy, monkeypatch):
    asked = []
    monkeypatch.setattr(figures, 'run_study', lambda *args, **options: asked.append((*args, options)))
    assert not page_records(('moe', 'gqa'), 'laptop', [1], copy, rerun=True)[1]
    assert asked == [(study, 'laptop', [1], dict(out=copy)) for study in ('moe', 'gqa')]
    with pytest.raises(ValueError, match='FOLDER'):
        page_records('moe', 'laptop', 3, results_folder(root), rerun=True)
    assert len(asked) == 2, 'something was run into the committed records'


@pytest.mark.parametrize('scale, seeds', [('tiny', 3), ('laptop', [7]), ('gpu', 1)])
def test_no_runs_at_all(root, scale, seeds):
    with pytest.raises(ValueError, match='FOLDER.*RERUN'):
        page_records('moe', scale, seeds, results_folder(root))


@pytest.mark.parametrize('page', PAGES)
def test_a_page_begins_with_its_settings(root, page):
    imports, settings, *rest = code(root, page)
    assert (re.findall('^([A-Z]+) = ', settings, re.M) == ['SCALE', 'SEEDS', 'FOLDER', 'RERUN']
            and f"'{PAGES[page]}'" in settings)
    for cell in rest:
        assert not re.search(r"results_folder|'laptop'|run_study",
                             cell), f'a cell that the settings do not drive:\n{cell}'
        if cell.startswith('#| hide') and 'assert' in cell and 'recorded' not in cell:
            assert not re.search(r'records|groups|rows|runs\b',
                                 cell), f'a check of the recorded runs is asked of all:\n{cell}'


@pytest.mark.parametrize('page', ['04_grouped_query_attention', '05_mixture_of_experts'])
def test_a_page_shows_other_runs(root, page, copy, monkeypatch):
    "With one seed, and on page 04 without half of the variants."
    monkeypatch.chdir(root / 'nbs' / 'reproduce')
    names = {}
    for cell in code(root, page):
        if 'SCALE = ' in cell:
            cell = re.sub(r'SEEDS = 3', 'SEEDS = [0]',
                          re.sub(r'FOLDER = results_folder\(\)', f'FOLDER = {str(copy)!r}', cell))
        exec(compile(cell, page, 'exec'), names)
    matplotlib.pyplot.close('all')
    assert not names['recorded'] and {r['seed'] for r in names['records']} == {0}
