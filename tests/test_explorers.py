"Explorers: one page each, the same numbers in Python, in JavaScript and on the screen, and usable without a mouse."
import json
import math
import re
import subprocess
from html.parser import HTMLParser
from itertools import product
from xml.etree import ElementTree

import pytest

from browser import open_page
from docs_check import node_path
from sparsecod import explorers as ex
from sparsecod.core import NORMS
from sparsecod.explore import label_variants
from sparsecod.studies import SCALES, STUDIES, load_results, read_metric, scale_config, summarise, vary


@pytest.fixture(scope='module')
def records(root):
    return load_results(root / 'results', 'laptop')


@pytest.fixture(scope='module')
def points(root):
    return ex.stored_points(root)


@pytest.fixture(scope='module')
def pages(records, points):
    return dict(variance=ex.variance_explorer(points), results=ex.results_explorer(records), surgery=ex.surgery_explorer(ex.surgery_tables(records)))


def data_of(page: str) -> dict:
    "The data inside a page, as a parser finds them."
    return json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.S)[1])


class Page(HTMLParser):
    "Tags and attributes of a page."
    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.scripts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ('input', 'meta', 'link', 'br', 'path', 'circle', 'rect'): self.open.append(tag)

    def handle_startendtag(self, tag, attributes): self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f'</{tag}> closes nothing'


@pytest.mark.parametrize('which', ['variance', 'results', 'surgery'])
def test_a_page_is_whole_small_and_asks_nobody(pages, which):
    text = pages[which]
    page = Page(text)
    ids = [a['id'] for _, a in page.tags if 'id' in a]
    assert len(text.encode()) < 300_000
    assert not page.open and len(ids) == len(set(ids)) and all(i.startswith('sce-' + which) for i in ids)
    assert not [a for _, a in page.tags if {'src', 'href', 'onclick'} & a.keys()]
    assert not re.search(r'https?:|@import|url\(|fetch\(|XMLHttpRequest', text)
    labels = {a['for'] for tag, a in page.tags if tag == 'label'}
    assert all(a['id'] in labels for tag, a in page.tags if tag in ('input', 'select')), 'a control without a label'
    assert all(a.get('aria-label') for tag, a in page.tags if tag == 'svg'), 'a picture without a description'
    assert all('aria-valuetext' in a for tag, a in page.tags if a.get('type') == 'range')
    assert any(a.get('aria-live') == 'polite' for _, a in page.tags)
    for c in ex.LIGHT.values(): assert c in text
    count = lambda kind: sum(tag == kind for tag, _ in page.tags)
    assert count('details') == count('table') + count('ul') >= 1                        # a table behind the pictures; of a mean, its runs


def test_two_explorers_can_share_a_page(points):
    both = ex.variance_explorer(points) + ex.variance_explorer(points, name='sce-other')
    ids = re.findall(r'\sid="([^"]+)"', both)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize('bad', ['a b', 'a"b', "a'", '', '<b>', 'é'])
def test_a_name_that_would_break_the_page_is_refused(bad):
    with pytest.raises(ValueError, match='letters, digits and hyphens'): ex.variance_explorer(name=bad)


def test_text_from_records_cannot_break_out(records):
    hostile = '</script><script>alert(1)</script><!--"&\'`${1}'
    evil = [r | dict(provenance=r['provenance'] | dict(hardware=hostile, commit=hostile)) for r in records[:12]]
    text = ex.results_explorer(evil)
    assert '<script>alert' not in text and not Page(text).open and text.count('</script>') == 2
    assert ex.facts(data_of(text), 0)['hardware'] == hostile


def test_scripts_hold_no_text_that_a_parser_of_tables_would_find(pages):
    for text in pages.values():
        scripts = ''.join(re.findall(r'<script>(.*?)</script>', text, re.S))
        assert scripts and not re.search(r'</?table\b|</script|\{\{<', scripts)


@pytest.mark.parametrize('script', ["x = '</script>'", "x = '<table>'", "x = `<table class='a'>`", "x = '</table>'"])
def test_a_script_that_would_be_torn_apart_is_refused(script):
    with pytest.raises(ValueError, match='sce-a'): ex.frame('sce-a', 'A', '<p>a</p>', {}, script)
    assert script.replace('<', r'\x3c') in ex.frame('sce-a', 'A', '<p>a</p>', {}, script.replace('<', r'\x3c'))


# Numbers

@pytest.mark.parametrize('x', [0, 1, -1, 0.1, 123.456, 1234.5, 9999.4, 12345.678, 1e-4, 9.9e-5, 2.5e-7, -3.14159e8, 0.00123456, 136.5, 9995.0])
def test_short_is_three_digits_of_the_number(x):
    assert math.isclose(float(ex.short(x)), x, rel_tol=5.1e-3, abs_tol=0) and len(ex.short(x)) < 10


def test_short_without_a_number():
    assert [ex.short(x) for x in (None, math.nan, math.inf)] == ['-'] * 3


@pytest.mark.parametrize('a, b, log', [(0, 1, False), (-3, 40, False), (0.00012, 0.00013, False), (0.5, 1e6, True), (1e-9, 1e3, True), (1.5, 1.9, True), (30, 31, False)])
def test_marks_are_few_and_lie_on_the_axis(a, b, log):
    found = ex.marks(a, b, log)
    assert len(found) <= 14 and found == sorted(found) and all(a <= m <= b for m in found)
    if not log: assert len(found) >= 2


def in_node(script: str, data):
    "Run a script on data."
    done = subprocess.run([node_path(), '-'], input=f'const INPUT = {json.dumps(data)}\n{script}', capture_output=True, text=True, timeout=120, encoding='utf-8')
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def functions_of(page: str, until: str) -> str:
    "The script of a page up to where it touches the page, with its data in the place of the document."
    script = re.search(r'<script>\(\(\) => \{(.*)\}\)\(\)</script>', page, re.S)[1]
    assert script.count(until) == 1
    return f'const document = {{getElementById: () => ({{textContent: {json.dumps(json.dumps(data_of(page)))}}})}}\n' + script.split(until)[0]


