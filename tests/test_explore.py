"Figures and reports: what they draw, what they refuse, and that a report needs nothing but itself."
import re
from copy import deepcopy
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest

from sparsecod import explore
from sparsecod.studies import CLAIMS, PRESETS, ledger
from synthetic import depth_study, record


@pytest.fixture(scope='module')
def records():
    return depth_study(seeds=3)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')


DRAW = {
    **{f'variance {k}': lambda r, ax, k=k: explore.plot_variance(r, k, ax) for k in explore.STATISTICS},
    **{f'final variance {k}': lambda r, ax, k=k: explore.plot_final_variance(r, k, ax) for k in explore.STATISTICS},
    **{f'updates {k}': lambda r, ax, k=k: explore.plot_updates(r, k, ax) for k in explore.UPDATES},
    **{f'jacobian {k}': lambda r, ax, k=k: explore.plot_jacobian(r, k, ax) for k in explore.JACOBIANS},
    **{f'score {k}': lambda r, ax, k=k: explore.plot_score(r, k, ax) for k in ('causal', 'usefulness', 'final_variance', 'val_loss')},
    'loss': lambda r, ax: explore.plot_loss(r, ax),
    'distance': lambda r, ax: explore.plot_distance(r, 'permutation', ax),
    'parts': lambda r, ax: explore.plot_parts(r, 'causal', ax),
    'thresholds': lambda r, ax: explore.plot_thresholds(r, ax),
}
every_plot = pytest.mark.parametrize('draw', DRAW.values(), ids=DRAW)


# ---- what is drawn

@every_plot
def test_draws_on_the_axes_it_is_given(draw, records):
    fig, ax = plt.subplots()
    assert draw(records, ax) is ax
    assert ax.get_xlabel() and ax.get_ylabel() and ax.get_title() and ax.get_lines()
    assert plt.get_fignums() == [fig.number]


@every_plot
def test_partial_records(draw):
    "A missing depth, a diverged run, a single seed, nothing but diverged runs: every figure draws what there is."
    draw([record(2), record(16), record(16, 1, diverged=True)], None)
    draw([record(4)], None)
    ax = draw([record(4, diverged=True)], None)
    if not ax.get_lines(): assert any(t.get_text() in ('no finished run', 'nothing to draw') for t in ax.texts)


@pytest.mark.parametrize('draw', list(DRAW.values())[::3], ids=list(DRAW)[::3])
def test_fonts_are_large_enough(draw, records):
    ax = draw(records, None)
    ax.figure.canvas.draw()
    texts = [t for t in ax.figure.findobj(plt.Text) if t.get_visible() and t.get_text().strip()]
    assert min(t.get_fontsize() for t in texts) >= 9


@pytest.mark.parametrize('wrong', [lambda r: explore.plot_variance(r, 'mode'), lambda r: explore.plot_updates(r, 'norm'),
                                   lambda r: explore.plot_jacobian(r, 'mean'), lambda r: explore.plot_pairs(r[:1], 'linear')])
def test_unknown_names_are_refused(wrong, records):
    with pytest.raises(ValueError, match='must be one of'): wrong(records)


def test_style_leaves_other_settings_alone():
    before = dict(plt.rcParams)
    with explore.use_style(): assert plt.rcParams['font.size'] == explore.STYLE['font.size']
    assert dict(plt.rcParams) == before
    with pytest.raises(RuntimeError):
        with explore.use_style(): raise RuntimeError
    assert dict(plt.rcParams) == before


def contrast(color) -> float:
    "Contrast ratio against white, by the definition of WCAG 2."
    c = np.asarray(color[:3])
    linear = np.where(c <= .03928, c / 12.92, ((c + .055) / 1.055) ** 2.4)
    return 1.05 / (linear @ [.2126, .7152, .0722] + .05)


def test_setting_colors_are_visible_and_ordered():
    for n in range(1, 9):
        contrasts = [contrast(c) for c in explore.setting_colors(list(range(n))).values()]
        assert contrasts == sorted(contrasts) and contrasts[0] > 2.4, contrasts


def test_a_setting_keeps_its_color_when_a_run_diverges():
    whole = [record(L) for L in (2, 4, 8)]
    fewer = [record(2), record(4, diverged=True), record(8)]
    color = lambda records: {line.get_label(): line.get_color() for line in explore.plot_variance(records).get_lines()}
    a, b = color(whole), color(fewer)
    assert set(b) == {'L = 2', 'L = 8'} and all(a[name] == b[name] for name in b)


