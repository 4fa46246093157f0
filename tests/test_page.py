"The page of scores: what it says, that its tables hold the scores, and that it works in a browser without a mouse or a network."
import copy
import json
import math
import random
import re
from html.parser import HTMLParser

import pytest

from browser import INSTALL, open_page
from sparsecod import page as pages
from sparsecod.page import NEAR_IDENTITY, SMALL_SWAP, layers, made_up, pairs, plain_reading, score_page, score_table, write_page

VOID = {'meta', 'link', 'input', 'br', 'img'}


class Page(HTMLParser):
    "Tags, tables and text of a page; a tag that is not closed in order is an error."
    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.tables, self.items, self.into = [], [], [], [], None
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID: self.open.append(tag)
        if tag == 'table': self.tables.append([])
        if tag == 'tr': self.tables[-1].append([])
        if tag in ('td', 'th'): self.tables[-1][-1].append('')
        if tag == 'li': self.items.append('')
        if tag in ('td', 'th', 'li'): self.into = tag

    def handle_startendtag(self, tag, attributes): self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f'</{tag}> closes nothing'
        if tag == self.into or tag == 'small': self.into = None

    def handle_data(self, data):
        if 'small' in self.open: return
        if self.into in ('td', 'th'): self.tables[-1][-1][-1] += data
        if self.into == 'li': self.items[-1] += data


def random_scores(L: int, seed: int = 0, intervals: bool = True) -> dict:
    "Scores of the right shape, with no meaning."
    r = random.Random(seed)
    array = lambda n, low, high: [r.uniform(low, high) for _ in range(n)]
    by_layer = dict(usefulness_ratio=array(L, .99, 1.3), skip_loss_increase=array(L, -.1, 2), linear_loss_increase=array(L, -.1, .5), jacobian_per_token=array(L, .001, .1),
                    variance_mean=array(L + 1, .01, 30), variance_median=array(L + 1, .01, 20), variance_without_first=array(L + 1, .01, 20))
    if intervals: by_layer = {k: layers(v, .01) if k != 'variance_median' else v for k, v in by_layer.items()}
    P = [[None] * L for _ in range(L)]
    for i in range(L):
        for j in range(i): P[i][j] = P[j][i] = 10 ** r.uniform(-4, 0)
    by_pair = dict(permutation=P, causal=[[r.random() if l > s else None for l in range(L)] for s in range(L)])
    if intervals: by_pair = {name: pairs(values, .01) for name, values in by_pair.items()}
    found = made_up(**by_layer, **by_pair, fit_rank=[64] * L)
    found['scalars'] |= {name: dict(value=r.random(), low=.1, high=1.2) for name in pages.MEANING if name != 'loss'}
    return found


ABOUT = dict(name='A model', d_model=64, vocab_size=2048, n_parameters=1234567, text='some text')


