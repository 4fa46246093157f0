"""Reports: what the page of scores says, that tables hold the numbers, and that pages work in a browser
without a mouse or a network."""
import copy
import json
import math
import random
import re
from html import unescape

import pytest

from browser import INSTALL, open_page
from sparsecod import report as pages
from sparsecod.claims import ledger
from sparsecod.figures import label_variants
from sparsecod.integrity import Damaged
from sparsecod.report import (_NEAR_IDENTITY, _SMALL_SWAP, Estimate, comparison_frame, comparison_page,
                              file_names, mismatches)
from sparsecod.report import _difference as difference
from sparsecod.report import (plain_reading, read_comparison, read_scores, _score_explorer, score_page,
                              score_table, _skip_explorer, write_page, write_report)
from sparsecod.studies import SCALES, STUDIES
from synthetic import depth_study, variants
from synthetic import record as made_record


def layers(values: list, width: float = 0.) -> tuple[list, dict]:
    "A made-up score by layer, and its intervals, of this half width."
    return values, dict(low=[v - width for v in values], high=[v + width for v in values])


def pairs(values: list[list], width: float = 0.) -> tuple[list, dict]:
    "A made-up score of pairs (L, L), and its intervals, of this half width."
    ends = lambda shift: [[None if v is None else max(0., v + shift) for v in row] for row in values]
    return values, dict(low=ends(-width), high=ends(width))


def made_up(n_sequences: int = 32, loss: float = 2., T: int = 128, **by_layer) -> dict:
    "Made-up scores, to try a reading on."
    arrays = {name: v[0] if isinstance(v, tuple) else v for name, v in by_layer.items()}
    settings = dict(n_sequences=n_sequences, n_fit=64, n_jacobian=min(4, n_sequences), threshold=1.1, T=T)
    return dict(scalars=dict(loss=dict(value=loss, low=.95 * loss, high=1.05 * loss)), arrays=arrays,
                intervals={name: v[1] for name, v in by_layer.items() if isinstance(v, tuple)},
                settings=settings)


def random_scores(L: int, seed: int = 0, intervals: bool = True) -> dict:
    "Scores of the right shape, with no meaning."
    r = random.Random(seed)
    array = lambda n, low, high: [r.uniform(low, high) for _ in range(n)]
    by_layer = dict(usefulness_ratio=array(L, .99, 1.3), skip_loss_increase=array(L, -.1, 2),
                    linear_loss_increase=array(L, -.1, .5), jacobian_per_token=array(L, .001, .1),
                    variance_mean=array(L + 1, .01, 30), variance_median=array(L + 1, .01, 20),
                    variance_without_first=array(L + 1, .01, 20))
    if intervals: by_layer = {k: layers(v, .01) if k != 'variance_median' else v for k, v in by_layer.items()}
    P = [[None] * L for _ in range(L)]
    for i in range(L):
        for j in range(i): P[i][j] = P[j][i] = 10 ** r.uniform(-4, 0)
    by_pair = dict(permutation=P,
                   causal=[[r.random() if l > s else None for l in range(L)] for s in range(L)])
    if intervals: by_pair = {name: pairs(values, .01) for name, values in by_pair.items()}
    found = made_up(**by_layer, **by_pair, fit_rank=[64] * L)
    found['scalars'] |= {name: dict(value=r.random(), low=.1, high=1.2) for name in pages.MEANING
                         if name != 'loss'}
    return found


ABOUT = dict(name='A model', d_model=64, vocab_size=2048, n_parameters=1234567, text='some text')


@pytest.fixture(scope='module')
def record(root):
    return json.loads(sorted((root / 'results' / 'laptop').glob('L16_D64_T128_seed0-*.json'))[0].read_text(
        encoding='utf-8'))


@pytest.fixture(scope='module')
def scores():
    return random_scores(8)


@pytest.fixture(scope='module')
def text(scores):
    return score_page(scores, about=ABOUT)


# The page

def shown(page) -> dict:
    "Tables of the charts, by title, each a list of rows."
    page.wait_for_function("!document.querySelector('.sce') || document.querySelector('.sce').view")
    page.evaluate("document.querySelectorAll('details[data-table]').forEach(d => d.open = true)")
    page.wait_for_timeout(300)
    return page.evaluate("""Object.fromEntries([...document.querySelectorAll('details[data-table]')].map(d =>
        [d.querySelector('summary').textContent, [...d.querySelectorAll('tbody tr')].map(r => [...r.cells].map(c => c.textContent))]))""")


def texts(html: str, tag: str) -> list[str]:
    "The texts of all elements of a kind, before the charts."
    return [unescape(re.sub('<[^>]*>', '', text))
            for text in re.findall(rf'<{tag}\b[^>]*>(.*?)</{tag}>', html, re.S)]