def test_layers_are_numbered_from_the_embedding_and_blocks_from_one(records):
    for L, s in explore.layer_series(records, 'variance_mean').items(): assert s.x == list(range(L + 1))
    for L, s in explore.layer_series(records, 'causal_max').items(): assert s.x == list(range(1, L + 1))
    ax = explore.plot_pairs([record(16)], 'permutation')
    assert min(ax.get_xticks()) == 1 and max(ax.get_xticks()) == 16 and ax.yaxis_inverted()


def test_series_are_mean_and_range(records):
    s = explore.layer_series(records, 'jacobian_per_token')[4]
    lines = np.array([r['scores']['arrays']['jacobian_per_token'] for r in records if r['config']['model']['n_layers'] == 4])
    assert s.seeds == 3 and np.allclose(s.mean, lines.mean(0)) and np.allclose(s.low, lines.min(0)) and np.allclose(s.high, lines.max(0))


def test_curves_skip_what_was_not_measured():
    r = record(2, diverged=True)
    assert r['curve']['variance_mean'][-1] is None
    assert list(explore.curve(r, 'variance_mean')) == r['curve']['step'][:-1]


def test_pairs_are_averaged_over_seeds():
    group = [record(4, seed) for seed in range(2)]
    mean, (a, b) = explore.pair_means(group, 'causal'), [r['scores']['arrays']['causal'] for r in group]
    assert np.isclose(mean[0, 3], (a[0][3] + b[0][3]) / 2) and np.isnan(mean[3, 0]) and np.isnan(mean[1, 1])


def test_block_one_is_in_two_of_L_pairs():
    "Scores that are 1 with block 1 and 0 otherwise: the mean over all pairs is 2 / L, and the split sees through it."
    for L in (3, 4, 8, 16):
        scores = np.where(np.triu(np.ones((L, L)), 1), 0., np.nan)
        scores[0, 1:] = 1
        assert np.isclose(np.nanmean(scores), 2 / L)
        assert explore.split_pairs(scores) == {'with block 1': 1, 'without block 1': 0}
    two = explore.split_pairs(np.array([[np.nan, .5], [np.nan, np.nan]]))
    assert two['with block 1'] == .5 and np.isnan(two['without block 1'])
    assert list(explore.pair_parts([record(2), record(4)], 'causal')['without block 1']) == [4]


def test_a_study_of_another_field():
    runs = [record(4, seed, weight_decay=wd) for wd in (0., .1, 1.) for seed in (0, 1)]
    assert list(explore.by_setting(runs, 'train.weight_decay')) == [0., .1, 1.]
    assert explore.varied_field(runs) == 'train.weight_decay' and explore.varied_field([record(2), record(4)]) == explore.DEPTH
    ax = explore.plot_score(runs, 'causal', by='train.weight_decay')
    assert [t.get_text() for t in ax.get_xticklabels()] == ['0.0', '0.1', '1.0']


def test_an_interval_may_lie_beside_its_value():
    r = record(4)
    r['scores']['scalars']['permutation'] = dict(value=.1, low=.12, high=.2)
    explore.plot_score([r], 'permutation')
    explore.headline_figure([r])


# ---- what is refused

def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(records):
    mixed = [*records, record(4, 7, weight_decay=1.)]
    with pytest.raises(ValueError, match=r'L = 4 differ in train.weight_decay \(0.1, 1.0\)'): explore.plot_variance(mixed)
    other = deepcopy(records[:2])
    other[1]['provenance']['corpus_fingerprint'] = 'another'
    with pytest.raises(ValueError, match='differ in corpus'): explore.plot_loss(other)


@pytest.mark.parametrize('call', [explore.plot_variance, explore.plot_loss, explore.headline_figure, lambda r: explore.plot_score(r, 'causal'),
                                  lambda r: explore.write_report(r, 'never.html')])
def test_no_records(call):
    with pytest.raises(ValueError, match='no records to show: run a study first'): call([])


# ---- the paper's numbers

@pytest.mark.parametrize('claim', [c for c in CLAIMS if c.published and c.study == 'depth'], ids=lambda c: c.id)
def test_published_numbers_are_read_from_the_ledger(claim):
    found = explore.published(claim.id)
    assert len(found) == claim.published.count('=') and all(1 <= len(ys) <= 2 for ys in found.values())
    assert {f'paper-L{x:g}' for x in found} <= set(PRESETS)


def test_published_numbers_stay_in_their_own_axes():
    ax = explore.plot_published('causal')
    assert 'paper' in ax.get_title() and explore.plot_score(depth_study(1), 'causal').get_title().count('paper') == 0
    assert any(t.get_text() == 'not published' for t in explore.plot_published('skip_loss_increase').texts)


# ---- words and tables

