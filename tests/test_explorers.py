"Explorers: one page each, the same numbers in Python, in JavaScript and on the screen, and usable without a mouse."
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import product
from xml.etree import ElementTree

import pytest

from browser import open_page
from sparsecod import explorers as ex
from sparsecod.core import NORMS
from sparsecod.explore import label_variants
from sparsecod.studies import SCALES, STUDIES, load_results, over_seeds, read_metric, vary

NODE = pytest.mark.skipif(shutil.which('node') is None, reason='node is not installed: apt-get install nodejs')


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
    assert count('details') == count('table') >= 1                                      # a table behind the pictures


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
    assert data_of(text)['common']['hardware'] == hostile


def test_markdown_holds_the_page_in_a_raw_block(pages):
    for text in pages.values():
        shown = ex.as_markdown(text)._repr_markdown_()
        fence = re.match('`+', shown)[0]
        assert shown == f'{fence}{{=html}}\n{text}\n{fence}\n' and fence not in text
        assert not hasattr(ex.as_markdown(text), '_repr_html_')                        # an HTML output would make Quarto load scripts


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
    done = subprocess.run(['node', '-'], input=f'const INPUT = {json.dumps(data)}\n{script}', capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def functions_of(page: str, until: str) -> str:
    "The script of a page up to where it touches the page, with its data in the place of the document."
    script = re.search(r'<script>\(\(\) => \{(.*)\}\)\(\)</script>', page, re.S)[1]
    assert script.count(until) == 1
    return f'const document = {{getElementById: () => ({{textContent: {json.dumps(json.dumps(data_of(page)))}}})}}\n' + script.split(until)[0]


@NODE
def test_javascript_numbers_and_axes_are_pythons(pages):
    script = functions_of(pages['variance'], 'const read')
    numbers = [0, 1, -1, 0.1, 123.456, 1234.5, 9999.4, 12345.678, 1e-4, 9.9e-5, 2.5e-7, -3.14159e8, 0.00123456, None, 2 / 3, 136.5, -136.5, 0.0625, 1.125, 9995.0, 99950000.0]
    assert in_node(script + 'console.log(JSON.stringify(INPUT.map(short)))', numbers) == [ex.short(x) for x in numbers]
    axes = [(0, 1, False), (-3, 40, False), (0.00012, 0.00013, False), (0.5, 1e6, True), (1e-9, 1e3, True), (1.5, 1.9, True)]
    for (a, b, log), found in zip(axes, in_node(script + 'console.log(JSON.stringify(INPUT.map(x => marks(...x))))', axes)):
        assert found == pytest.approx(ex.marks(a, b, log), rel=1e-12)


@NODE
def test_javascript_formulas_are_pythons(pages):
    grid = list(product((1, 7, 64), (0.05, 0.1, 0.35, 0.5, 1.0), (0, 3, 10, 14), NORMS))
    script = functions_of(pages['variance'], 'const read') + 'console.log(JSON.stringify(INPUT.map(stack)))'
    for setting, js in zip(grid, in_node(script, [ex.javascript_setting(*s) for s in grid]), strict=True):
        python = ex.theory_stack(*setting)
        for name in ('variance', 'jacobian'): assert js[name] == pytest.approx(python[name], rel=1e-6), setting


@NODE
def test_a_changed_formula_is_noticed(pages):
    script = functions_of(pages['variance'].replace('c.F * w * s2 * square', 'c.F * w * s2 * square * 1.00001'), 'const read')
    found = in_node(script + 'console.log(JSON.stringify(stack(INPUT)))', ex.javascript_setting(8, 0.5, 10, 'pre_ln'))
    assert found['variance'] != pytest.approx(ex.theory_stack(8, 0.5, 10, 'pre_ln')['variance'], rel=1e-6)


@NODE
def test_every_view_of_the_results_is_the_same_in_both_languages(pages):
    data = data_of(pages['results'])
    views = []
    for study, s in data['scales']['laptop'].items():
        for k, (metric, curve) in enumerate(zip([*data['metrics']], [*data['curves']] * 9)):
            row = k % len(s['rows'])
            views.append(dict(scale='laptop', study=study, metric=metric, curve=curve, row=row, run=s['rows'][row]['runs'][-1]))
    script = functions_of(pages['results'], 'const state') + '''
    console.log(JSON.stringify(INPUT.map(c => [forest(metricForest(c)), paperForest(c) && forest(paperForest(c)), chart(curveChart(c)), says(c), estimateRows(c), curveRows(curveChart(c)), runRows(c.run)])))'''
    for c, js in zip(views, in_node(script, views), strict=True):
        paper, lines = ex.paper_forest(data, c), ex.curve_chart(data, c)
        ours = [ex.forest(ex.metric_forest(data, c)), paper and ex.forest(paper), ex.chart(lines), ex.results_says(data, c), ex.estimate_rows(data, c), ex.curve_rows(lines), ex.run_rows(data, c['run'])]
        for a, b in zip(js, ours): assert (a is None and b is None) or alike(a, b), c


@NODE
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
    for run, r in zip(data['runs'], records):
        about = data['common'] | run['own']
        assert about['run'] == r['name'] and about['seed'] == str(r['seed']) and about['commit'] == str(r['provenance']['commit'])
        assert about['train.lr'] == str(r['config']['train']['lr']) and about['train.weight_decay'] == str(r['config']['train']['weight_decay'])
        assert about['tokens'] == f"{r['tokens']:,}" and about['hardware'] == r['provenance']['hardware'] and about['steps'] == str(r['step'])
        for value, name in zip(run['values'], data['metrics'], strict=True):
            m = read_metric(r, name)
            assert value == (m and pytest.approx(m['value'], rel=1e-4, abs=1e-12)), (r['name'], name)
        assert run['curves']['variance_mean'] == pytest.approx(r['scores']['arrays']['variance_mean'], rel=1e-3)
        assert data['steps'][run['steps']][-1] == r['curve']['step'][-1] and run['curves']['train_loss'][-1] == pytest.approx(r['curve']['loss'][-1], rel=1e-3)


def test_estimates_are_those_over_seeds(pages, records):
    data = data_of(pages['results'])
    assert set(data['scales']['laptop']) == {name for name in STUDIES if label_variants(name, records)}
    for study, s in data['scales']['laptop'].items():
        groups = {}
        for r in label_variants(study, records): groups.setdefault(r['variant'], []).append(r)
        assert [row['label'] for row in s['rows']] == list(groups)
        for row in s['rows']:
            for name, found in zip(data['metrics'], row['found'], strict=True):
                values = [m for r in groups[row['label']] if (m := read_metric(r, name))]
                if not values: assert found is None; continue
                e = over_seeds(values)
                assert found[3:] == [e['n'], e['over']] and found[:3] == pytest.approx([e['value'], e['low'], e['high']], rel=1e-3, abs=1e-9)


def test_diverged_single_and_missing_runs_are_said_to_be_so(records):
    two = [r for r in label_variants('depth', records) if r['seed'] < 2 and r['variant'] in ('L=2', 'L=4')]
    lost = {k: v for k, v in two[0].items() if k != 'scores'} | dict(status='diverged', final=two[0]['final'] | dict(val_loss=None))
    data = ex.results_data([lost, *two[1:]])
    c = dict(scale='laptop', study='depth', metric='causal', curve='variance_mean', row=0, run=0)
    row, = (r for r in data['scales']['laptop']['depth']['rows'] if r['label'] == 'L=2')
    assert row['lost'] == 1 and data['runs'][0]['values'] == [None] * len(data['metrics']) and 'train_loss' in data['runs'][0]['curves']
    assert '(1 of 2 diverged)' in ex.forest(ex.metric_forest(data, c)) and 'one seed' in ex.results_says(data, c)
    assert 'over 2 seeds' in ex.results_says(data, c | dict(row=1))
    alone = ex.results_data([lost, *two[2:]])
    assert 'was not measured' in ex.results_says(alone, c) and ex.chart(ex.curve_chart(alone, c)).count('class="line') == 1
    assert not Page(ex.results_explorer([lost, *two[2:]])).open


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
    runs = [n for row in data['scales']['tiny']['depth']['rows'] for n in row['runs']]
    assert runs and all((data['common'] | data['runs'][n]['own'])['run'].startswith('tiny_') for n in runs)


def test_a_page_with_fewer_curves_is_smaller(records, pages):
    text = ex.results_explorer(records, curve='train_loss', curves=('train_loss',))
    assert len(text) < len(pages['results']) and set(data_of(text)['curves']) == {'train_loss'}


def test_equal_seeds_have_no_interval():
    row = dict(label='L=2', runs=[0, 1], lost=0, found=[[.5, .5, .5, 2, 'seeds']])
    data = dict(scales={'laptop': {'depth': dict(rows=[row])}}, metrics=dict(usefulness=['Usefulness', 'share of blocks', False]))
    assert ex.results_says(data, dict(scale='laptop', study='depth', metric='usefulness', row=0)) == 'L=2: Usefulness 0.5, the same in all 2 seeds.'


@pytest.mark.parametrize('which', ['variance', 'results', 'surgery'])
def test_a_planted_value_is_found(pages, which):
    text = pages[which]
    assert ex.first_view_faults(text) == [] and ex.first_view_faults(ex.as_markdown(text)._repr_markdown_()) == []
    says = re.search(r'class="says".*?(\d\.\d+)', text, re.S)
    for start, end in (says.span(1), re.search(r'<td>(\d[\d.]+)</td>', text).span(1)):
        planted = text[:start] + '7.77' + text[end:]
        assert ex.first_view_faults(planted) == [f'sce-{which}: the first view is not what the data inside give']
    assert 'script' in ex.first_view_faults(text.replace('Math.sqrt', 'Math.cbrt'))[-1]
    assert ex.first_view_faults('') == ['there is no explorer in it']


def test_nothing_to_show_is_an_error():
    with pytest.raises(ValueError, match='records is empty'): ex.results_explorer([])
    with pytest.raises(ValueError, match='no finished run'): ex.surgery_tables([])
    with pytest.raises(ValueError, match='tables is empty'): ex.surgery_explorer({})


def test_the_papers_numbers_keep_their_own_picture(pages):
    data = data_of(pages['results'])
    assert data['paper']['depth']['causal'] == [['L=12', .355], ['L=16', .336], ['L=24', .289], ['L=32', .259]]
    c = dict(scale='laptop', study='decay', metric='final_variance', curve='variance_mean', row=0, run=0)
    paper = ex.paper_forest(data, c)
    assert paper['ghost'] and not paper['log'] and 'class="dot"' not in ex.forest(paper)    # a published 0 has no logarithm
    assert ex.paper_forest(data, c | dict(study='remedies')) is None


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
        small = page.evaluate("[...document.querySelectorAll('button, select, input[type=range]')].filter(e => e.offsetParent && e.getBoundingClientRect().height < 24).length")
        assert small == 0, 'a control too small for a finger'
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


def test_results_by_keyboard(saved, pages, records):
    data = data_of(pages['results'])
    with open_page(saved['results'], 1000, 'light') as page:
        at = lambda part: page.locator(f'#sce-results-{part}')
        def check(c):
            assert in_page(ex.forest(ex.metric_forest(data, c)), svg_in(page, 'sce-results-metrics')) and in_page(ex.chart(ex.curve_chart(data, c)), svg_in(page, 'sce-results-curves'))
            assert at('says').inner_text() == ex.results_says(data, c)
        c = dict(data['first'])
        at('row').focus()
        page.keyboard.press('Home')
        c |= dict(row=0, run=ex.rows_of(data, c)[0]['runs'][0])
        check(c)
        for study, metric, curve in (('decay', 'final_variance', 'train_loss'), ('context', 'val_loss', 'skip_loss_increase'), ('sources', 'accuracy', 'train_variance'), ('depth', 'usefulness', 'variance_mean')):
            for part, value in dict(study=study, metric=metric, curve=curve).items(): at(part).select_option(value)
            c |= dict(study=study, metric=metric, curve=curve, row=0)
            c['run'] = ex.rows_of(data, c)[0]['runs'][0]
            check(c)
            paper = ex.paper_forest(data, c)
            assert in_page(ex.forest(paper), svg_in(page, 'sce-results-paper')) if paper else at('paper').inner_html() == ''
        ring = page.locator('#sce-results-metrics .seed').last
        number = int(ring.get_attribute('data-run'))
        ring.focus()
        page.keyboard.press('Enter')
        r = next(r for r in records if r['name'] == (data['common'] | data['runs'][number]['own'])['run'])
        assert r['name'] in at('run-name').inner_text() and page.evaluate('document.activeElement.dataset.run') == str(number)
        cells = dict(zip(page.locator('#sce-results-run tbody th').all_text_contents(), page.locator('#sce-results-run tbody td').all_text_contents()))
        assert cells['commit'] == str(r['provenance']['commit']) and cells['hardware'] == r['provenance']['hardware'] and cells['seed'] == str(r['seed'])
        assert cells['model.n_layers'] == str(r['config']['model']['n_layers']) and at('row-out').inner_text() == f"L={r['config']['model']['n_layers']}"


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
        c = data['first'] | dict(scale='tiny', study='depth', row=0, run=data['scales']['tiny']['depth']['rows'][0]['runs'][0])
        assert page.locator('#sce-results-says').inner_text() == ex.results_says(data, c)
        assert in_page(ex.forest(ex.metric_forest(data, c)), svg_in(page, 'sce-results-metrics'))