def test_javascript_numbers_and_axes_are_pythons(pages):
    script = functions_of(pages['variance'], 'const read')
    numbers = [0, 1, -1, 0.1, 123.456, 1234.5, 9999.4, 12345.678, 1e-4, 9.9e-5, 2.5e-7, -3.14159e8, 0.00123456, None, 2 / 3, 136.5, -136.5, 0.0625, 1.125, 9995.0, 99950000.0]
    assert in_node(script + 'console.log(JSON.stringify(INPUT.map(short)))', numbers) == [ex.short(x) for x in numbers]
    axes = [(0, 1, False), (-3, 40, False), (0.00012, 0.00013, False), (0.5, 1e6, True), (1e-9, 1e3, True), (1.5, 1.9, True)]
    for (a, b, log), found in zip(axes, in_node(script + 'console.log(JSON.stringify(INPUT.map(x => marks(...x))))', axes)):
        assert found == pytest.approx(ex.marks(a, b, log), rel=1e-12)


def test_javascript_formulas_are_pythons(pages):
    grid = list(product((1, 7, 64), (0.05, 0.1, 0.35, 0.5, 1.0), (0, 3, 10, 14), NORMS))
    script = functions_of(pages['variance'], 'const read') + 'console.log(JSON.stringify(INPUT.map(stack)))'
    for setting, js in zip(grid, in_node(script, [ex.javascript_setting(*s) for s in grid]), strict=True):
        python = ex.theory_stack(*setting)
        for name in ('variance', 'jacobian'): assert js[name] == pytest.approx(python[name], rel=1e-6), setting


def test_a_changed_formula_is_noticed(pages):
    script = functions_of(pages['variance'].replace('c.F * w * s2 * square', 'c.F * w * s2 * square * 1.00001'), 'const read')
    found = in_node(script + 'console.log(JSON.stringify(stack(INPUT)))', ex.javascript_setting(8, 0.5, 10, 'pre_ln'))
    assert found['variance'] != pytest.approx(ex.theory_stack(8, 0.5, 10, 'pre_ln')['variance'], rel=1e-6)


def choices(data: dict, study: str, row: int, **more) -> dict:
    "What the results explorer shows: a row of a study, and its runs."
    found = data['scales']['laptop'][study]
    version = next((r.index(row) for r in found['dial']['rows'] if row in r), 0) if found['dial'] else 0
    return dict(scale='laptop', study=study, metric='causal', curve='variance_mean', row=row, version=version, point=f'mean-{row}') | more


def test_every_view_of_the_results_is_the_same_in_both_languages(pages):
    data = data_of(pages['results'])
    views = []
    for study, s in data['scales']['laptop'].items():
        for k, (metric, curve) in enumerate(zip([*data['metrics']], [*data['curves']] * 9)):
            row = k % len(s['rows'])
            runs, paper = data['groups'][s['rows'][row][1]]['runs'], data['paper'].get(study, {}).get(metric)
            points = [f'mean-{row}', f'run-{runs[-1]}', *(['paper-0'] if paper else [])]
            views.append(choices(data, study, row, metric=metric, curve=curve, point=points[k % len(points)]))
    assert {c['point'].split('-')[0] for c in views} == {'mean', 'run', 'paper'}
    script = functions_of(pages['results'], 'const state') + '''
    console.log(JSON.stringify(INPUT.map(c => [forest(metricForest(c)), paperForest(c) && forest(paperForest(c)), chart(curveChart(c)), says(c), estimateRows(c),
      curveRows(curveChart(c)), pointSays(c), pointTitle(c), pointHtml(c)])))'''
    for c, js in zip(views, in_node(script, views), strict=True):
        paper, lines = ex.paper_forest(data, c), ex.curve_chart(data, c)
        ours = [ex.forest(ex.metric_forest(data, c)), paper and ex.forest(paper), ex.chart(lines), ex.results_says(data, c), ex.estimate_rows(data, c),
                ex.curve_rows(lines), ex.point_says(data, c), ex.point_title(data, c), ex.point_html(data, c)]
        for a, b in zip(js, ours, strict=True): assert (a is None and b is None) or alike(a, b), c


def test_every_operation_is_the_same_in_both_languages(pages):
    tables = data_of(pages['surgery'])['tables']
    views = [(d, mode, i, j) for d, t in tables.items() for mode in ex.MODES for i, j in product((1, 2, len(t['skip'])), (1, 2))]
    script = functions_of(pages['surgery'], 'const state') + '''
    console.log(JSON.stringify(INPUT.map(([d, ...v]) => [says(DATA.tables[d], ...v), buttons(DATA.tables[d], ...v), ...maps(DATA.tables[d], ...v).map(heatMap)])))'''
    for (d, *v), js in zip(views, in_node(script, views), strict=True):
        ours = [ex.surgery_says(tables[d], *v), ex.block_buttons(tables[d], *v), *map(ex.heat_map, ex.surgery_maps(tables[d], *v))]
        for a, b in zip(js, ours): assert alike(a, b), (d, v)


NUMBER = re.compile(r'-?\d+(?:\.\d+)?(?:e[+-]?\d+)?')

def alike(a: str, b: str, by: float = 0.11) -> bool:
    "Equal text, but for the last digit of a coordinate."
    if NUMBER.sub('#', a) != NUMBER.sub('#', b): return False
    return all(x == y or abs(float(x) - float(y)) <= by for x, y in zip(NUMBER.findall(a), NUMBER.findall(b)))


def test_alike_sees_a_moved_point():
    assert alike('M1.2 3', 'M1.3 3') and not alike('M1.2 3', 'M2.2 3') and not alike('a 1', 'b 1')


# What the pages hold

def test_the_first_view_is_pythons(points, records):
    c = dict(L=24, p=0.25, step=5, norm='peri_ln')
    text = ex.variance_explorer(points, **c)
    theory = ex.theory_stack(**c)
    assert f"variance {ex.short(theory['variance'][-1])} at density 0.25" in text and f"by {ex.short(theory['jacobian'][-1])}, and by" in text
    assert all(ex.chart(s) in text for s in ex.variance_charts(c, points['points']))
    assert len(re.findall('class="dot"', text.split('<script')[0])) == 25 + 24
    first = ex.surgery_tables(records)['L=4']
    assert ex.surgery_says(first, 'swap', 2, 4) in ex.surgery_explorer(ex.surgery_tables(records), 'L=4', 'swap', 2, 4)