def test_the_same_scores_give_the_same_page(scores, text):
    assert score_page(copy.deepcopy(scores), about=dict(ABOUT)) == text


def test_tables_hold_the_scores(scores, text):
    close = (lambda shown, value: shown == '–' if value is None
             else math.isclose(float(shown), value, rel_tol=6e-4))
    with open_page(text) as page:
        tables, arrays = shown(page), scores['arrays']
        # an older file lacks what came later
        drawn = {name: title for name, (title, *_) in pages._BARS.items() if name in arrays}
        assert len(drawn) >= 3
        for name, title in drawn.items():
            ends = scores['intervals'][name]
            for l, (row, *three) in enumerate(zip(tables[title], arrays[name], ends['low'], ends['high'],
                                                  strict=True), 1):
                assert int(row[0]) == l and all(map(close, row[1:], three))
        for name, (title, *_) in ((name, x) for name, x in pages._HEATS.items() if name in arrays):
            cells = {(int(i), int(j)): v for i, j, v, *_ in tables[title]}
            assert cells.keys() == {(i, j) for i in range(1, 9) for j in range(1, 9)
                                    if arrays[name][i - 1][j - 1] is not None}
            assert all(close(v, arrays[name][i - 1][j - 1]) for (i, j), v in cells.items())
        streams = {(kind, int(l)): v for kind, l, v, *_ in tables['Variance by layer']}
        for kind, name in pages._STREAMS.items():
            assert all(close(streams[kind, l], v) for l, v in enumerate(arrays[name]))
    assert texts(text, 'li') == plain_reading(scores, ABOUT)
    for name, (title, _) in pages.MEANING.items():
        if name in scores['scalars']:
            assert f'{scores["scalars"][name]["value"]:.6g}' in text[text.index(
                f'<th scope="row">{title}<small>'):][:600]


HOSTILE = '</script><script>alert(1)</script><img src=x onerror=alert(2)>"\'&`${1}'

def test_text_from_outside_cannot_break_out(scores):
    evil = copy.deepcopy(scores)
    evil['scalars'][HOSTILE] = dict(value=1., low=0., high=2.)
    text = score_page(evil, title=HOSTILE, about={HOSTILE: HOSTILE, 'text': HOSTILE},
                      sparsity=dict(scalars={HOSTILE: 1.}, arrays={}))
    with open_page(text) as page:
        assert (HOSTILE in page.locator('h1').inner_text() and HOSTILE in page.title()
                and page.locator('img').count() == 0)


def test_a_file_is_written(tmp_path, scores, text):
    path = write_page(tmp_path / 'new' / 'page.html', scores, about=ABOUT)
    assert path.read_text(encoding='utf-8') == text


def test_the_threshold_is_drawn_with_the_ratios(scores):
    def lines(explorer, view):
        spec = explorer.data['spec']
        chart = next(c for c in spec['concat']
                     if any((layer.get('name') or '').startswith(view) for layer in c.get('layer', [])))
        rows = [(spec['datasets'][data['name']] if 'name' in (data := layer['data']) else data['values'])[0]
                for layer in chart['layer'] if 'data' in layer]
        return [row['line'] for row in rows if 'line' in row]
    assert (lines(_score_explorer(scores), 'skip_loss_increase') == []
            and lines(_score_explorer(scores), 'usefulness_ratio') == [1.1])


# Scores with holes, and of any size

