"""Explorers: the same numbers in Python and on the screen, usable without a mouse, in both themes and on a
phone, from disk."""
import json
import math
import re
from contextlib import contextmanager
from itertools import product

import pytest

import vega
from browser import open_browser, visit
from sparsecod import explorers as ex
from sparsecod.claims import PUBLISHED
from sparsecod.figures import label_variants
from sparsecod.studies import SCALES, STUDIES, load_results, read_metric, summarise, vary
from sparsecod.theory import CLOSED_FORMS

MADE = 'variance', 'results', 'surgery'


@pytest.fixture(scope='module')
def records(root):
    return load_results(root / 'results', 'laptop')


@pytest.fixture(scope='module')
def points(root):
    return ex.stored_points(root)


@pytest.fixture(scope='module')
def made(records, points):
    return dict(variance=ex.variance_explorer(points), results=ex.results_explorer(records),
                surgery=ex.surgery_explorer(records))


@pytest.fixture(scope='module')
def saved(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp('explorers')
    for name, explorer in made.items():
        (folder / f'{name}.html').write_text(explorer.page(), encoding='utf-8')
    return folder


@pytest.fixture(scope='module')
def browser():
    with open_browser() as one: yield one


class Shown:
    "An explorer on the screen."
    def __init__(self, page, name):
        self.page, self.root = page, page.locator(f'#sce-{name}')
        page.wait_for_function(f"document.getElementById('sce-{name}').view")

    def says(self): return self.root.locator('.says').inner_text()

    def control(self, name): return self.root.locator(f'[name="{name}"]')

    def press(self, name, *keys):
        self.control(name).focus()
        for key in keys: self.page.keyboard.press(key)

    def table(self, title):
        "The table of that title: its rows, as texts."
        fold = self.root.locator('details[data-table]', has=self.page.get_by_text(title, exact=True))
        if fold.get_attribute('open') is None: fold.locator('summary').click()
        fold.locator('table').wait_for(state='attached')
        return fold.locator('tbody tr').evaluate_all(
            'rows => rows.map(r => [...r.cells].map(c => c.textContent))')


@contextmanager
def shown(browser, saved, name, width=1000, theme='light'):
    with visit(browser, (saved / f'{name}.html').as_uri(), width, theme) as page: yield Shown(page, name)


def close(a: str, b: float) -> bool:
    "Does the text on the screen tell this number?"
    return math.isclose(float(a), b, rel_tol=6e-4, abs_tol=1e-12)


def numbers(text: str) -> list[float]:
    "The numbers of a sentence."
    return [float(n) for n in re.findall(r'(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?', text.replace('−', '-'))]


# What the explorers hold

def test_the_library_is_the_one_that_python_brings():
    assert vega.FILE.read_text(encoding='utf-8') == vega.bundle()


@pytest.mark.parametrize('name', MADE)
def test_an_explorer_is_small_and_asks_nobody(made, name):
    html = made[name].html
    assert len(html.encode()) < 420_000
    assert not re.search(r'@import|url\(|fetch\(|<script src|<link|onclick', html.replace('script.src', ''))


@pytest.mark.parametrize('bad', ['a b', 'a"b', "a'", '', '<b>', 'é'])
def test_a_name_that_would_break_the_page_is_refused(bad):
    with pytest.raises(ValueError, match='^name='): ex.variance_explorer(name=bad)


def test_text_from_records_cannot_break_out(records, browser, tmp_path):
    hostile = '</script><script>document.title = "broken"</script><!--"&\'`${1}'
    evil = [r | dict(provenance=r['provenance'] | dict(hardware=hostile, commit=hostile))
            for r in records[:12]]
    explorer = ex.results_explorer(evil)
    (tmp_path / 'results.html').write_text(explorer.page(), encoding='utf-8')
    with shown(browser, tmp_path, 'results') as e:
        assert (hostile in e.table('Runs, and the way to their records')[0]
                and e.page.title() == explorer.title)


def test_the_stored_dots_can_be_made_again(points):
    stored = next(s for s in points['points']
                  if (s['p'], s['step'], s['norm']) == (0.25, 5, 'layernorm_scaling'))
    again = ex._simulate_points(0.25, 5, 'layernorm_scaling', n_jacobian=2)
    assert [m for m, _ in again['variance']] == pytest.approx([m for m, _ in stored['variance']], rel=1e-3)
    assert {(s['p'], s['step'], s['norm'])
            for s in points['points']} == set(product(ex._DENSITIES, ex._SCALED, CLOSED_FORMS))


@pytest.mark.parametrize('bad', [dict(L=1), dict(L=65), dict(p=0.0), dict(p=0.33), dict(p=1.05),
                                 dict(step=15), dict(norm='post_ln')])
def test_impossible_settings_are_named(bad):
    (field, _), = bad.items()
    with pytest.raises(ValueError, match=f'^{field}='): ex.variance_explorer(**bad)


@pytest.mark.parametrize('bad', [dict(study='nothing'), dict(metric='beauty'), dict(curve='nothing')])
def test_impossible_choices_are_named(records, bad):
    (field, _), = bad.items()
    with pytest.raises(ValueError, match=f'^{field}='): ex.results_explorer(records, **bad)


@pytest.mark.parametrize('bad', [dict(model='L=3'), dict(mode='kill'), dict(i=0), dict(j=17),
                                 dict(model='L=4', i=5)])
def test_impossible_operations_are_named(records, bad):
    with pytest.raises(ValueError, match=f'^{list(bad)[-1]}='): ex.surgery_explorer(records, **bad)


def test_without_records_there_is_nothing_to_show(records):
    with pytest.raises(ValueError, match='records'): ex.results_explorer([])
    with pytest.raises(ValueError, match='study'): ex.surgery_explorer(records[:0])


def test_every_run_and_every_estimate_is_there(made, records):
    "Runs with what they were made with, and the estimates of the chapters, study by study."
    data = made['results'].data['spec']['datasets']
    for run, r in zip(data['runs'], records, strict=True):
        assert (run['id'], run['seed'], run['lr'], run['decay'],
                run['tokens']) == (r['name'], r['seed'], r['config']['train']['lr'],
                                   r['config']['train']['weight_decay'], r['tokens'])
        assert run['url'].endswith(f"results/{r['scale']}/{r['name']}.json")
        for name, value in run['values'].items():
            assert value == pytest.approx(read_metric(r, name)['value'], rel=1e-3, abs=1e-12)
    metrics = {name for s in data['settings'] for name in s['found']}
    for study in {s['study'] for s in data['settings']}:
        mine = [s for s in data['settings'] if s['study'] == study]
        for s, (label, expected) in zip(mine, summarise(study, records, metrics).items(), strict=True):
            assert s['label'].startswith(label) and s['found'].keys() == expected.keys()
            for name, e in expected.items():
                assert s['found'][name] == pytest.approx([e['value'], e['low'], e['high'], e['n']], rel=1e-3,
                                                         abs=1e-12)
    numbers_of = lambda study: [(m, label, row[m]) for label, row in PUBLISHED.get(study, {}).items()
                                for m in row if m in metrics]
    for study in STUDIES:
        if any(s['study'] == study for s in data['settings']):
            assert sorted(numbers_of(study)) == sorted((n['metric'], n['label'], n['value'])
                                                       for n in data['paper'] if n['study'] == study)


def test_every_operation_is_that_of_the_record(made, records):
    "One model for each depth, the lowest seed's, with every number that was measured."
    found = made['surgery'].data['spec']['datasets']['blocks']
    for L in (2, 4, 8, 16):
        r = next(r for r in records
                 if r['name'] == found[[row['model'] for row in found].index(f'L={L}')]['name'])
        mine, arrays = [row for row in found if row['model'] == f'L={L}'], r['scores']['arrays']
        assert len(mine) == L and r['seed'] == 0
        for field, name in dict(skip='skip_loss_increase', linear='linear_loss_increase',
                                ratio='usefulness_ratio').items():
            assert [row[field] for row in mine] == pytest.approx(arrays[name], rel=1e-4)
        for field, name in dict(swap='permutation', causal='causal').items():
            for row, values in zip(mine, arrays[name], strict=True):
                assert [v is None for v in row[field]] == [v is None for v in values]
                assert [v for v in row[field]
                        if v is not None] == pytest.approx([v for v in values if v is not None], rel=1e-4)


# What the reader sees

@pytest.mark.parametrize('theme', ['light', 'dark'])
@pytest.mark.parametrize('width', [360, 1100])
@pytest.mark.parametrize('name', MADE)
def test_it_fits_and_can_be_reached(browser, saved, name, width, theme):
    with shown(browser, saved, name, width, theme) as e:
        assert e.page.evaluate('document.documentElement.scrollWidth <= innerWidth')
        assert e.root.locator('svg.marks').bounding_box()['width'] <= width
        assert e.says() and e.root.locator('.says').get_attribute('aria-live') == 'polite'
        controls = e.root.locator('.controls :is(input, select)')
        assert controls.count() >= 3 and all(c.evaluate('c => c.labels.length')
                                             for c in controls.all()), 'a control without a label'
        small = e.root.locator('.controls :is(label, select), details[data-table] summary').evaluate_all(
            'all => all.map(x => x.getBoundingClientRect()).filter(b => Math.min(b.width, b.height) < '
            '24).length')
        assert small == 0, 'a control too small for a finger'
        assert e.root.locator('[role=graphics-document]').get_attribute('aria-label')
        ink = e.root.locator('svg.marks text').first.evaluate('t => getComputedStyle(t).fill')
        light = lambda colour: sum(map(int, re.findall(r'\d+', colour)[:3])) > 380
        assert light(ink) == (theme == 'dark')
        for fold in e.root.locator('details[data-table]').all(): fold.locator('summary').click()
        e.page.wait_for_function("document.querySelectorAll('.sce table').length == "
                                 "document.querySelectorAll('.sce details[data-table]').length")
        assert e.page.evaluate('document.documentElement.scrollWidth <= innerWidth')


def test_the_formulas_on_the_screen_are_those_of_the_theory(browser, saved, points):
    """For every norm, at several depths, densities and scales: all numbers of both curves, and the
    simulated dots."""
    with shown(browser, saved, 'variance') as e:
        def check(L, p, step, norm):
            theory, dense = ex.theory_stack(L, p, step, norm), ex.theory_stack(L, 1.0, step, norm)
            table = e.table('Numbers of the curves')
            assert [int(row[0]) for row in table] == list(range(L + 1))
            for l, (_, v, v1, j, j1) in enumerate(table):
                assert close(v, theory['variance'][l]) and close(v1, dense['variance'][l]), (l, norm)
                if l:
                    assert close(j, theory['jacobian'][l - 1]) and close(j1,
                                                                         dense['jacobian'][l - 1]), (l, norm)
            told = [L, theory['variance'][-1], p, dense['variance'][-1], theory['jacobian'][-1],
                    dense['jacobian'][-1]]
            assert numbers(e.says())[:6] == pytest.approx(told, rel=6e-3)
            stored = [s for s in points['points'] if (s['p'], s['step'], s['norm']) == (p, step, norm)]
            dots = e.table('Simulated variance')
            assert len(dots) == (min(L, ex._SIMULATED_DEPTH) + 1 if stored else 0)
            for (_, mean, half), s in zip(dots, stored[0]['variance'] if stored else []):
                assert close(mean, s[0]) and close(half, s[1])
        check(32, 0.5, 10, 'pre_ln')
        e.press('p', 'ArrowLeft')
        check(32, 0.45, 10, 'pre_ln')
        e.press('L', 'End')
        for norm in CLOSED_FORMS:
            e.control('norm').select_option(ex._NORM_NAMES[norm])
            for step in (0, 7, 14):
                e.control('sigma').select_option(index=step)
                check(64, 0.45, step, norm)
        e.press('p', 'Home')
        e.control('sigma').select_option(index=0)
        e.control('norm').select_option('LayerNorm Scaling')
        check(64, 0.05, 0, 'layernorm_scaling')  # the smallest variance that the gate's table holds
        e.press('p', 'End')
        e.press('L', 'Home')
        check(2, 1.0, 0, 'layernorm_scaling')


def test_a_changed_formula_is_noticed(browser, points, tmp_path):
    explorer = ex.variance_explorer(points)
    (tmp_path / 'variance.html').write_text(explorer.page().replace('256 * datum.w *', '256.5 * datum.w *'),
                                            encoding='utf-8')
    with shown(browser, tmp_path, 'variance') as e:
        assert not close(e.table('Numbers of the curves')[-1][1],
                         ex.theory_stack(32, 0.5, 10, 'pre_ln')['variance'][-1])


def test_results_follow_their_controls(browser, saved, made, records):
    "Study, metric, curve and setting: tables, sentence and links are those of the records."
    data = made['results'].data['spec']['datasets']
    with shown(browser, saved, 'results') as e:
        views = [('depth', 'causal', 'variance_mean'), ('decay', 'final_variance', 'train_variance'),
                 ('moe', 'val_loss', 'skip_loss_increase'), ('gqa', 'usefulness', 'train_loss')]
        for study, metric, curve in views:
            e.control('study').select_option(f'{study}: {STUDIES[study].question}')
            e.control('metric').select_option(ex.metric_text(metric)[0])
            e.control('curve').select_option(ex._CURVES[curve][0])
            e.press('pick_row', 'End')                      # the slider ends where the study does
            mine = [s for s in data['settings'] if s['study'] == study]
            assert (e.control('pick_row').input_value() == str(len(mine))
                    and e.says().startswith(mine[-1]['label']))
            e.press('pick_row', 'Home')
            estimates, mine = (summarise(study, records, [metric]),
                               [s for s in data['settings'] if s['study'] == study])
            table = e.table('Numbers of the metric')
            assert [row[0] for row in table] == [s['label'] for s in mine]
            for row, found in zip(table, estimates.values(), strict=True):
                assert all(close(text, found[metric][end])
                           for text, end in zip(row[1:], ('value', 'low', 'high')))
            for k, s in enumerate(mine[:2]):
                if k: e.press('pick_row', 'ArrowRight')
                assert (e.says().startswith(s['label'])
                        and numbers(e.says().removeprefix(s['label']).split(')')[-1].partition(
                            ': ')[2])[0] == pytest.approx(s['found'][metric][0], rel=6e-3))
                line = next((c for c in data['curves'] if c['key'] == f'{curve} {s["group"]}'), None)
                assert [float(row[0]) for row in e.table('Numbers of the curve')] == (line['x'] if line
                                                                                      else [])
            runs = e.table('Runs, and the way to their records')
            assert sorted(row[3] for row in runs) == sorted(name for s in mine for name in s['runs'])
            paper = [n for n in data['paper'] if (n['study'], n['metric']) == (study, metric)]
            assert [(row[0], float(row[1]))
                    for row in e.table('Numbers of the paper')] == [(n['label'], n['value']) for n in paper]
        links = e.root.locator('details[data-table] td a').evaluate_all('all => all.map(a => a.href)')
        assert links and set(links) <= {run['url'] for run in data['runs']}
        last = e.root.locator('.settings_0_marks path, [class*="settings"] path').last
        before = e.says()
        last.click()
        assert (e.says() != before and e.says().startswith(mine[-1]['label'])
                and e.control('pick_row').input_value() == str(len(mine)))


def test_floors_are_drawn_where_a_loss_is_shown(records, browser, tmp_path):
    explorer = ex.results_explorer(records, metric='val_loss', curve='train_loss',
                                   floors={'table of pairs': 4.29, 'frequencies': 6.2})
    (tmp_path / 'results.html').write_text(explorer.page(), encoding='utf-8')
    with shown(browser, tmp_path, 'results') as e:
        drawn = lambda: e.root.locator(
            '[aria-label*="name: table of pairs"], [aria-label*="name: frequencies"]').count()
        assert drawn() == 4
        e.control('metric').select_option('Usefulness')
        assert drawn() == 2
        e.control('curve').select_option(ex._CURVES['variance_mean'][0])
        assert drawn() == 0


def at_tiny(records: list[dict]) -> list[dict]:
    "The depth study's records as if they had been made at another scale."
    base = SCALES['tiny']
    configs = {label: vary(base, changes).to_dict()
               for label, changes in STUDIES['depth'].changes(base).items()}
    runs = [r for r in label_variants('depth', records) if r['variant'] in configs]
    return [r | dict(scale='tiny', name=f"tiny_{r['name']}",
                     config=configs[r['variant']] | dict(seed=r['seed'])) for r in runs]


def test_another_scale_can_be_chosen(records, browser, tmp_path):
    few = [r for r in records if r['seed'] == 0]
    (tmp_path / 'results.html').write_text(ex.results_explorer(few + at_tiny(few), study='depth').page(),
                                           encoding='utf-8')
    with shown(browser, tmp_path, 'results') as e:
        e.control('scale').select_option('tiny')
        assert ('one seed' in e.says()
                and all('/tiny/' in link for link in e.root.locator('[class*="runs"] a').evaluate_all(
                    'all => all.map(a => a.getAttribute("href") ?? a.getAttribute("xlink:href"))')))


def test_surgery_by_keyboard_and_pointer(browser, saved, made):
    found = made['surgery'].data['spec']['datasets']['blocks']
    with shown(browser, saved, 'surgery') as e:
        def check(L, mode, i, j):
            row = next(row for row in found if (row['model'], row['b']) == (f'L={L}', i))
            assert (e.control('pick_i').input_value(),
                    e.root.locator('[name=pick_mode]:checked').input_value()) == (str(i), mode)
            told = numbers(e.says())
            if mode == 'swap':
                expected = [i, j, row['loss'], row['swap'][j - 1] * row['loss'], 100 * row['swap'][j - 1]]
            else: expected = [i, abs(row[mode]), row['loss'], row['loss'] + row[mode]]
            if mode == 'skip' and i < j: expected += [j, 100 * row['causal'][j - 1]]
            if mode == 'linear': expected += [row['ratio'], row['threshold']]
            assert told == pytest.approx(expected, rel=6e-3), e.says()
            if mode != 'swap': assert ('rises' in e.says()) == (row[mode] >= 0)
        check(16, 'skip', 1, 2)
        e.press('pick_i', 'ArrowRight')
        check(16, 'skip', 2, 2)
        e.press('pick_j', 'End')
        check(16, 'skip', 2, 16)
        e.root.locator('[name=pick_mode]').first.press('ArrowDown')
        check(16, 'swap', 2, 16)
        e.root.locator('[name=pick_mode]:checked').press('ArrowDown')
        check(16, 'linear', 2, 16)
        e.root.locator('[aria-roledescription=bar]').nth(4).click()
        check(16, 'linear', 5, 16)
        for L in (2, 4, 8):                                    # no slider goes beyond the model's blocks
            e.control('model').select_option(f'L={L}, seed 0')
            for slider in ('pick_i', 'pick_j'):
                e.press(slider, 'End')
                assert e.control(slider).input_value() == str(L)
            check(L, 'linear', L, L)
        e.control('model').select_option('L=4, seed 0')
        cell = (lambda view, i,
                j: e.root.locator(f'.{view}_marks path, .{view}_group path[aria-roledescription]').and_(
                    e.page.locator(f'[aria-label*="block i: {i}; block j: {j};"], [aria-label*="block j: '
                                   f'{j}; block i: {i};"]')))
        cell('swap', 1, 3).click()
        check(4, 'swap', 1, 3)
        cell('causal', 2, 4).click()
        check(4, 'skip', 2, 4)
        assert (len(e.table('Numbers of the swaps')) == 12
                and len(e.table('Numbers of the causal scores')) == 6)


def test_two_explorers_can_share_a_page(browser, points, tmp_path):
    one, other = ex.variance_explorer(points), ex.variance_explorer(points, name='sce-other', L=8)
    (tmp_path / 'both.html').write_text(one.page().replace('</main>', other.html + '</main>'),
                                        encoding='utf-8')
    with visit(browser, (tmp_path / 'both.html').as_uri()) as page:
        first, second = Shown(page, 'variance'), Shown(page, 'other')
        before = second.says()
        first.press('L', 'Home')
        assert 'L = 2,' in first.says() and second.says() == before


def test_the_library_comes_along_only_where_somebody_looks(points, monkeypatch):
    explorer = ex.variance_explorer(points)
    assert explorer._repr_html_() == explorer.html
    monkeypatch.setattr(ex, '_watched', lambda: True)
    assert (explorer._repr_html_().count('window.vegaEmbed ||') == 1
            and json.dumps(explorer.data['made']) in json.dumps(explorer.data))