def test_dots_appear_at_simulated_settings_only(points):
    dots = lambda **c: [len(s['dots']) for s in ex.variance_charts(dict(L=10, p=0.5, step=10, norm='pre_ln') | c, points['points'])]
    assert dots() == [11, 10] and dots(L=64) == [33, 32] and dots(p=0.55) == dots(step=9) == [0, 0]


def test_the_stored_dots_can_be_made_again(points):
    stored = next(s for s in points['points'] if (s['p'], s['step'], s['norm']) == (0.25, 5, 'layernorm_scaling'))
    again = ex.simulate_points(0.25, 5, 'layernorm_scaling', n_jacobian=2)
    assert [m for m, _ in again['variance']] == pytest.approx([m for m, _ in stored['variance']], rel=1e-3)
    assert {(s['p'], s['step'], s['norm']) for s in points['points']} == set(product(ex.DENSITIES, ex.SCALED, NORMS))


@pytest.mark.parametrize('bad', [dict(L=1), dict(L=65), dict(p=0.0), dict(p=0.33), dict(p=1.05), dict(step=15), dict(norm='post_ln')])
def test_impossible_settings_are_named(bad):
    (field, _), = bad.items()
    with pytest.raises(ValueError, match=f'^{field}=.* must be one of'): ex.variance_explorer(**bad)


def test_the_page_has_every_run_and_its_values(pages, records):
    data = data_of(pages['results'])
    assert len(data['runs']) == len(records)
    for n, (run, r) in enumerate(zip(data['runs'], records)):
        about = ex.facts(data, n)
        assert about['run'] == r['name'] and about['seed'] == str(r['seed']) and about['commit'] == str(r['provenance']['commit'])
        assert about['train.lr'] == str(r['config']['train']['lr']) and about['train.weight_decay'] == str(r['config']['train']['weight_decay'])
        assert about['tokens'] == f"{r['tokens']:,}" and about['hardware'] == r['provenance']['hardware'] and about['steps'] == str(r['step'])
        assert about == {k: ex.plain(v) for k, v in ex.about_run(r).items()} | {k: '-' for k in about if k not in ex.about_run(r)}
        for value, name in zip(run['values'], data['metrics'], strict=True):
            m = read_metric(r, name)
            assert value == (m and pytest.approx(m['value'], rel=1e-3, abs=1e-12)) and ex.short(value) == ex.short(m and m['value']), (r['name'], name)


def test_every_estimate_is_that_of_the_chapters(pages, records):
    "To the last of the three digits that page and chapters show; the ends of intervals too."
    data = data_of(pages['results'])
    assert set(data['scales']['laptop']) == {name for name in STUDIES if label_variants(name, records)}
    numbers = 0
    for study in data['scales']['laptop']:
        rows, summary = ex.rows_of(data, dict(scale='laptop', study=study)), summarise(study, records, list(data['metrics']))
        assert [row['label'] for row in rows] == list(summary)
        for k, name in enumerate(data['metrics']):
            c = choices(data, study, 0, metric=name)
            table = re.findall('<tr><th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>', ex.estimate_rows(data, c))
            for row, (label, *shown), drawn in zip(rows, table, ex.metric_forest(data, c)['rows']):
                e = summary[row['label']].get(name)
                assert drawn['mean'] == row['found'][k] == (e and pytest.approx([e['value'], e['low'], e['high']], rel=1e-3, abs=1e-12)), (study, label, name)
                assert shown == ([ex.short(e[end]) for end in ('value', 'low', 'high')] if e else ['-'] * 3), (study, label, name)
                assert not e or e['n'] == len(drawn['seeds'])
                if e and ex.logarithmic(name): assert 0 < row['found'][k][1] <= row['found'][k][0] <= row['found'][k][2]
                numbers += bool(e)
    assert numbers > 1000


def test_curves_are_those_of_the_seeds(pages, records):
    data, by_name = data_of(pages['results']), {r['name']: r for r in records}
    for group in data['groups']:
        runs = [by_name[ex.facts(data, n)['run']] for n in group['runs']]
        for lines, values in zip(group['curves'], ([ex.run_curve(r, name) for r in runs] for name in data['curves']), strict=True):
            columns = list(zip(*values))
            expected = [[f(column) for column in columns] for f in (lambda v: sum(v) / len(v), min, max)]
            for line, want in zip(lines, expected): assert [ex.short(v) for v in line] == [ex.short(v) for v in want]
        assert data['steps'][group['steps']][-1] == runs[0]['curve']['step'][-1]
        assert group['curves'][list(data['curves']).index('train_loss')][0][-1] == pytest.approx(sum(r['curve']['loss'][-1] for r in runs) / len(runs), rel=5e-3)


def test_numbers_are_short_and_round_as_before():
    for x in (0.1234567, 2.15496, -2.15496, 1e-9, 99995.0, 0.0, 9.9949999, 12344.999):
        y = ex.trim(x, 4)
        assert ex.short(y) == ex.short(x) and y == pytest.approx(x, rel=6e-4)
    assert ex.trim([1, None, math.inf, 'a'], 4) == [1, None, None, 'a']