def test_words_come_from_the_records(records):
    assert explore.runs_text(records) == '12 runs: L = 2, L = 4, L = 8, L = 16, 3 seeds each'
    assert explore.runs_text([record(2), record(4, diverged=True)]) == '2 runs: L = 2, L = 4, 0 to 1 seeds; 1 diverged'
    lines = explore.estimates_table(records, ['causal', 'val_loss']).splitlines()
    assert len(lines) == 6 and lines[0].startswith('| L |') and all(line.count('|') == 4 for line in lines)
    assert '0.259' in explore.published_table(['causal', 'permutation'])
    rows = ledger([], 'depth')
    assert all(explore.verdict_text(row).startswith(f"**{row['verdict'].capitalize()}**") for row in rows)


def test_usefulness_at_the_published_threshold_is_the_score(records):
    for r in records:
        share = explore.useful_share(r['scores']['arrays']['usefulness_ratio'], np.array([1.10]))
        assert np.isclose(share[0], r['scores']['scalars']['usefulness']['value'])


def test_results_folder(root, tmp_path):
    assert explore.results_folder(root / 'nbs' / 'reproduce') == explore.results_folder(root) == root / 'results'
    with pytest.raises(FileNotFoundError, match='not inside a clone'): explore.results_folder(tmp_path)


# ---- headline and report

def test_headline_is_saved_the_same_twice(records, tmp_path):
    for name in ('a.svg', 'b.svg', 'c.png'): explore.headline_figure(records, tmp_path / name)
    assert (tmp_path / 'a.svg').read_bytes() == (tmp_path / 'b.svg').read_bytes()
    assert (tmp_path / 'c.png').read_bytes().startswith(b'\x89PNG')
    with pytest.raises(ValueError, match='must end in .svg or .png'): explore.headline_figure(records, tmp_path / 'd.gif')


class Page(HTMLParser):
    "What a page is made of."
    void = {'meta', 'img', 'br', 'hr', 'link', 'input'}

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ''
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void: self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f'{tag} closes something else'

    def handle_data(self, data): self.text += data

    def all(self, tag): return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope='module')
def report(records, tmp_path_factory):
    path = tmp_path_factory.mktemp('report') / 'new folder' / 'report.html'
    return explore.write_report(records, path, ledger([], 'depth')).read_text(encoding='utf-8')


def test_report_is_whole_and_needs_nothing_else(report):
    page = Page(report)
    assert page.open == []
    for tag, attrs in page.tags:
        assert tag not in ('script', 'link', 'iframe', 'object'), tag
        for name in ('src', 'href'): assert attrs.get(name, 'data:').startswith('data:')
    assert '@import' not in report and 'url(' not in report
    assert any('width=device-width' in m.get('content', '') for m in page.all('meta')) and 'prefers-color-scheme: dark' in report


def test_report_has_a_description_and_data_for_each_figure(report):
    page = Page(report)
    images = page.all('img')
    assert len(images) > 20 and all(len(i['alt']) > 30 for i in images) and len({i['alt'] for i in images}) == len(images)
    assert page.text.count('Data') >= len(explore.PANELS)
    for number in ('0.355', '0.259', '1.25e+03'): assert number in page.text or str(float(number)) in page.text  # the paper's


def test_report_names_what_made_it(report, records):
    text = Page(report).text
    for r in records: assert r['name'] in text
    p = records[0]['provenance']
    for fact in (p['hardware'], p['torch'], p['commit'], p['corpus_fingerprint'], '4096', 'weight_decay'): assert fact in text
    for row in ledger([], 'depth'): assert row['statement'] in text and row['verdict'] in text
    assert 'over held-out sequences only' not in text


def test_report_of_partial_records(tmp_path):
    runs = [record(1), record(2), record(16), record(16, 1, diverged=True)]
    text = Page(explore.write_report(runs, tmp_path / 'r.html').read_text(encoding='utf-8')).text
    assert 'nothing about other seeds' in text and 'Diverged, and therefore without scores: L16_D64_T128_seed1' in text
    explore.write_report([record(4, diverged=True)], tmp_path / 'r.html')


def test_report_of_another_study(tmp_path):
    runs = [record(4, seed, weight_decay=wd) for wd in (.1, 1.) for seed in (0, 1)]
    text = Page(explore.write_report(runs, tmp_path / 'r.html').read_text(encoding='utf-8')).text
    assert 'λ = 0.1, λ = 1.0, 2 seeds each' in text and '32: 0.259' not in text  # the paper's depths belong to the depth study


def test_report_escapes_what_it_is_given(tmp_path):
    r = record(2)
    r['provenance']['hardware'] = '<script>alert(1)</script>'
    text = explore.write_report([r], tmp_path / 'r.html', title='a < b & "c"').read_text(encoding='utf-8')
    assert '<script' not in text and '&lt;script' in text and 'a &lt; b' in text