@pytest.fixture(scope='module')
def record(root):
    return json.loads(sorted((root / 'results' / 'laptop').glob('L16_D64_T128_seed0-*.json'))[0].read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def scores():
    return random_scores(8)


@pytest.fixture(scope='module')
def text(scores):
    return score_page(scores, about=ABOUT)


# The page as text

@pytest.mark.parametrize('L', [1, 2, 3, 16, 32, 64])
@pytest.mark.parametrize('intervals', [True, False])
def test_a_page_is_well_formed_and_asks_nobody(L, intervals):
    text = score_page(random_scores(L, intervals=intervals), about=ABOUT)
    page = Page(text)
    ids = [a['id'] for _, a in page.tags if 'id' in a]
    assert len(ids) == len(set(ids)) and all(i.startswith('scp-') for i in ids)
    referred = {i for _, a in page.tags for key in ('for', 'aria-labelledby', 'aria-describedby') for i in (a.get(key) or '').split()}
    assert referred <= set(ids)
    assert not [a for _, a in page.tags if 'src' in a or a.get('href', 'data:,') != 'data:,']
    assert not re.search(r'@import|url\(|fetch\(|XMLHttpRequest|import\(', text) and set(re.findall(r'https?://[^\s\'"<]+', text)) <= {'http://www.w3.org/2000/svg'}
    assert all(a.get('aria-label') or a.get('aria-hidden') for tag, a in page.tags if tag == 'svg')
    assert text.count('<figure') == text.count('<details>') == (4 if L == 1 else 6)
    if L <= 32: assert len(text.encode()) < 300_000


def test_the_same_scores_give_the_same_page(scores, text):
    assert score_page(copy.deepcopy(scores), about=dict(ABOUT)) == text


def table_after(page: Page, first: str) -> list:
    "The table whose first cell is this."
    return next(t for t in page.tables if t and t[0][0] == first)


def test_tables_hold_the_scores(scores, text):
    page, arrays = Page(text), scores['arrays']
    number = lambda x: '–' if x is None else f'{x:.6g}'
    causal, swaps = table_after(page, 's \\ l'), table_after(page, 'i \\ j')
    for table, name in ((causal, 'causal'), (swaps, 'permutation')):
        assert [row[1:] for row in table[1:]] == [[number(x) for x in row] for row in arrays[name]]
        assert [row[0] for row in table[1:]] == table[0][1:] == [str(l) for l in range(1, 9)]
    bars = [t for t in page.tables if t and t[0][0] == 'block']
    for table, name in zip(bars, ('usefulness_ratio', 'skip_loss_increase', 'jacobian_per_token'), strict=True):
        ends = scores['intervals'][name]
        assert [row[1:] for row in table[1:]] == [[number(x) for x in three] for three in zip(arrays[name], ends['low'], ends['high'])]
    streams = table_after(page, 'stream')
    assert len(streams) == 10 and streams[1][0] == '0' and streams[9][0] == '8'
    assert [row[1] for row in streams[1:]] == [number(x) for x in arrays['variance_mean']]
    assert [row[4] for row in streams[1:]] == [number(x) for x in arrays['variance_median']]
    scalars = {row[0]: row[1:] for row in table_after(page, 'score')[1:]}
    for name, (title, _) in pages.MEANING.items():
        if name in scores['scalars']: assert scalars[title][0] == number(scores['scalars'][name]['value'])
    assert len(scalars) == len(scores['scalars'])
    assert page.items == plain_reading(scores, ABOUT)


def test_a_bar_and_a_cell_have_the_size_and_colour_of_their_number():
    found = made_up(skip_loss_increase=[1., .5, .25], causal=[[None, 0., 1.], [None, None, .5], [None] * 3])
    found['arrays']['variance_mean'] = [1, 1, 1, 1]
    text = score_page(found)
    bars = re.search(r'data-title="Skipped blocks".*?</svg>', text)[0]
    heights = [float(x) for x in re.findall(r'<rect class="s0"[^>]*height="([\d.]+)"', bars)]
    assert heights[1] / heights[0] == pytest.approx(.5, abs=.01) and heights[2] / heights[0] == pytest.approx(.25, abs=.01)
    cells = re.findall(r'class="k(\d+)" d="M(\d) (\d)h1', re.search(r'data-title="Causal.*?</svg>', text)[0])
    assert cells == [('0', '1', '0'), ('31', '2', '0'), ('16', '2', '1')]


HOSTILE = '</script><script>alert(1)</script><img src=x onerror=alert(2)>"\'&`${1}'

def test_text_from_outside_cannot_break_out(scores):
    evil = copy.deepcopy(scores)
    evil['scalars'][HOSTILE] = dict(value=1., low=0., high=2.)
    text = score_page(evil, title=HOSTILE, about={HOSTILE: HOSTILE, 'text': HOSTILE}, sparsity=dict(scalars={HOSTILE: 1.}, arrays={}))
    page = Page(text)
    assert text.count('<script') == text.count('</script>') == 1 and not [1 for tag, a in page.tags if tag == 'img' or 'onerror' in a]
    with open_page(text) as shown:
        assert HOSTILE in shown.locator('h1').inner_text() and HOSTILE in shown.title()


def test_a_frame_holds_the_page(text):
    assert 'Framed(' in repr(pages.Framed(text))
    class Frame(HTMLParser):
        def handle_starttag(self, tag, attributes): self.held = dict(attributes)
    frame = Frame()
    frame.feed(pages.Framed(text)._repr_html_())
    assert frame.held['srcdoc'] == text and frame.held['title']


def test_a_file_is_written(tmp_path, scores, text):
    path = write_page(tmp_path / 'new' / 'page.html', scores, about=ABOUT)
    assert path.read_text(encoding='utf-8') == text


# Scores with holes, and of any size

@pytest.mark.parametrize('hole', [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('L', [1, 3])
def test_nothing_is_known(hole, L):
    gone = random_scores(L)
    lost = lambda x: {k: lost(v) for k, v in x.items()} if isinstance(x, dict) else [lost(v) for v in x] if isinstance(x, list) else hole
    gone |= {part: lost(gone[part]) for part in ('scalars', 'arrays', 'intervals')}
    text = score_page(gone)
    assert 'nan' not in re.sub(r'<script>.*', '', text, flags=re.S).lower() and '>inf' not in text and 'Infinity' not in text
    assert Page(text).items == plain_reading(gone) and 'not known' in ' '.join(plain_reading(gone))
    assert 'nan' not in score_table(gone, 80)


def test_single_holes_leave_the_rest():
    holes = random_scores(4)
    for name in ('usefulness_ratio', 'variance_mean', 'skip_loss_increase'): holes['arrays'][name][1] = None
    holes['arrays']['permutation'][0][1] = holes['arrays']['permutation'][1][0] = math.nan
    page = Page(score_page(holes))
    assert table_after(page, 'i \\ j')[1][1:3] == ['–', '–']
    assert table_after(page, 'stream')[2][1] == '–' and table_after(page, 'stream')[1][1] != '–'


@pytest.mark.parametrize('size', [1e-300, 1e-12, 1e12, 1e200])
def test_numbers_of_any_size(size):
    found = random_scores(4, intervals=False)
    for name, x in found['arrays'].items(): found['arrays'][name] = [[v and v * size for v in row] if isinstance(row, list) else row * size for row in x]
    text = score_page(found, about=ABOUT)
    Page(text)
    for d in re.findall(r' (?:x|y|width|height|d)="([^"]*)"', text): assert not re.search('nan|inf|e[+-]', d), d


def test_without_layers_the_error_names_what_is_there():
    with pytest.raises(ValueError, match=r"holds \['fit_rank'\]; it must hold variance_mean"): score_page(dict(scalars={}, arrays=dict(fit_rank=[1]), settings={}))


def test_a_record_without_scores_is_refused():
    with pytest.raises(ValueError, match="status='diverged'"): pages.record_page(dict(name='a', status='diverged', scores=None))


# What is said

def said(scores, about=None, *parts): return [line for line in plain_reading(scores, about) if all(p in line for p in parts)]


def test_nearly_linear_needs_the_whole_interval_below_the_threshold():
    at = lambda ratio, width: plain_reading(made_up(variance_mean=[1, 1], usefulness_ratio=layers([ratio], width)))
    line = lambda found: [x.split(':')[0] for x in found if x.startswith(('Nearly', 'Not nearly', 'Undecided: block'))]
    assert line(at(1.05, .04)) == ['Nearly linear by this measure'] and line(at(1.05, .06)) == ['Undecided']
    assert line(at(1.2, .05)) == ['Not nearly linear by this measure'] and line(at(1.2, .15)) == ['Undecided']


def test_the_words_of_the_page_are_explained(text):
    page, reading = Page(text), text[text.index('In plain words'):]
    assert reading.index('class="words"') < reading.index('class="reading"')
    for word in ('block', 'update', 'affine map', 'nats'): assert f'<dt>{word}</dt>' in reading


def test_tables_of_pairs_hold_their_intervals(scores, text):
    small = re.findall(r'<td>([^<]*)<small>([^<]*)</small></td>', text)
    ends, E = scores['intervals']['causal'], scores['arrays']['causal']
    want = [(f'{E[i][j]:.6g}', f"{ends['low'][i][j]:.3g} to {ends['high'][i][j]:.3g}") for i in range(8) for j in range(i + 1, 8)]
    assert small[:len(want)] == want and len(small) == 28 + 56


def test_the_threshold_is_that_of_the_settings():
    scores = made_up(variance_mean=[1, 1], usefulness_ratio=layers([1.05], .01))
    scores['settings']['threshold'] = 1.02
    assert said(scores, None, 'Not nearly linear by this measure: block 1', '1.02 times')


def test_values_without_intervals_are_called_that():
    scores = made_up(variance_mean=[1, 2, 3], usefulness_ratio=[1.01, 1.5], skip_loss_increase=[.1, -.1], jacobian_per_token=[.001, .5])
    for line in said(scores, ABOUT, 'block'):
        if line.startswith(('Nearly', 'Not', 'The loss is lower', 'Leaving', 'Near')): assert '(by the values alone)' in line, line
    assert said(scores, None, 'how sure it is cannot be said')
    assert not said(scores, None, 'No cost shown') and not said(scores, None, 'ends of the 95 %')


def test_an_interval_from_one_sequence_is_none():
    scores = made_up(n_sequences=1, variance_mean=[1, 2, 3], usefulness_ratio=layers([1.01, 1.5]), skip_loss_increase=layers([.1, -.1]))
    assert not said(scores, None, 'ends of the 95 %') and said(scores, None, 'One sequence was scored')


@pytest.mark.parametrize('about, settings', [(dict(d_model=64), {}), (dict(width='64'), {}), (None, dict(undetermined_fits=[1]))])
def test_an_undetermined_fit_shows_nothing_about_linearity(about, settings):
    scores = made_up(variance_mean=[1, 2, 3], usefulness_ratio=layers([2., 1.5], .01), fit_rank=[63, 64])
    scores['settings'] |= settings
    assert said(scores, about, 'Not nearly linear by this measure: block 2.') and said(scores, about, 'do not determine the affine map of block 1:')
    determined = copy.deepcopy(scores)
    determined['arrays']['fit_rank'], determined['settings']['undetermined_fits'] = [64, 64], []
    assert said(determined, about, 'Not nearly linear by this measure: blocks 1 and 2.') and not said(determined, about, 'do not determine')


def test_no_useful_block_is_explained():
    scores = made_up(loss=4., variance_mean=[1, 2, 3], usefulness_ratio=layers([1.05, 1.02], .01), linear_loss_increase=layers([.2, .08], .04))
    line, = said(scores, None, 'no block counts as useful')
    assert 'allows 0.4 nats' in line and '(block 1) takes 0.2.' in line
    scores['arrays']['usefulness_ratio'], scores['intervals']['usefulness_ratio'] = layers([1.5, 1.02], .01)
    assert not said(scores, None, 'no block counts as useful')


def test_no_cost_shown_says_what_cannot_be_excluded():
    scores = made_up(variance_mean=[1, 2, 3, 4], skip_loss_increase=layers([.5, .02, -.3], .1), linear_loss_increase=layers([.5, .02, -.3], .1))
    assert said(scores, None, 'No cost shown for leaving out block 2:', 'up to 0.12 nats') and said(scores, None, 'The loss is lower without: block 3 ')
    assert said(scores, None, 'Leaving out block 1 raises the loss (lower ends') and said(scores, None, 'does better than block 3')
    assert said(scores, None, 'No cost shown for an affine map in the place of block 2:')


def test_interchangeable_neighbours():
    P = [[None, SMALL_SWAP * .9, .5], [SMALL_SWAP * .9, None, SMALL_SWAP * 1.1], [.5, SMALL_SWAP * 1.1, None]]
    scores = made_up(variance_mean=[1] * 4, permutation=pairs(P, SMALL_SWAP * .05))
    assert said(scores, None, 'Interchangeable neighbours: 1–2.', 'upper ends') and said(scores, None, 'by more than 1 % of it: 2–3 (lower ends') and said(scores, None, 'For 1 of all 3 pairs of blocks')
    wide = made_up(variance_mean=[1] * 4, permutation=pairs(P, SMALL_SWAP * .2))
    assert said(wide, None, 'Undecided, interchangeable or not: 1–2 and 2–3.') and not said(wide, None, 'Interchangeable') and said(wide, None, 'For 0 of all 3 pairs')
    bare = made_up(variance_mean=[1] * 4, permutation=P)
    assert not said(bare, None, 'Interchangeable') and said(bare, None, 'less than 1 % of it: 1–2, one pair at a time (by the values alone)', 'cannot be said without intervals of pairs')
    assert said(bare, None, 'of it or more: 2–3 (by the values alone)') and said(bare, None, 'For 1 of all 3 pairs of blocks', 'by the values alone')
    one = made_up(n_sequences=1, variance_mean=[1] * 4, permutation=pairs(P, SMALL_SWAP * .05))
    assert not said(one, None, 'Interchangeable')                                                      # one sequence gives no interval
    assert pages.pairs_text([1, 3, 4, 5]) == '1–2 and each pair from 3–4 to 5–6'
    assert said(made_up(variance_mean=[1, 1]), None, 'One block has no pairs') and said(made_up(variance_mean=[1, 1, 1]), None, 'Swaps: what they cost is not known')


@pytest.mark.parametrize('rest, expected', [(.5, 'is dominated by'), (8.7, 'is not dominated by'), (4.5, 'may or may not')])
def test_position_0_dominates_or_not(rest, expected):
    scores = made_up(variance_mean=[1, 2, 9], T=128)
    scores['scalars'] |= dict(final_variance=dict(value=9, low=8.5, high=9.5), final_variance_without_first=dict(value=rest, low=.9 * rest, high=1.1 * rest))
    assert said(scores, None, expected, 'position 0')


@pytest.mark.parametrize('values, width, expected', [([1, 2, 4], .1, ': it grows'), ([1, 4, 2], .1, ': it falls'), ([1, 2, 2.1], .3, 'no change is shown'), ([1, 2, 4], None, '(by the values alone)')])
def test_variance_grows_where_intervals_do_not_overlap(values, width, expected):
    scores = made_up(variance_mean=values if width is None else layers(values, width))
    assert said(scores, None, 'From block 1 to block 2', expected)


def test_near_identity_depends_on_width_and_probes():
    limit = NEAR_IDENTITY / 8   # for a width of 64
    scores = made_up(variance_mean=[1] * 4, jacobian_per_token=layers([.8 * limit, limit, 1.2 * limit], .1 * limit))
    assert said(scores, ABOUT, 'Near the identity: block 1.') and said(scores, ABOUT, 'Not near the identity in this sense: block 3 ') and said(scores, ABOUT, 'near the identity or not: block 2,')
    assert said(scores, None, 'width of the model was not given')
    scores['arrays']['jacobian_per_token_error'] = [.2 * limit] * 3
    assert said(scores, ABOUT, 'near the identity or not: blocks 1 to 3')


@pytest.mark.parametrize('loss, expected', [(9., 'no better than'), (7.6, 'cannot be told from'), (4., 'below guessing')])
def test_a_loss_is_compared_with_guessing(loss, expected):
    assert said(made_up(loss=loss, variance_mean=[1, 1]), ABOUT, expected)   # log 2048 = 7.62
    assert said(made_up(loss=loss, variance_mean=[1, 1]), dict(vocabulary='2,048'), expected)


def test_costs_are_read_without_ratios_and_fits_have_a_caution():
    scores = made_up(variance_mean=[1, 2], linear_loss_increase=layers([.02], .1))
    assert said(scores, None, 'nothing can be said about which blocks are nearly linear') and said(scores, None, 'No cost shown for an affine map in the place of block 1')
    assert not said(scores, None, 'fitted on 64') and said(made_up(variance_mean=[1, 2], usefulness_ratio=[1.]), None, 'fitted on 64')


def test_few_sequences_are_a_caution():
    assert said(made_up(n_sequences=5, variance_mean=[1, 1]), None, 'fewer than 10') and not said(made_up(variance_mean=[1, 1]), None, 'fewer than 10')
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
        wanted = [scores['arrays'][name][l - 1 if name[0] != 'v' else l] for name in pages.COLUMNS]
        assert int(row[0]) == l and [float(x) for x in row[1:]] == pytest.approx(wanted, rel=1e-3)


# In a browser

def luminance(colour: str) -> float:
    parts = [int(x) / 255 for x in re.findall(r'\d+', colour)[:3]]
    return sum(w * (c / 12.92 if c <= .03928 else ((c + .055) / 1.055) ** 2.4) for w, c in zip((.2126, .7152, .0722), parts))

def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + .05) / (low + .05)


@pytest.mark.parametrize('theme', ['light', 'dark'])
@pytest.mark.parametrize('width', [375, 1200])
def test_a_page_reads_well(record, width, theme):
    text = score_page(**pages.record_page(record))
    with open_page(text, width, theme) as page:
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate('document.documentElement.scrollWidth <= innerWidth'), 'it scrolls sideways'
        ground = page.evaluate('getComputedStyle(document.body).backgroundColor')
        assert (luminance(ground) < .2) == (theme == 'dark')
        inks = page.evaluate('''[...document.querySelectorAll('h1, h2, p, li, dt, dd, td, th, small, summary, output, label, figure svg text')].map(e => {
            let on = e; while (getComputedStyle(on).backgroundColor == 'rgba(0, 0, 0, 0)') on = on.parentElement
            return [e.tagName == 'text' ? getComputedStyle(e).fill : getComputedStyle(e).color, getComputedStyle(on).backgroundColor] })''')
        assert len(inks) > 500 and min(contrast(a, b) for a, b in set(map(tuple, inks))) >= 4.5
        assert all(contrast(page.evaluate(f"getComputedStyle(document.querySelector('.s{k}')).fill"), ground) >= 3 for k in (0, 1))
        small = page.evaluate('''[...document.querySelectorAll('.pic text')].map(e => Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b) * parseFloat(getComputedStyle(e).fontSize))''')
        assert min(small) > 9, 'letters too small to read'
        clipped = page.evaluate('''[...document.querySelectorAll('.pic text')].filter(e => { const a = e.getBoundingClientRect(), b = e.ownerSVGElement.getBoundingClientRect()
            return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1 }).map(e => e.textContent)''')
        assert clipped == []
        overlaps = page.evaluate('''[...document.querySelectorAll('.pic svg')].flatMap(svg => { const t = [...svg.querySelectorAll('text:not([transform])')].map(e => [e.textContent, e.getBoundingClientRect()])
            return t.flatMap(([x, a], i) => t.slice(i + 1).filter(([_, b]) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3).map(([y]) => x + ' on ' + y)) })''')
        assert overlaps == []


@pytest.mark.parametrize('L', [1, 64])
def test_shallow_and_deep_pages_open(L):
    with open_page(score_page(random_scores(L), about=ABOUT), 375, 'dark') as page:
        assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')
        page.locator('#scp-block').focus()
        page.keyboard.press('End')
        assert page.locator('#scp-block-says').inner_text().startswith(f'block {L}')


def marked(page) -> dict:
    "For each picture the blocks that are highlighted, from the place of the highlights."
    return page.evaluate('''Object.fromEntries([...document.querySelectorAll('figure')].map(f => { const d = f.querySelector('.pic svg').dataset
        const at = [...f.querySelectorAll('.marks rect:not(.at):not(.in)')].filter(r => +r.getAttribute('y') == d.y && +r.getAttribute('height') == d.high)
        return [f.dataset.title, at.map(r => Math.round((r.getAttribute('x') - d.x) / d.step) + 1).sort((a, b) => a - b)] }))''')


def test_a_cell_says_what_python_has(scores, text):
    with open_page(text, 1200) as page:
        for name, title in (('causal', 'Causal score of pairs'), ('permutation', 'Swaps of pairs')):
            figure = page.locator(f'figure[data-title="{title}"]')
            figure.scroll_into_view_if_needed()
            for i, j in ((2, 5), (1, 8), (7, 8), (5, 2)):
                x, y = figure.locator('.pic svg').evaluate('''(s, [i, j]) => { const d = s.dataset, b = s.getBoundingClientRect(), k = b.width / s.viewBox.baseVal.width
                    return [b.left + k * (+d.x + (j - .5) * d.step), b.top + k * (+d.y + (i - .5) * d.step)] }''', [i, j])
                page.mouse.move(x, y)
                value, says = scores['arrays'][name][i - 1][j - 1], figure.locator('.says').inner_text()
                assert f'{value:.6g}' in says if value is not None else 'not defined' in says
                if value is not None:
                    low, high = (scores['intervals'][name][end][i - 1][j - 1] for end in ('low', 'high'))
                    assert says.endswith(f' 95 % interval: {low:.3g} to {high:.3g}.')
                assert all(blocks == sorted((i, j)) for blocks in marked(page).values())


def test_all_works_from_the_keyboard(scores, text):
    with open_page(text, 1200) as page:
        page.locator('#scp-block').focus()
        page.keyboard.press('ArrowRight')
        page.keyboard.press('ArrowRight')
        page.keyboard.press('ArrowRight')
        assert set(map(tuple, marked(page).values())) == {(3,)} and len(marked(page)) == 6
        told = page.locator('#scp-block-says').inner_text()
        assert all(f"{scores['arrays'][name][2]:.6g}" in told for name in pages.BARS)
        assert page.locator('tr.on th').all_text_contents() == ['3'] * 6
        page.keyboard.press('Tab')                                                    # the first heat map
        figure = page.locator('figure').first
        assert figure.locator('.pic').evaluate('e => e == document.activeElement') and 'Block 1 skipped' in figure.locator('.says').inner_text()
        for key in ('ArrowRight', 'ArrowRight', 'ArrowDown'): page.keyboard.press(key)
        assert figure.locator('.says').inner_text().startswith(f"Block 2 skipped: the update of block 4 changes by {scores['arrays']['causal'][1][3]:.6g} of its size. 95 %")
        assert set(map(tuple, marked(page).values())) == {(2, 4)}
        page.keyboard.press('End')
        page.keyboard.press('ArrowRight')                                             # no further than the last block
        assert f"{scores['arrays']['causal'][1][7]:.6g}" in figure.locator('.says').inner_text()
        bars = page.locator('figure[data-title="Skipped blocks"]')
        bars.locator('.pic').focus()
        page.keyboard.press('End')
        assert f"nats a token {scores['arrays']['skip_loss_increase'][7]:.6g}" in bars.locator('.says').inner_text()
        stream = page.locator('figure[data-kind=lines]')
        stream.locator('.pic').focus()
        page.keyboard.press('Home')
        assert stream.locator('.says').inner_text().startswith(f"Stream 0: mean {scores['arrays']['variance_mean'][0]:.6g}") and set(map(tuple, marked(page).values())) == {()}
        page.keyboard.press('Escape')
        assert page.locator('#scp-block-says').inner_text() == 'none'


def test_in_a_frame_the_site_decides_about_the_theme(text):
    frame = pages.Framed(text)._repr_html_()
    with open_page(f'<!DOCTYPE html><html><head><link rel="icon" href="data:,"></head><body class="quarto-dark">{frame}</body></html>', 900, 'light') as page:
        inner = page.frame_locator('iframe').locator('body')
        ground = lambda: luminance(inner.evaluate('e => getComputedStyle(e).backgroundColor'))
        assert ground() < .2
        page.evaluate("document.body.className = 'quarto-light'")
        page.wait_for_timeout(100)
        assert ground() > .8


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