def test_a_run_costs_little_more_than_a_kilobyte(pages, records):
    "There are more runs to come, and the limit is 300 KB."
    size = {n: len(ex.results_explorer(some).encode()) for n, some in ((len(records), records), (len(records) // 2, records[:len(records) // 2]))}
    (many, large), (few, small) = size.items()
    assert (large - small) / (many - few) < 1500 and large < 50_000 + 1500 * many


def test_shares_stay_between_0_and_1_in_the_picture_and_not_in_the_table(pages):
    data = data_of(pages['results'])
    share, = {d[3] for name, d in data['metrics'].items() if name == 'usefulness'}
    assert share and not data['metrics']['causal'][3] and not data['metrics']['final_variance'][3]
    for study, name in product(data['scales']['laptop'], (name for name, d in data['metrics'].items() if d[3])):
        s = ex.metric_forest(data, choices(data, study, 0, metric=name))
        low, high = ex.forest_axis(s)
        assert 0 <= low < high <= 1, (study, name)
        outside = any(r['mean'] and (r['mean'][1] < 0 or r['mean'][2] > 1) for r in s['rows'])
        assert outside == ('drawn up to 0 and 1' in s['title'])
    data['groups'][data['scales']['laptop']['depth']['rows'][0][1]]['found'][list(data['metrics']).index('usefulness')] = [.9, .6, 1.2]
    c = choices(data, 'depth', 0, metric='usefulness')
    assert 'drawn up to 0 and 1' in ex.metric_forest(data, c)['title'] and '<td>1.2</td>' in ex.estimate_rows(data, c) and '0.6 to 1.2' in ex.results_says(data, c)
    wide = dict(title='', log=False, share=True, ghost=False, point='', rows=[dict(name='L=2', on=False, mean=[.75, -.2, 1.7], seeds=[[.5, 0, 0], [1., 1, 1]])])
    X = ex.place(*ex.forest_axis(wide), 14, 386)
    assert f'M{X(0.0)} 24H{X(1.0)}' in ex.forest(wide) and ex.forest_axis(wide)[1] == 1
    assert ex.forest_axis(wide | dict(share=False))[1] > 1


def test_rings_of_close_values_do_not_hide_each_other(pages):
    data = data_of(pages['results'])
    for study, name in product(data['scales']['laptop'], data['metrics']):
        svg = ElementTree.fromstring(ex.forest(ex.metric_forest(data, choices(data, study, 0, metric=name))))
        rings = [(float(e.attrib['cx']), float(e.attrib['cy'])) for e in svg.iter('circle') if e.attrib['class'] == 'ring']
        assert all(abs(x - a) >= 19.9 or abs(y - b) >= 19.9 for i, (x, y) in enumerate(rings) for a, b in rings[:i]), (study, name)


# Which control a study gets

def test_ordered_numbers_get_a_slider_and_everything_else_a_list(pages):
    studies = data_of(pages['results'])['scales']['laptop']
    assert {name: bool(s['dial']) for name, s in studies.items()} == {name: name in ('depth', 'decay', 'context', 'gqa') for name in studies}
    labels = {name: [label for label, _ in s['rows']] for name, s in studies.items()}
    walk = lambda name, version: [labels[name][r[version]] for r in studies[name]['dial']['rows']]
    assert walk('depth', 0) == ['L=2', 'L=4', 'L=8', 'L=16'] and len(studies['depth']['dial']['versions']) == 1
    assert walk('decay', 0) == ['λ=0', 'λ=0.01', 'λ=0.1', 'λ=1', 'λ=3'] and walk('decay', 1) == ['λ=0', *(f'λ={x}, all' for x in ('0.01', '0.1', '1', '3'))]
    assert walk('context', 1) == ['T=32, sequences fixed', 'T=128', 'T=512, sequences fixed'] and walk('gqa', 1) == ['G=1', 'G=2, matched', 'G=4, matched']
    for name in ('decay', 'context', 'gqa'): assert studies[name]['dial']['versions'] == list(ex.VERSIONS[name][1].values())
    for s in studies.values():
        if s['dial']: assert {i for r in s['dial']['rows'] for i in r} == set(range(len(s['rows'])))       # every row can be reached


@pytest.mark.parametrize('study', STUDIES)
@pytest.mark.parametrize('scale', SCALES)
def test_every_study_at_every_scale_has_a_control_that_reaches_every_row(study, scale):
    labels = list(STUDIES[study].changes(SCALES[scale]))
    d = ex.dial(study, labels)
    assert d is None or {i for r in d['rows'] for i in r} == set(range(len(labels)))
    if study not in ('depth', 'decay', 'context', 'gqa'): assert d is None
    assert study in ex.KNOBS and ex.KNOBS[study] != 'Setting'


def training_study(records: list[dict]) -> list[dict]:
    "All variants of the training study, made of the runs of the depth study."
    base, made = scale_config('laptop'), []
    runs = {(r['config']['model']['n_layers'], r['seed']): r for r in label_variants('depth', records)}
    for label, changes in STUDIES['training'].changes(base).items():
        for seed in (0, 1, 2):
            r = runs[changes['model.n_layers'], seed]
            made.append({k: v for k, v in r.items() if k != 'variant'} | dict(name=f'{label} {seed}', config=vary(base, changes | {'seed': seed}).to_dict()))
    return made


def test_the_study_of_training(records, tmp_path):
    text = ex.results_explorer(training_study(records), study='training', metric='val_loss', curve='train_loss')
    data, path = data_of(text), tmp_path / 'training.html'
    path.write_text(ex.page(text, 'training'), encoding='utf-8')
    labels = ['L=2', 'L=8', 'L=2, η/3', 'L=8, η/3', 'L=2, 4× tokens', 'L=8, 4× tokens']
    with open_page(path, 1000, 'light') as page:
        assert page.locator('#sce-results-row option').all_text_contents() == labels and page.locator('#sce-results-dial').is_hidden()
        page.locator('#sce-results-row').select_option('3')
        assert page.locator('#sce-results-says').inner_text() == ex.results_says(data, data['first'] | dict(row=3)) and 'L=8, η/3' in page.locator('#sce-results-curves-caption').inner_text()


def test_diverged_single_and_missing_runs_are_said_to_be_so(records):
    two = [r for r in label_variants('depth', records) if r['seed'] < 2 and r['variant'] in ('L=2', 'L=4')]
    lost = {k: v for k, v in two[0].items() if k != 'scores'} | dict(status='diverged', final=two[0]['final'] | dict(val_loss=None))
    data = ex.results_data([lost, *two[1:]])
    c = choices(data, 'depth', 0)
    row, = (r for r in ex.rows_of(data, c) if r['label'] == 'L=2')
    assert row['lost'] == 1 and row['weak'] == 0 and data['runs'][0]['values'] == [None] * len(data['metrics']) and len(row['curves'][0]) == 1
    assert '(1 of 2 diverged)' in ex.forest(ex.metric_forest(data, c)) and 'one seed' in ex.results_says(data, c)
    assert 'over 2 seeds' in ex.results_says(data, c | dict(row=1))
    assert ex.point_html(data, c).count('<button') == 2 and 'seed 0: -' in ex.point_html(data, c)     # the lost run can be opened too
    alone = ex.results_data([lost, *two[2:]])
    assert 'was not measured' in ex.results_says(alone, c) and ex.chart(ex.curve_chart(alone, c)).count('class="line') == 1
    assert not Page(ex.results_explorer([lost, *two[2:]])).open


def test_models_that_learnt_little_are_marked(pages, records):
    data = data_of(pages['results'])
    weak = {r['name'] for r in records if r['final']['val_loss']['value'] >= r['final']['unigram_loss']}
    for study in data['scales']['laptop']:
        for row, drawn in zip(ex.rows_of(data, c := choices(data, study, 0)), ex.metric_forest(data, c)['rows']):
            assert drawn['name'].endswith('†') == bool(weak & {ex.facts(data, n)['run'] for n in row['runs']})
    assert ex.WEAK in ex.results_body('sce-x', data, choices(data, 'decay', 0)) and ex.WEAK not in ex.results_body('sce-x', data, choices(data, 'depth', 0))


def at_tiny(records: list[dict]) -> list[dict]:
    "The depth study's records as if they had been made at another scale."
    base = SCALES['tiny']
    configs = {label: vary(base, changes).to_dict() for label, changes in STUDIES['depth'].changes(base).items()}
    runs = [r for r in label_variants('depth', records) if r['variant'] in configs]
    return [r | dict(scale='tiny', name=f"tiny_{r['name']}", config=configs[r['variant']] | dict(seed=r['seed'])) for r in runs]


def test_scales_are_kept_apart(records):
    few = [r for r in records if r['seed'] == 0]
    data = ex.results_data(few + at_tiny(few) + [few[0] | dict(scale='own', name='own')])
    assert list(data['scales']) == ['laptop', 'tiny'] and list(data['scales']['tiny']) == ['depth'] and len(data['runs']) == len(few) + len(at_tiny(few)) + 1
    runs = [n for row in ex.rows_of(data, dict(scale='tiny', study='depth')) for n in row['runs']]
    assert runs and all(ex.facts(data, n)['run'].startswith('tiny_') for n in runs)


def test_a_page_with_fewer_curves_is_smaller(records, pages):
    text = ex.results_explorer(records, curve='train_loss', curves=('train_loss',))
    assert len(text) < len(pages['results']) and set(data_of(text)['curves']) == {'train_loss'}


def test_equal_seeds_have_no_interval():
    data = dict(scales={'laptop': {'depth': dict(rows=[['L=2', 0]])}}, metrics=dict(usefulness=['Usefulness', 'share of blocks', False, True]),
                runs=[dict(seed=s, values=[.5]) for s in (0, 1)], groups=[dict(runs=[0, 1], found=[[.5, .5, .5]])])
    c = dict(scale='laptop', study='depth', metric='usefulness', row=0)
    assert ex.results_says(data, c) == 'L=2: Usefulness 0.5, the same in all 2 seeds.'
    data['groups'][0]['runs'] = [0]
    assert ex.results_says(data, c) == 'L=2: Usefulness 0.5, one seed.'


@pytest.mark.parametrize('which', ['variance', 'results', 'surgery'])
def test_a_planted_value_is_found(pages, which):
    text = pages[which]
    assert ex.first_view_faults(text) == []
    says = re.search(r'class="says".*?(\d\.\d+)', text, re.S)
    for start, end in (says.span(1), re.search(r'<td>(\d[\d.]+)</td>', text).span(1)):
        planted = text[:start] + '7.77' + text[end:]
        assert ex.first_view_faults(planted) == [f'sce-{which}: the first view is not what the data inside give']
    assert 'script' in ex.first_view_faults(text.replace('Math.max(...v)', 'Math.min(...v)'))[-1]
    assert ex.first_view_faults('') == ['there is no explorer in it']


@pytest.mark.parametrize('which', ['variance', 'results', 'surgery'])
def test_data_of_another_form_are_a_fault_and_no_crash(pages, which):
    data = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', pages[which], re.S)
    keys = dict(variance='points', results='metrics', surgery='tables')
    old = {k: v for k, v in json.loads(data[1]).items() if k != 'groups'} | {keys[which]: {'causal': ['one']}}
    text = pages[which][:data.start(1)] + ex.embed(old) + pages[which][data.end(1):]
    assert ex.first_view_faults(text) == [f'sce-{which}: the data inside have not the present form']


def test_nothing_to_show_is_an_error():
    with pytest.raises(ValueError, match='records is empty'): ex.results_explorer([])
    with pytest.raises(ValueError, match='no finished run'): ex.surgery_tables([])
    with pytest.raises(ValueError, match='tables is empty'): ex.surgery_explorer({})


def test_the_papers_numbers_keep_their_own_picture(pages):
    data = data_of(pages['results'])
    assert data['paper']['depth']['causal'] == [['L=12', .355], ['L=16', .336], ['L=24', .289], ['L=32', .259]]
    c = choices(data, 'decay', 0, metric='final_variance')
    paper = ex.paper_forest(data, c)
    assert paper['ghost'] and not paper['log'] and 'class="dot"' not in ex.forest(paper)    # a published 0 has no logarithm
    assert ex.paper_forest(data, c | dict(study='remedies')) is None
    points = 100 * .4
    share = ex.paper_forest(dict(paper={'ladder': {'accuracy': [['L=16', points]]}}, metrics=data['metrics']), c | dict(study='ladder', metric='accuracy'))
    assert not share['share'] and ex.forest_axis(share)[1] > points                        # given in per cent


def test_surgery_shows_what_the_scores_say(records):
    tables = ex.surgery_tables(records)
    by_name = {r['name']: r for r in records}
    for label, t in tables.items():
        scores = by_name[t['name']]['scores']
        assert t['seed'] == min(r['seed'] for r in records if r['config']['model']['n_layers'] == len(t['skip']))
        L, loss = len(t['skip']), scores['scalars']['loss']['value']
        for i, j in product(range(1, L + 1), repeat=2):
            assert ex.surgery_cost(t, 'skip', i, j) == pytest.approx(scores['arrays']['skip_loss_increase'][i - 1], rel=1e-4)
            assert ex.surgery_cost(t, 'linear', i, j) == pytest.approx(scores['arrays']['linear_loss_increase'][i - 1], rel=1e-4)
            share = scores['arrays']['permutation'][i - 1][j - 1]
            assert ex.surgery_cost(t, 'swap', i, j) == (None if i == j else pytest.approx(share * loss, rel=1e-4))
    with pytest.raises(ValueError, match='i=9 must be a block'): ex.surgery_explorer(tables, 'L=8', i=9)


def test_a_falling_loss_is_said_to_fall():
    t = dict(loss=2.0, skip=[-0.5, 0.25], linear=[0.1, 0.3], ratio=[1.05, 1.15], threshold=1.1, swap=[[None, .1], [.1, None]], causal=[[None, .5], [None, None]])
    assert 'falls by 0.5 nats a token, from 2.000 to 1.500. The update of block 2 changes by 50 %' in ex.surgery_says(t, 'skip', 1, 2)
    assert ex.surgery_says(t, 'skip', 2, 1).endswith('rises by 0.25 nats a token, from 2.000 to 2.250.')
    assert 'not useful' in ex.surgery_says(t, 'linear', 1, 2) and 'it useful' in ex.surgery_says(t, 'linear', 2, 1)
    assert 'changes by 0.2 nats a token, 10 % of it' in ex.surgery_says(t, 'swap', 1, 2) and 'different blocks' in ex.surgery_says(t, 'swap', 2, 2)


# In a browser

PAGES = 'variance', 'results', 'surgery'

@pytest.fixture(scope='module')
def saved(pages, tmp_path_factory):
    "The pages as files."
    folder = tmp_path_factory.mktemp('explorers')
    for name, text in pages.items(): (folder / f'{name}.html').write_text(ex.page(text, name), encoding='utf-8')
    return {name: folder / f'{name}.html' for name in pages}


def in_page(svg: str, found: str) -> bool:
    "Is the picture that the browser holds the one that Python draws?"
    flat = lambda text: [(e.tag, sorted(e.attrib.items()), e.text) for e in ElementTree.fromstring(text).iter()]
    return alike(str(flat(svg)), str(flat(found)))


def svg_in(page, id: str) -> str: return page.locator(f'#{id} svg').evaluate("e => e.outerHTML")


@pytest.mark.parametrize('width', [360, 1100])
@pytest.mark.parametrize('theme', ['light', 'dark'])
@pytest.mark.parametrize('which', PAGES)
def test_a_page_opens_from_disk_without_complaint(saved, which, theme, width):
    with open_page(saved[which], width, theme) as page:
        assert page.evaluate('document.documentElement.scrollWidth <= innerWidth'), 'it scrolls sideways'
        text, ground = page.evaluate("[getComputedStyle(document.querySelector('.sce')).color, getComputedStyle(document.body).backgroundColor]")
        light = lambda colour: sum(map(int, re.findall(r'\d+', colour)[:3])) > 380
        assert light(ground) == (theme == 'light') and light(text) != light(ground)
        mark = page.locator('.sce').evaluate("e => getComputedStyle(e).getPropertyValue('--a').trim()")
        assert mark == (ex.LIGHT if theme == 'light' else ex.DARK)['a']
        targets = page.evaluate('''[...document.querySelectorAll('button, select, summary, input[type=range], .point')].map(e => e.getBoundingClientRect())
            .filter(b => b.width).map(b => Math.min(b.width, b.height))''')
        assert min(targets) >= 24 and len(targets) > 4, 'a control too small for a finger'
        stops = page.evaluate('''[...document.querySelectorAll('svg')].map(e => e.querySelectorAll('[tabindex="0"]').length)''')
        assert max(stops) <= 1, 'a picture is more than one stop for the Tab key'
        page.locator('summary').first.click()
        assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')


@pytest.mark.parametrize('site, system, expected', [('quarto-dark', 'light', 'DARK'), ('quarto-light', 'dark', 'LIGHT')])
def test_the_theme_of_the_site_decides(saved, site, system, expected):
    with open_page(saved['variance'], 800, system) as page:
        page.evaluate(f"document.body.classList.add('{site}')")
        assert page.locator('.sce').evaluate("e => getComputedStyle(e).getPropertyValue('--a').trim()") == getattr(ex, expected)['a']


@pytest.mark.parametrize('which', PAGES)
def test_the_static_first_view_is_what_javascript_draws(saved, pages, which):
    static = {a['id'] for _, a in Page(pages[which]).tags if 'id' in a and not a['id'].endswith(('-data', which))}
    before = re.sub(r'<script.*?</script>', '', ex.page(pages[which], which), flags=re.S)
    plain = saved[which].with_name(f'{which}-plain.html')
    plain.write_text(before, encoding='utf-8')
    look = "ids => Object.fromEntries(ids.map(id => [id, document.getElementById(id).innerHTML]))"
    with open_page(plain, 800, 'light') as page: first = page.evaluate(look, sorted(static))
    with open_page(saved[which], 800, 'light') as page: drawn = page.evaluate(look, sorted(static))
    for id in static: assert alike(first[id], drawn[id]), id


def test_sliders_of_the_first_explorer(saved, points):
    with open_page(saved['variance'], 1000, 'light') as page:
        state = dict(L=32, p=0.5, step=10, norm='pre_ln')
        def check():
            for part, s in zip(('stream', 'jacobian'), ex.variance_charts(state, points['points'])): assert in_page(ex.chart(s), svg_in(page, f'sce-variance-{part}')), state
            assert page.locator('#sce-variance-says').inner_text() == ex.variance_says(state)
            assert page.locator('#sce-variance-rows table').evaluate('e => e.outerHTML') == ex.variance_rows(ex.variance_charts(state, points['points']))
        for slider, field, key, change in (('density', 'p', 'ArrowLeft', -.05), ('depth', 'L', 'ArrowRight', 1), ('scale', 'step', 'ArrowLeft', -1), ('depth', 'L', 'Home', None), ('depth', 'L', 'End', None)):
            page.locator(f'#sce-variance-{slider}').focus()
            page.keyboard.press(key)
            state[field] = round(state[field] + change, 2) if change else dict(Home=2, End=64)[key]
            check()
            assert page.locator(f'#sce-variance-{slider}').get_attribute('aria-valuetext') == page.locator(f'#sce-variance-{slider}-out').inner_text()
        for state['norm'] in NORMS:
            page.locator('#sce-variance-norm').select_option(state['norm'])
            check()
        assert page.locator('#sce-variance-dots').inner_text() == ex.NO_DOTS and page.locator('.dot').count() == 0
        page.locator('#sce-variance-nearest').focus()
        page.keyboard.press('Enter')
        state |= dict(p=0.5, step=10)
        check()
        assert page.locator('.dot').count() == 33 + 32


class Results:
    "The results explorer in a browser, beside what Python expects of it."
    def __init__(self, page, data):
        self.page, self.data, self.c = page, data, dict(data['first'])

    def at(self, part): return self.page.locator(f'#sce-results-{part}')
    def point(self, id): return self.page.locator(f'.point[data-point="{id}"]')
    def focused(self): return self.page.evaluate('document.activeElement.dataset.point || document.activeElement.id')

    def check(self, **changes):
        self.c |= changes
        data, c = self.data, self.c
        assert in_page(ex.forest(ex.metric_forest(data, c)), svg_in(self.page, 'sce-results-metrics')), c
        assert in_page(ex.chart(ex.curve_chart(data, c)), svg_in(self.page, 'sce-results-curves')), c
        paper = ex.paper_forest(data, c)
        assert in_page(ex.forest(paper), svg_in(self.page, 'sce-results-paper')) if paper else self.at('paper').inner_html() == ''
        assert self.at('says').inner_text() == ex.results_says(data, c)
        assert self.at('point').inner_text() == ex.point_says(data, c) and self.at('about-what').inner_text() == ex.point_title(data, c)
        assert self.at('about').evaluate('e => e.innerHTML') == ex.point_html(data, c)
        shown = {part: self.at(part).is_visible() for part in ('dial', 'version', 'row')}
        d, label = data['scales'][c['scale']][c['study']]['dial'], ex.rows_of(data, c)[c['row']]['label']
        assert shown == dict(dial=bool(d), version=bool(d) and len(d['versions']) > 1, row=not d)
        if d: assert self.at('dial-out').inner_text() == self.at('dial').get_attribute('aria-valuetext') == label and c['row'] in d['rows'][int(self.at('dial').input_value())]
        else: assert self.at('row').input_value() == str(c['row']) and self.at('row').locator('option:checked').inner_text() == label
        if shown['version']: assert self.at('version').input_value() == str(c['version'])

    def opened(self):
        "Are the details of the point open, in view, and announced?"
        fold = self.at('about-fold')
        box, height = fold.bounding_box(), self.page.viewport_size['height']
        return fold.get_attribute('open') is not None and box['y'] < height and box['y'] + box['height'] > 0 and self.at('point').get_attribute('aria-live') == 'polite'


def test_controls_of_the_results(saved, pages):
    with open_page(saved['results'], 1000, 'light') as page:
        r = Results(page, data := data_of(pages['results']))
        r.check()
        r.at('dial').focus()
        page.keyboard.press('Home')
        r.check(row=0, point='mean-0')
        page.keyboard.press('ArrowRight')
        r.check(row=1, point='mean-1')
        for study, metric, curve in (('moe', 'final_variance', 'train_loss'), ('sources', 'accuracy', 'train_variance'), ('remedies', 'usefulness', 'variance_mean'), ('ladder', 'val_loss@common', 'train_loss')):
            for part, value in dict(study=study, metric=metric, curve=curve).items(): r.at(part).select_option(value)
            r.check(study=study, metric=metric, curve=curve, row=0, version=0, point='mean-0')
            r.at('row').focus()
            page.keyboard.press('ArrowDown')
            r.check(row=1, point='mean-1')
        for study in ('decay', 'context', 'gqa'):
            rows, labels = data['scales']['laptop'][study]['dial']['rows'], [label for label, _ in data['scales']['laptop'][study]['rows']]
            r.at('study').select_option(study)
            r.check(study=study, row=0, version=0, point='mean-0')
            r.at('version').select_option('1')
            r.check(row=rows[labels.index(labels[0]) if study != 'context' else 1][1], version=1, point='mean-0')
            r.at('dial').focus()
            for key, position in (('End', len(rows) - 1), ('ArrowLeft', len(rows) - 2), ('Home', 0)):       # the version is kept, also where it is the plain run
                page.keyboard.press(key)
                r.check(row=rows[position][1], point=f'mean-{rows[position][1]}')
        assert r.c['version'] == 1 and r.at('question').inner_text() == data['scales']['laptop']['gqa']['question']


def test_every_point_opens_what_stands_behind_it_by_keyboard(saved, pages, records):
    with open_page(saved['results'], 1000, 'light', height=500) as page:
        r = Results(page, data := data_of(pages['results']))
        r.at('dial').focus()
        page.keyboard.press('Tab')
        assert r.focused() == 'mean-3'                                                     # the open point is the stop of its picture
        page.keyboard.press('Home')
        assert r.focused() == 'mean-0' and r.at('about-fold').get_attribute('open') is None
        runs = ex.rows_of(data, r.c)[0]['runs']
        for key, id in (('ArrowRight', f'run-{runs[0]}'), ('ArrowRight', f'run-{runs[1]}'), ('ArrowDown', 'mean-1'), ('ArrowUp', 'mean-0'), ('ArrowLeft', 'mean-0'), ('ArrowRight', f'run-{runs[0]}')):
            page.keyboard.press(key)
            assert r.focused() == id and page.locator('#sce-results-metrics [tabindex="0"]').count() == 1
        page.keyboard.press('Enter')
        r.check(row=0, point=f'run-{runs[0]}')
        assert r.opened() and r.focused() == f'run-{runs[0]}'
        record = next(x for x in records if x['name'] == ex.facts(data, runs[0])['run'])
        cells = dict(zip(page.locator('#sce-results-about tbody th').all_text_contents(), page.locator('#sce-results-about tbody td').all_text_contents()))
        assert cells['commit'] == str(record['provenance']['commit']) and cells['hardware'] == record['provenance']['hardware'] and cells['seed'] == str(record['seed'])
        assert cells['model.n_layers'] == str(record['config']['model']['n_layers']) and record['name'] in r.at('point').inner_text()
        page.keyboard.press('End')
        page.keyboard.press('ArrowUp')
        page.keyboard.press(' ')
        r.check(row=3, point='mean-3')                                                     # a mean lists its runs
        assert r.opened() and r.at('about').locator('button').count() == 3
        r.at('about').locator('button').nth(1).focus()
        page.keyboard.press('Enter')
        r.check(point=f"run-{ex.rows_of(data, r.c)[3]['runs'][1]}")
        assert r.opened() and r.focused() == 'sce-results-about-what'                      # the button is gone: the focus is on the fold
        r.point('paper-0').focus()
        page.keyboard.press('ArrowRight')
        page.keyboard.press('Enter')
        r.check(point='paper-1')
        assert r.opened() and r.focused() == 'paper-1' and '0.336' in r.at('about').inner_text() and 'arXiv 2603.15389' in r.at('about').inner_text()
        r.at('metric').select_option('val_loss')                                           # without published numbers
        r.check(metric='val_loss', point='mean-3')


@pytest.mark.parametrize('width', [360, 1100])
def test_every_point_opens_what_stands_behind_it_by_pointer(saved, pages, width):
    with open_page(saved['results'], width, 'light') as page:
        r = Results(page, data := data_of(pages['results']))
        r.at('study').select_option('decay')
        r.c |= dict(study='decay', version=0)
        for metric in ('usefulness', 'val_loss', 'final_variance'):                        # equal, close and different values
            r.at('metric').select_option(metric)
            r.c |= dict(metric=metric)
            ids = page.locator('#sce-results-metrics .point').evaluate_all('all => all.map(p => p.dataset.point)')
            assert len(ids) == 9 * 4
            for id in [*ids[::5], ids[3]]:
                middle = page.locator(f'.point[data-point="{id}"] .hit')
                middle.scroll_into_view_if_needed()
                box = middle.bounding_box()
                page.mouse.click(box['x'] + box['width'] / 2, box['y'] + box['height'] / 2)  # whatever lies on top
                kind, n = id.split('-')
                row = int(n) if kind == 'mean' else next(i for i, x in enumerate(ex.rows_of(data, r.c)) if int(n) in x['runs'])
                version = next(x.index(row) for x in data['scales']['laptop']['decay']['dial']['rows'] if row in x) if row else r.c['version']
                r.check(row=row, version=version, point=id)
                assert r.opened()
            r.point(ids[0]).scroll_into_view_if_needed()
            box = r.point(ids[0]).locator('.hit').bounding_box()
            assert box['width'] >= 24 and box['height'] >= 24
        page.mouse.click(box['x'] + 2 + box['width'] / 2, box['y'] + 3)                    # at the edge of the disc
        r.check(row=0, version=r.c['version'], point='mean-0')
        r.point('paper-2').scroll_into_view_if_needed()
        r.point('paper-2').click()
        r.check(point='paper-2')
        assert r.opened()


def test_surgery_by_keyboard_and_pointer(saved, pages):
    tables = data_of(pages['surgery'])['tables']
    with open_page(saved['surgery'], 1000, 'light') as page:
        at = lambda part: page.locator(f'#sce-surgery-{part}')
        def check(d, mode, i, j):
            assert at('says').inner_text() == ex.surgery_says(tables[d], mode, i, j)
            for part, s in zip(('swaps', 'causal'), ex.surgery_maps(tables[d], mode, i, j)): assert in_page(ex.heat_map(s), svg_in(page, f'sce-surgery-{part}'))
            pressed = page.locator('#sce-surgery-blocks [aria-pressed=true]').evaluate_all('b => b.map(x => +x.dataset.block)')
            assert pressed == sorted({i, j} if mode == 'swap' else {i})
        at('i').focus()
        page.keyboard.press('ArrowRight')
        check('L=16', 'skip', 2, 2)
        at('j').focus()
        page.keyboard.press('End')
        check('L=16', 'skip', 2, 16)
        at('mode-skip').focus()
        page.keyboard.press('ArrowDown')
        check('L=16', 'swap', 2, 16)
        page.keyboard.press('ArrowDown')
        check('L=16', 'linear', 2, 16)
        at('blocks').locator('[data-block="5"]').focus()
        page.keyboard.press('Enter')
        check('L=16', 'linear', 5, 16)
        assert page.evaluate('document.activeElement.dataset.block') == '5'
        at('depth').select_option('L=4')
        check('L=4', 'linear', 4, 4)
        at('swaps').locator('[data-i="0"][data-j="2"]').click()
        check('L=4', 'swap', 1, 3)
        at('causal').locator('[data-i="1"][data-j="3"]').click()
        check('L=4', 'skip', 2, 4)


def test_another_scale_can_be_chosen(records, tmp_path):
    few = [r for r in records if r['seed'] == 0]
    text = ex.results_explorer(few + at_tiny(few), study='decay')
    data, path = data_of(text), tmp_path / 'scales.html'
    path.write_text(ex.page(text, 'scales'), encoding='utf-8')
    with open_page(path, 1000, 'light') as page:
        page.locator('#sce-results-scale').select_option('tiny')
        assert page.locator('#sce-results-study option').all_text_contents() == ['depth']
        c = data['first'] | dict(scale='tiny', study='depth', row=0, version=0, point='mean-0')
        assert page.locator('#sce-results-says').inner_text() == ex.results_says(data, c)
        assert in_page(ex.forest(ex.metric_forest(data, c)), svg_in(page, 'sce-results-metrics'))