@pytest.mark.parametrize('hole', [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('L', [1, 3])
def test_nothing_is_known(hole, L):
    gone = random_scores(L)
    lost = (lambda x: {k: lost(v) for k, v in x.items()} if isinstance(x, dict) else [lost(v) for v in x]
            if isinstance(x, list) else hole)
    gone |= {part: lost(gone[part]) for part in ('scalars', 'arrays', 'intervals')}
    text = score_page(gone)
    assert '<script' not in text and 'nan' not in text.lower() and '>inf' not in text
    assert texts(text, 'li') == plain_reading(gone) and 'not known' in ' '.join(plain_reading(gone))
    assert 'nan' not in score_table(gone, 80)


def test_single_holes_leave_the_rest():
    holes = random_scores(4)
    for name in ('usefulness_ratio', 'variance_mean', 'skip_loss_increase'): holes['arrays'][name][1] = None
    holes['arrays']['permutation'][0][1] = holes['arrays']['permutation'][1][0] = math.nan
    with open_page(score_page(holes)) as page:
        tables = shown(page)
        assert {(i, j) for i, j, *_ in tables['Swaps of pairs']} == {(str(i), str(j)) for i in range(1, 5)
                                                                     for j in range(1, 5)
                                                                     if i != j} - {('1', '2'), ('2', '1')}
        assert ([row[0] for row in tables['Skipped blocks']] == ['1', '3', '4']
                and ['mean', '1'] not in [row[:2] for row in tables['Variance by layer']])


@pytest.mark.parametrize('size', [1e-300, 1e-12, 1e12, 1e200])
def test_numbers_of_any_size(size):
    found = random_scores(4, intervals=False)
    for name, x in found['arrays'].items():
        found['arrays'][name] = [[v and v * size for v in row] if isinstance(row, list) else row * size
                                 for row in x]
    with open_page(score_page(found, about=ABOUT)) as page:
        drawn = (shown(page)
                 and page.evaluate("[...document.querySelectorAll('.sce svg.marks path')].map(p => "
                                   "p.getAttribute('d')).filter(d => /NaN|Infinity/.test(d))"))
        assert drawn == []


def test_without_layers_the_error_names_what_is_there():
    with pytest.raises(ValueError, match=r"holds \['fit_rank'\]; it must hold variance_mean"):
        score_page(dict(scalars={}, arrays=dict(fit_rank=[1]), settings={}))


# What is said

def said(scores, about=None, *parts):
    return [line for line in plain_reading(scores, about) if all(p in line for p in parts)]


def test_nearly_linear_needs_the_whole_interval_below_the_threshold():
    at = (lambda ratio,
          width: plain_reading(made_up(variance_mean=[1, 1], usefulness_ratio=layers([ratio], width))))
    line = lambda found: [x.split(':')[0] for x in found
                          if x.startswith(('Nearly', 'Not nearly', 'Undecided: block'))]
    assert line(at(1.05, .04)) == ['Nearly linear by this measure'] and line(at(1.05, .06)) == ['Undecided']
    assert line(at(1.2, .05)) == ['Not nearly linear by this measure'] and line(at(1.2, .15)) == ['Undecided']


def test_the_words_of_the_page_are_explained(text):
    reading = text[text.index('In plain words'):]
    assert reading.index('class="words"') < reading.index('class="reading"')
    for word in ('block', 'update', 'affine map', 'nats'): assert f'<dt>{word}</dt>' in reading


def test_the_threshold_is_that_of_the_settings():
    scores = made_up(variance_mean=[1, 1], usefulness_ratio=layers([1.05], .01))
    scores['settings']['threshold'] = 1.02
    assert said(scores, None, 'Not nearly linear by this measure: block 1', '1.02 times')


def test_values_without_intervals_are_called_that():
    scores = made_up(variance_mean=[1, 2, 3], usefulness_ratio=[1.01, 1.5], skip_loss_increase=[.1, -.1],
                     jacobian_per_token=[.001, .5])
    for line in said(scores, ABOUT, 'block'):
        if line.startswith(('Nearly', 'Not', 'The loss is lower', 'Leaving', 'Near')):
            assert '(by the values alone)' in line, line
    assert said(scores, None, 'how sure it is cannot be said')
    assert not said(scores, None, 'No cost shown') and not said(scores, None, 'ends of the 95 %')


def test_an_interval_from_one_sequence_is_none():
    scores = made_up(n_sequences=1, variance_mean=[1, 2, 3], usefulness_ratio=layers([1.01, 1.5]),
                     skip_loss_increase=layers([.1, -.1]))
    assert not said(scores, None, 'ends of the 95 %') and said(scores, None, 'One sequence was scored')


@pytest.mark.parametrize('about, settings', [(dict(d_model=64), {}), (dict(width='64'), {}),
                                             (None, dict(undetermined_fits=[1]))])
def test_an_undetermined_fit_shows_nothing_about_linearity(about, settings):
    scores = made_up(variance_mean=[1, 2, 3], usefulness_ratio=layers([2., 1.5], .01), fit_rank=[63, 64])
    scores['settings'] |= settings
    assert (said(scores, about, 'Not nearly linear by this measure: block 2.')
            and said(scores, about, 'do not determine the affine map of block 1:'))
    determined = copy.deepcopy(scores)
    determined['arrays']['fit_rank'], determined['settings']['undetermined_fits'] = [64, 64], []
    assert (said(determined, about, 'Not nearly linear by this measure: blocks 1 and 2.')
            and not said(determined, about, 'do not determine'))


def test_no_useful_block_is_explained():
    scores = made_up(loss=4., variance_mean=[1, 2, 3], usefulness_ratio=layers([1.05, 1.02], .01),
                     linear_loss_increase=layers([.2, .08], .04))
    line, = said(scores, None, 'no block counts as useful')
    assert 'allows 0.4 nats' in line and '(block 1) takes 0.2.' in line
    scores['arrays']['usefulness_ratio'], scores['intervals']['usefulness_ratio'] = layers([1.5, 1.02], .01)
    assert not said(scores, None, 'no block counts as useful')


def test_no_cost_shown_says_what_cannot_be_excluded():
    scores = made_up(variance_mean=[1, 2, 3, 4], skip_loss_increase=layers([.5, .02, -.3], .1),
                     linear_loss_increase=layers([.5, .02, -.3], .1))
    assert (said(scores, None, 'No cost shown for leaving out block 2:', 'up to 0.12 nats')
            and said(scores, None, 'The loss is lower without: block 3 '))
    assert (said(scores, None, 'Leaving out block 1 raises the loss (lower ends')
            and said(scores, None, 'does better than block 3'))
    assert said(scores, None, 'No cost shown for an affine map in the place of block 2:')


def test_interchangeable_neighbours():
    P = [[None, _SMALL_SWAP * .9, .5], [_SMALL_SWAP * .9, None, _SMALL_SWAP * 1.1],
         [.5, _SMALL_SWAP * 1.1, None]]
    scores = made_up(variance_mean=[1] * 4, permutation=pairs(P, _SMALL_SWAP * .05))
    assert (said(scores, None, 'Interchangeable neighbours: 1–2.', 'upper ends')
            and said(scores, None, 'by more than 1 % of it: 2–3 (lower ends')
            and said(scores, None, 'For 1 of all 3 pairs of blocks'))
    wide = made_up(variance_mean=[1] * 4, permutation=pairs(P, _SMALL_SWAP * .2))
    assert (said(wide, None, 'Undecided, interchangeable or not: 1–2 and 2–3.')
            and not said(wide, None, 'Interchangeable') and said(wide, None, 'For 0 of all 3 pairs'))
    bare = made_up(variance_mean=[1] * 4, permutation=P)
    assert (not said(bare, None, 'Interchangeable')
            and said(bare, None, 'less than 1 % of it: 1–2, one pair at a time (by the values alone)',
                     'cannot be said without intervals of pairs'))
    assert (said(bare, None, 'of it or more: 2–3 (by the values alone)')
            and said(bare, None, 'For 1 of all 3 pairs of blocks', 'by the values alone'))
    one = made_up(n_sequences=1, variance_mean=[1] * 4, permutation=pairs(P, _SMALL_SWAP * .05))
    assert not said(one, None, 'Interchangeable')  # one sequence gives no interval
    assert pages._pairs_text([1, 3, 4, 5]) == '1–2 and each pair from 3–4 to 5–6'
    assert (said(made_up(variance_mean=[1, 1]), None, 'One block has no pairs')
            and said(made_up(variance_mean=[1, 1, 1]), None, 'Swaps: what they cost is not known'))


@pytest.mark.parametrize('rest, expected',
                         [(.5, 'is dominated by'), (8.7, 'is not dominated by'), (4.5, 'may or may not')])
def test_position_0_dominates_or_not(rest, expected):
    scores = made_up(variance_mean=[1, 2, 9], T=128)
    scores['scalars'] |= dict(final_variance=dict(value=9, low=8.5, high=9.5),
                              final_variance_without_first=dict(value=rest, low=.9 * rest, high=1.1 * rest))
    assert said(scores, None, expected, 'position 0')


@pytest.mark.parametrize('values, width, expected',
                         [([1, 2, 4], .1, ': it grows'), ([1, 4, 2], .1, ': it falls'),
                          ([1, 2, 2.1], .3, 'no change is shown'),
                          ([1, 2, 4], None, '(by the values alone)')])
def test_variance_grows_where_intervals_do_not_overlap(values, width, expected):
    scores = made_up(variance_mean=values if width is None else layers(values, width))
    assert said(scores, None, 'From block 1 to block 2', expected)


def test_near_identity_depends_on_width_and_probes():
    limit = _NEAR_IDENTITY / 8   # for a width of 64
    scores = made_up(variance_mean=[1] * 4,
                     jacobian_per_token=layers([.8 * limit, limit, 1.2 * limit], .1 * limit))
    assert (said(scores, ABOUT, 'Near the identity: block 1.')
            and said(scores, ABOUT, 'Not near the identity in this sense: block 3 ')
            and said(scores, ABOUT, 'near the identity or not: block 2,'))
    assert said(scores, None, 'width of the model was not given')
    scores['arrays']['jacobian_per_token_error'] = [.2 * limit] * 3
    assert said(scores, ABOUT, 'near the identity or not: blocks 1 to 3')


@pytest.mark.parametrize('loss, expected',
                         [(9., 'no better than'), (7.6, 'cannot be told from'), (4., 'below guessing')])
def test_a_loss_is_compared_with_guessing(loss, expected):
    assert said(made_up(loss=loss, variance_mean=[1, 1]), ABOUT, expected)   # log 2048 = 7.62
    assert said(made_up(loss=loss, variance_mean=[1, 1]), dict(vocabulary='2,048'), expected)


def test_costs_are_read_without_ratios_and_fits_have_a_caution():
    scores = made_up(variance_mean=[1, 2], linear_loss_increase=layers([.02], .1))
    assert (said(scores, None, 'nothing can be said about which blocks are nearly linear')
            and said(scores, None, 'No cost shown for an affine map in the place of block 1'))
    assert (not said(scores, None, 'fitted on 64')
            and said(made_up(variance_mean=[1, 2], usefulness_ratio=[1.]), None, 'fitted on 64'))


def test_few_sequences_are_a_caution():
    assert (said(made_up(n_sequences=5, variance_mean=[1, 1]), None, 'fewer than 10')
            and not said(made_up(variance_mean=[1, 1]), None, 'fewer than 10'))
    assert said(made_up(variance_mean=[1, 1]), None, 'other trainings')


# The table for the terminal

@pytest.mark.parametrize('width', [30, 40, 66, 80, 120])
def test_the_table_fits(scores, width):
    lines = score_table(scores, width).splitlines()
    assert max(map(len, lines)) <= width
    for name, e in scores['scalars'].items(): assert any(name in line for line in lines)


def test_the_table_holds_the_scores(scores):
    lines = score_table(scores, 200).splitlines()
    rows = [line.split() for line in lines if re.match(r' +\d', line)]
    assert len(rows) == 8
    for l, row in enumerate(rows, 1):
        wanted = [scores['arrays'][name][l - 1 if name[0] != 'v' else l] for name in pages._COLUMNS
                  if name in scores['arrays']]
        assert int(row[0]) == l and [float(x) for x in row[1:]] == pytest.approx(wanted, rel=1e-3)


# In a browser

def luminance(colour: str) -> float:
    parts = [int(x) / 255 for x in re.findall(r'\d+', colour)[:3]]
    return sum(w * (c / 12.92 if c <= .03928 else ((c + .055) / 1.055) ** 2.4)
               for w, c in zip((.2126, .7152, .0722), parts))

def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + .05) / (low + .05)


@pytest.mark.parametrize('theme', ['light', 'dark'])
@pytest.mark.parametrize('width', [375, 1200])
def test_a_page_reads_well(record, width, theme):
    with open_page(score_page(record['scores'], record['name'], record['config']['model'],
                              record['sparsity']), width, theme) as page:
        assert len(shown(page)) >= 6
        assert page.evaluate('document.documentElement.scrollWidth <= innerWidth'), 'it scrolls sideways'
        ground = page.evaluate('getComputedStyle(document.body).backgroundColor')
        assert (luminance(ground) < .2) == (theme == 'dark')
        inks = page.evaluate(
            """[...document.querySelectorAll('h1, h2, p, li, dt, dd, td, th, small, .sce > details > summary, svg.marks text')].map(e => e.closest('svg') ? getComputedStyle(e).fill : getComputedStyle(e).color)""")
        assert len(inks) > 500 and min(contrast(ink, ground) for ink in set(inks)) >= 4.5
        assert all(contrast(f'rgb({int(c[1:3], 16)}, {int(c[3:5], 16)}, {int(c[5:], 16)})', ground) >= 3
                   for c in (pages.BLUE, pages.ORANGE))


@pytest.mark.parametrize('L', [1, 64])
def test_shallow_and_deep_pages_open(L):
    with open_page(score_page(random_scores(L), about=ABOUT), 375, 'dark') as page:
        assert (shown(page)['Skipped blocks'][-1][0] == str(L)
                and page.evaluate('document.documentElement.scrollWidth <= innerWidth'))


def test_a_block_lights_up_in_all_charts(scores, text):
    "By the slider and by a click; the bars are those of the scores."
    with open_page(text, 1200) as page:
        shown(page)
        lit = lambda: page.evaluate(
            f"[...document.querySelectorAll('.sce "
            f"[aria-roledescription=bar][fill=\"{pages.ORANGE}\"]')].map(b => b.getAttribute('aria-label'))")
        assert lit() == []
        slider = page.locator('[name=pick_block]')
        slider.focus()
        for _ in range(3): page.keyboard.press('ArrowRight')
        assert len(lit()) == 3 and all('block: 3;' in label for label in lit())
        assert any(f"nats a token: {scores['arrays']['skip_loss_increase'][2]:.4g}"[:-1] in label.replace(
            '−', '-') for label in lit())
        page.locator('#sce-scores [aria-roledescription=bar][aria-label*="block: 5;"]').first.click()
        assert (len(lit()) == 3 and all('block: 5;' in label for label in lit())
                and slider.input_value() == '5')
        assert page.evaluate(f"[...document.querySelectorAll('.sce "
                             f"[stroke=\"{pages.ORANGE}\"][aria-roledescription]')].length") >= 7 + 14


def test_a_missing_browser_is_explained(monkeypatch):
    monkeypatch.setattr('shutil.which', lambda name: None)
    with pytest.raises(pytest.fail.Exception, match='apt-get install chromium'):
        with open_page('<p>'): pass
    assert '\n' not in INSTALL


def test_complaints_and_requests_are_noticed():
    with pytest.raises(AssertionError, match='complains'):
        with open_page('<link rel="icon" href="data:,"><script>console.error("x")</script>'): pass
    with pytest.raises(AssertionError, match='other files'):
        with open_page('<img src="https://example.org/a.png">'): pass


# The report of a study

@pytest.fixture(scope='module')
def depth(): return depth_study(seeds=3)

@pytest.fixture(scope='module')
def report(depth, tmp_path_factory):
    return write_report(depth, tmp_path_factory.mktemp('report') / 'new folder' / 'report.html',
                        ledger([], 'depth')).read_text(encoding='utf-8')

def heading(path): return unescape(re.search('<h1>(.*?)</h1>', path.read_text(encoding='utf-8'))[1])

def settings(path) -> set:
    "The settings that the charts of a report show."
    text = re.search(r'id="sce-results".*?class="data">(.*?)</script>', path.read_text(encoding='utf-8'),
                     re.S)
    return ({row['label'].split(' (')[0] for row in json.loads(text[1])['spec']['datasets']['settings']}
            if text else set())


def test_a_report_names_what_made_it(report, depth):
    text, p = unescape(report), depth[0]['provenance']
    for r in depth: assert r['name'] in text
    for fact in (p['hardware'], p['torch'], p['commit'], p['corpus_fingerprint'], '4096', 'weight_decay'):
        assert fact in text
    for row in ledger([], 'depth'): assert row['statement'] in text and row['verdict'] in text
    assert '<h1>Depth and the residual stream</h1>' in report and 'over held-out sequences only' not in text


@pytest.mark.parametrize('width, theme', [(375, 'dark'), (1200, 'light')])
def test_a_report_opens_from_disk(report, depth, width, theme):
    with open_page(report, width, theme) as page:
        for name in ('results', 'surgery'):
            page.wait_for_function(f"document.getElementById('sce-{name}').view")
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        page.wait_for_timeout(300)
        assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')
        rows = page.locator('#sce-results details[data-table]').first.locator('tbody tr').evaluate_all(
            'rows => rows.map(r => [...r.cells].map(c => c.textContent))')
        mean = lambda L: sum(r['scores']['scalars']['causal']['value'] for r in depth
                             if r['config']['model']['n_layers'] == L) / 3
        assert len(rows) == 4 and all(math.isclose(float(row[1]), mean(int(row[0].split('=')[1])),
                                                   rel_tol=1e-3) for row in rows)
        assert page.locator('#sce-surgery .says').inner_text()


def test_a_report_of_partial_records(tmp_path):
    runs = [made_record(1), made_record(2), made_record(16), made_record(16, 1, diverged=True)]
    text = write_report(runs, tmp_path / 'r.html').read_text(encoding='utf-8')
    assert ('nothing about other seeds' in text
            and 'Diverged, and therefore without scores: L16_D64_T128_seed1' in text)
    assert 'sce-results' not in write_report([made_record(4, diverged=True)],
                                             tmp_path / 'r.html').read_text(encoding='utf-8')


def test_a_report_of_runs_that_differ_in_another_field(tmp_path):
    runs = [made_record(4, seed, weight_decay=wd) for wd in (.1, 1.) for seed in (0, 1)]
    path = write_report(runs, tmp_path / 'r.html')
    assert (settings(path) == {'λ = 0.1', 'λ = 1.0'}
            and 'λ = 0.1, λ = 1.0, 2 seeds each' in path.read_text(encoding='utf-8'))


def test_a_report_escapes_what_it_is_given(tmp_path):
    r = made_record(2)
    r['provenance']['hardware'] = '<script>alert(1)</script>'
    text = write_report([r], tmp_path / 'r.html', title='a < b & "c"').read_text(encoding='utf-8')
    assert '<script>alert' not in text and '&lt;script' in text and 'a &lt; b' in text


@pytest.mark.parametrize('study', [name for name in STUDIES if name != 'depth'])
def test_every_study_has_a_report(study, tmp_path):
    question, labelled = STUDIES[study].question, label_variants(study, variants(study, seeds=[0, 1]))
    path = write_report(labelled, tmp_path / 'r.html', ledger_rows=[], title=question, by='variant')
    assert heading(path) == question and settings(path) == set(STUDIES[study].changes(SCALES['laptop']))
    assert 'No claim is registered' in path.read_text(encoding='utf-8')


@pytest.mark.parametrize('lost', [dict(seeds=[0]), dict(missing=['G=1']),
                                  dict(diverged=[('G=1', s) for s in (0, 1, 2)])], ids=str)
def test_a_report_of_a_partial_study(lost, tmp_path):
    path = write_report(label_variants('gqa', variants(**lost)), tmp_path / 'r.html',
                        title=STUDIES['gqa'].question, by='variant')
    assert settings(path) == {*STUDIES['gqa'].changes(SCALES['laptop'])} - set(lost.get('missing', []))


def test_a_report_without_its_runs(tmp_path):
    for by in (None, 'variant'):
        with pytest.raises(ValueError, match='no records to show: run a study first'):
            write_report([], tmp_path / 'r.html', by=by)


def test_a_report_does_not_average_unlike_runs(tmp_path):
    mixed = [made_record(4), made_record(4, 7, weight_decay=1.), made_record(2)]
    with pytest.raises(ValueError, match='differ in train.weight_decay'):
        write_report(mixed, tmp_path / 'r.html')


@pytest.mark.parametrize('missing, swapped', [((), 6), (((0, 2),), 5), (((0, 2), (0, 3), (1, 3)), 3)])
def test_pairs_that_were_not_swapped_are_not_counted(missing, swapped):
    "Of a deep model only some pairs are swapped, and a reading must not speak of all."
    values = [[None if i == j or (min(i, j), max(i, j)) in missing else .001 for j in range(4)]
              for i in range(4)]
    said = ' '.join(pages._read_swaps(made_up(permutation=pairs(values),
                                              skip_loss_increase=layers([1.] * 4))))
    assert (f'{swapped} pairs' in said and ('all 6 pairs' in said) == (swapped == 6)
            and ('6 in all' in said) == (swapped < 6))


def test_the_page_begins_with_what_can_go():
    """Blocks from the cheapest on, each with what its interval allows; without intervals by the values, and
    that is said."""
    cost, streams = [.5, -.3, .01, .2], [1.] * 5
    sure, bare = (made_up(skip_loss_increase=c, variance_mean=streams) for c in (layers(cost, .1), cost))
    for scores, kinds in ((sure, ['better without it', 'no cost shown', 'costs something',
                                  'costs something']),
                                  (bare, ['better without it'] + 3 * ['costs something'])):
        explorer = _skip_explorer(scores)
        rows = explorer.data['spec']['concat'][0]['layer'][0]['data']['values']
        assert [r['block'] for r in rows] == [2, 3, 4, 1] and [r['verdict'] for r in rows] == kinds
        assert ('by the values alone' in explorer.html) == (scores is bare)
    page = score_page(sure, about=ABOUT)
    assert page.index('id="sce-skips"') < page.index('class="facts"') < page.index('id="sce-scores"')
    assert (_skip_explorer(made_up(variance_mean=streams)) is None
            and 'id="sce-skips"' not in score_page(made_up(variance_mean=streams)))
    sure['scalars']['influence_rank_agreement'] = dict(value=.8, low=None, high=None)
    [line] = said(sure, None, 'influence', '0.8')
    assert line in unescape(score_page(sure)) and not said(bare, None, 'influence')


def test_sublayers_and_spans_are_read_and_drawn():
    angles = [[.3, .1, .2], [.35, .25, None], [.4, None, None]]
    scores = made_up(variance_mean=[1.] * 4, skip_loss_increase=layers([.5, .4, .3], .1),
                     angular_distance=pairs(angles, .01),
                     attention_loss_increase=layers([.5, .05, -.3], .1),
                     feed_forward_loss_increase=layers([.5, .4, .3], .1))
    [line], [dear], [spans] = (said(scores, None, *parts)
                               for parts in (('attention alone', 'no cost'),
                                             ('feed-forward layer', 'every block'), ('spans',)))
    assert 'blocks 2 and 3' in line and '2 blocks from block 2 (0.25)' in spans and dear
    tables = {t['title']: t['view'] for t in _score_explorer(scores).data['tables']}
    assert list(tables.values())[:4] == ['skip_loss_increase', 'attention_loss_increase',
                                         'feed_forward_loss_increase', 'angular_distance']
    bare = made_up(variance_mean=[1.] * 4, skip_loss_increase=[.5, .4, .3],
                   attention_loss_increase=[.5, .05, -.3])
    # nothing is sure without intervals
    assert not said(bare, None, 'attention alone') and not said(bare, None, 'spans')


# Two models on one page

def test_the_interval_of_a_difference_covers_it():
    "Two independent means, 2,000 times: about 95 % of the intervals hold the true difference."
    r, hits = random.Random(0), 0
    for _ in range(2000):
        a, b = (Estimate(x := r.gauss(mean, size), x - 1.96 * size, x + 1.96 * size)
                for mean, size in ((3., .2), (5., .5)))
        d = difference(a, b)
        hits += d.low < 2 < d.high
    assert .93 < hits / 2000 < .97
    # each end from the ends that it depends on
    skew = difference(Estimate(0., -1., 2.), Estimate(10., 6., 12.))
    assert (skew.value - skew.low, skew.high - skew.value) == (math.hypot(4, 2), math.hypot(2, 1))
    assert difference(Estimate(None), Estimate(1., 0., 2.)) == Estimate(None)


def test_a_comparison_holds_both_and_the_difference():
    a, b = random_scores(6, 1), random_scores(6, 2)
    cost = [s['arrays']['skip_loss_increase'] for s in (a, b)]
    with open_page(comparison_page(a, b, ['one', 'two']), 1200) as page: tables = shown(page)
    assert [[r[0], r[1], float(r[2])]
            for r in tables['Skipped blocks']] == [[f'{x}: {n}', str(l), pytest.approx(v, rel=1e-3)]
                                                   for x, n, c in
                                                                            (('A', 'one', cost[0]),
                                                                             ('B', 'two', cost[1]))
                                                                             for l, v in enumerate(c, 1)]
    assert [float(r[1]) for r in tables['Skipped blocks, B minus A']] == pytest.approx(
        [y - x for x, y in zip(*cost)], rel=1e-3)
    frame = comparison_frame(a, b)
    row = frame[(frame.score == 'skip_loss_increase') & (frame.block == 3)].iloc[0]
    assert (row.a, row.b, row.difference) == (cost[0][2], cost[1][2], pytest.approx(cost[1][2] - cost[0][2]))
    assert (row.high - row.difference == pytest.approx(.01 * 2 ** .5, rel=1e-6)
            and len(frame[(frame.score == 'permutation') & frame.other.notna()]) == 30)
    larger = [l for l, (x, y) in enumerate(zip(*cost), 1) if y - x > .0142]
    line = next(line for line in read_comparison(a, b) if line.startswith('Skipped'))
    assert f"larger in B at {pages.names(larger)}" in line


@pytest.mark.parametrize('L', [1, 4])
def test_models_of_different_depth_share_axes_and_no_block(L):
    a, b = random_scores(30, 1), random_scores(L, 2)
    with open_page(comparison_page(a, b, ['deep', 'shallow']), 375, 'dark') as page:
        tables = shown(page)
        assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')
    assert len(tables['Skipped blocks']) == 30 + L and not any('minus' in title for title in tables)
    assert ({*comparison_frame(a, b)['block'].isna()} == {True}
            and any('30 blocks' in line for line in mismatches(a, b)))


def test_what_stands_in_the_way_of_a_comparison_is_said():
    a = random_scores(4) | dict(corpus='one')
    assert mismatches(a, a) == []
    assert (any('text' in line for line in mismatches(a, a | dict(corpus='two')))
            and any('not known' in line for line in mismatches(a, random_scores(4))))
    assert any('T 128 and 64' in line
               for line in mismatches(a, a | dict(settings=a['settings'] | dict(T=64))))
    assert any('bfloat16' in line for line in mismatches(a, a | dict(config=dict(dtype='bfloat16'))))
    bare = random_scores(4, 1, intervals=False) | dict(corpus='one')
    # no block differs for certain without intervals
    assert not any(' in B at' in line for line in read_comparison(bare, a))


@pytest.mark.parametrize('content', ['no JSON', '[1]', '{}', '{"scalars": {}}',
                                     '{"scalars": {"loss": 3}, "arrays": {"variance_mean": [1, 2]}}',
                                     '{"scalars": {}, "arrays": {"variance_mean": [1, 2], "causal": [1]}}',
                                     '{"scalars": {}, "arrays": {}}', '{"scores": {}}',
                                     '{"scalars": {}, "arrays": {"skip_loss_increase": [1, 2], '
                                     '"block_influence": [1]}}',
                                     '{"scalars": {}, "arrays": {"skip_loss_increase": [1, 2], '
                                     '"variance_median": [1, 2]}}',
                                     '{"scalars": {}, "arrays": {"skip_loss_increase": [1, 2], "entropy": '
                                     '[1, "x"]}}'])
def test_a_file_of_something_else_is_no_file_of_scores(tmp_path, content):
    path = tmp_path / 'other.json'
    path.write_text(content, encoding='utf-8')
    with pytest.raises(Damaged, match='other.json'): read_scores(path)


def test_files_and_records_are_read_and_named(tmp_path, root, scores):
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'scores.json').write_text(json.dumps(scores), encoding='utf-8')
    files = [tmp_path / name / 'scores.json' for name in ('a', 'b')]
    assert (read_scores(files[0]) == scores and file_names(files) == ['a', 'b']
            and len({*file_names([files[0], tmp_path / 'b' / 'a.json'])}) == 2)
    record = sorted((root / 'results' / 'laptop').glob('L4_*seed0-*.json'))[0]
    assert (read_scores(record)['corpus']
            and comparison_page(read_scores(record),
                                read_scores(record)) == comparison_page(*[read_scores(record)] * 2))
