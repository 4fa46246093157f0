"Figures: what they draw, and what they refuse."
import functools
from copy import deepcopy

import matplotlib.pyplot as plt
import numpy as np
import pytest

from sparsecod import figures
from sparsecod.claims import CLAIMS, PUBLISHED, ledger
from sparsecod.core import PRESETS
from sparsecod.studies import SCALES, STUDIES, by_variant, load_results
from synthetic import depth_study, interval, record, variants


def plot_loss(records, ax=None, by=figures.DEPTH): return figures.plot_curve(records, 'loss', ax, by)


def plot_final_variance(records, statistic='mean', ax=None, by=figures.DEPTH):
    return figures.plot_curve(records, f'variance_{statistic}', ax, by)


@pytest.fixture(scope='module')
def records():
    return depth_study(seeds=3)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')


DRAW = {
    **{f'variance {k}': lambda r, ax, k=k: figures.plot_variance(r, k, ax) for k in figures._STATISTICS},
    **{f'final variance {k}': lambda r, ax, k=k: plot_final_variance(r, k, ax)
       for k in figures._STATISTICS},
    **{f'updates {k}': lambda r, ax, k=k: figures.plot_updates(r, k, ax) for k in ('attention', 'feed_forward')},
    **{f'jacobian {k}': lambda r, ax, k=k: figures.plot_jacobian(r, k, ax) for k in ('per_token', 'per_sequence')},
    **{f'score {k}': lambda r, ax, k=k: figures.plot_score(r, k, ax)
       for k in ('causal', 'usefulness', 'final_variance', 'val_loss')},
    'loss': lambda r, ax: plot_loss(r, ax),
    'distance': lambda r, ax: figures.plot_distance(r, 'permutation', ax),
    'parts': lambda r, ax: figures.plot_parts(r, 'causal', ax),
    'thresholds': lambda r, ax: figures.plot_thresholds(r, ax),
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
    """A missing depth, a diverged run, a single seed, nothing but diverged runs: every figure draws what
    there is."""
    draw([record(2), record(16), record(16, 1, diverged=True)], None)
    draw([record(4)], None)
    ax = draw([record(4, diverged=True)], None)
    if not ax.get_lines():
        assert any(t.get_text() in ('no finished run', 'nothing to draw') for t in ax.texts)


@pytest.mark.parametrize('draw', list(DRAW.values())[::3], ids=list(DRAW)[::3])
def test_fonts_are_large_enough(draw, records):
    ax = draw(records, None)
    ax.figure.canvas.draw()
    texts = [t for t in ax.figure.findobj(plt.Text) if t.get_visible() and t.get_text().strip()]
    assert min(t.get_fontsize() for t in texts) >= 9


@pytest.mark.parametrize('wrong', [lambda r: figures.plot_variance(r, 'mode'),
                                   lambda r: figures.plot_updates(r, 'norm'),
                                   lambda r: figures.plot_jacobian(r, 'mean'),
                                   lambda r: figures.plot_pairs(r[:1], 'linear')])
def test_unknown_names_are_refused(wrong, records):
    with pytest.raises(ValueError, match='must be one of'): wrong(records)


def test_style_leaves_other_settings_alone():
    before = dict(plt.rcParams)
    with figures.use_style(): assert plt.rcParams['font.size'] == figures.STYLE['font.size']
    assert dict(plt.rcParams) == before
    with pytest.raises(RuntimeError):
        with figures.use_style(): raise RuntimeError
    assert dict(plt.rcParams) == before


def contrast(color) -> float:
    "Contrast ratio against white, by the definition of WCAG 2."
    c = np.asarray(color[:3])
    linear = np.where(c <= .03928, c / 12.92, ((c + .055) / 1.055) ** 2.4)
    return 1.05 / (linear @ [.2126, .7152, .0722] + .05)


def test_setting_colors_are_visible_and_ordered():
    for n in range(1, 9):
        contrasts = [contrast(look['color']) for look in figures.looks(list(range(n))).values()]
        assert contrasts == sorted(contrasts) and contrasts[0] > 2.4, contrasts


def test_a_setting_keeps_its_color_when_a_run_diverges():
    whole = [record(L) for L in (2, 4, 8)]
    fewer = [record(2), record(4, diverged=True), record(8)]
    color = lambda records: {line.get_label(): line.get_color()
                             for line in figures.plot_variance(records).get_lines()}
    a, b = color(whole), color(fewer)
    assert set(b) == {'L = 2', 'L = 8'} and all(a[name] == b[name] for name in b)


def by_layer(records: list, name: str) -> dict:
    "Series over the layers, by depth."
    return figures._series(records, lambda r: figures._profile(r, name))


def test_layers_are_numbered_from_the_embedding_and_blocks_from_one(records):
    for L, s in by_layer(records, 'variance_mean').items(): assert s.x == list(range(L + 1))
    for L, s in by_layer(records, 'causal_max').items(): assert s.x == list(range(1, L + 1))
    ax = figures.plot_pairs([record(16)], 'permutation')
    assert min(ax.get_xticks()) == 1 and max(ax.get_xticks()) == 16 and ax.yaxis_inverted()


def test_series_are_mean_and_range(records):
    s = by_layer(records, 'jacobian_per_token')[4]
    lines = np.array([r['scores']['arrays']['jacobian_per_token'] for r in records
                      if r['config']['model']['n_layers'] == 4])
    assert (s.seeds == 3 and np.allclose(s.mean, lines.mean(0)) and np.allclose(s.low, lines.min(0))
            and np.allclose(s.high, lines.max(0)))


def test_curves_skip_what_was_not_measured():
    r = record(2, diverged=True)
    assert r['curve']['variance_mean'][-1] is None
    assert list(figures._curve(r, 'variance_mean')) == r['curve']['step'][:-1]


def test_pairs_are_averaged_over_seeds():
    group = [record(4, seed) for seed in range(2)]
    mean, (a, b) = figures._pair_means(group, 'causal'), [r['scores']['arrays']['causal'] for r in group]
    assert np.isclose(mean[0, 3], (a[0][3] + b[0][3]) / 2) and np.isnan(mean[3, 0]) and np.isnan(mean[1, 1])


def test_block_one_is_in_two_of_L_pairs():
    """Scores that are 1 with block 1 and 0 otherwise: the mean over all pairs is 2 / L, and the split sees
    through it."""
    for L in (3, 4, 8, 16):
        scores = np.where(np.triu(np.ones((L, L)), 1), 0., np.nan)
        scores[0, 1:] = 1
        assert np.isclose(np.nanmean(scores), 2 / L)
        assert figures._split_pairs(scores) == {'with block 1': 1, 'without block 1': 0}
    two = figures._split_pairs(np.array([[np.nan, .5], [np.nan, np.nan]]))
    assert two['with block 1'] == .5 and np.isnan(two['without block 1'])
    assert list(figures.pair_parts([record(2), record(4)], 'causal')['without block 1']) == [4]


def test_a_study_of_another_field():
    runs = [record(4, seed, weight_decay=wd) for wd in (0., .1, 1.) for seed in (0, 1)]
    assert list(figures.by_setting(runs, 'train.weight_decay')) == [0., .1, 1.]
    assert (figures.varied_field(runs) == 'train.weight_decay'
            and figures.varied_field([record(2), record(4)]) == figures.DEPTH)
    ax = figures.plot_score(runs, 'causal', by='train.weight_decay')
    assert [t.get_text() for t in ax.get_xticklabels()] == ['0.0', '0.1', '1.0']


def test_an_interval_may_lie_beside_its_value():
    r = record(4)
    r['scores']['scalars']['permutation'] = dict(value=.1, low=.12, high=.2)
    figures.plot_score([r], 'permutation')
    figures.headline_figure([r])


def with_usefulness(values: dict) -> list:
    "Records of one depth study whose usefulness is given: depth -> values of the seeds."
    made = [record(L, seed) for L, found in values.items() for seed, _ in enumerate(found)]
    for r, v in zip(made, (v for found in values.values() for v in found)):
        r['scores']['scalars']['usefulness'] = interval(v, .01)
    return made


def test_intervals_of_a_share_are_drawn_no_further_than_0_and_1():
    runs = with_usefulness({4: (1., .75, 1.), 8: (0., .25, 0.)})
    found = figures.estimates(runs, 'usefulness')
    assert found[4]['high'] > 1 and found[8]['low'] < 0                                    # the numbers stay
    ax = figures.plot_score(runs, 'usefulness')
    spans = [segment[:, 1] for segment in ax.containers[0].lines[2][0].get_segments()]
    assert (np.allclose(spans, [(found[4]['low'], 1), (0, found[8]['high'])])
            and 'cut at 0 and 1' in ax.get_ylabel())
    assert figures.estimate_text(found[4]) in figures.estimates_table(runs, ['usefulness'])
    left = figures.headline_figure(runs).axes[0]
    spans = [segment[:, 1] for segment in left.containers[2].lines[2][0].get_segments()]
    assert (np.allclose(spans, [(found[4]['low'], 1), (0, found[8]['high'])])
            and 'cut at 0 and 1' in left.get_ylabel())


def test_other_intervals_are_left_alone():
    for name, runs in (('usefulness', with_usefulness({4: (.5, .5, .6)})), ('causal', depth_study(seeds=2))):
        ax, found = figures.plot_score(runs, name), figures.estimates(runs, name)
        spans = [segment[:, 1] for segment in ax.containers[0].lines[2][0].get_segments()]
        assert (np.allclose(spans, [(e['low'], e['high']) for e in found.values()])
                and 'cut' not in ax.get_ylabel())


def test_a_measure_of_ones_own(records):
    last = lambda r: r['scores']['scalars']['final_variance']['value']
    for L, e in figures.estimates(records, last).items():
        assert e['value'] == pytest.approx(
            np.mean([last(r) for r in records if r['config']['model']['n_layers'] == L])) and e['n'] == 3


# ---- what is refused

def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(records):
    mixed = [*records, record(4, 7, weight_decay=1.)]
    with pytest.raises(ValueError, match=r'L = 4 differ in train.weight_decay \(0.1, 1.0\)'):
        figures.plot_variance(mixed)
    other = deepcopy(records[:2])
    other[1]['provenance']['corpus_fingerprint'] = 'another'
    with pytest.raises(ValueError, match='differ in corpus'): plot_loss(other)


@pytest.mark.parametrize('call', [figures.plot_variance, plot_loss, figures.headline_figure,
                                  lambda r: figures.plot_score(r, 'causal')])
def test_no_records(call):
    with pytest.raises(ValueError, match='no records to show: run a study first'): call([])


# ---- the paper's numbers

@pytest.mark.parametrize('claim', [c for c in CLAIMS if c.published and c.study == 'depth'
                                   and c.metric in ('causal', 'permutation', 'usefulness')],
                                   ids=lambda c: c.id)
def test_published_numbers_are_those_of_the_ledger(claim):
    found = figures._published(claim.metric)
    assert (claim.published == ', '.join(f'L={L}: {x:.3f}' for L, x in found.items())
            and {f'paper-L{L}' for L in found} <= set(PRESETS))


@pytest.mark.parametrize('name', ['peak', 'jacobian'])
def test_published_ends_are_a_line_a_depth(name):
    lines = [line.get_ydata() for line in figures.plot_published(name).get_lines()]
    assert len(lines) == 2 and all(first > last for first, last in lines)


def test_published_numbers_stay_in_their_own_axes():
    ax = figures.plot_published('causal')
    assert ('paper' in ax.get_title()
            and figures.plot_score(depth_study(1), 'causal').get_title().count('paper') == 0)
    assert any(t.get_text() == 'not published' for t in figures.plot_published('skip_loss_increase').texts)


# ---- words and tables

def test_words_come_from_the_records(records):
    assert figures.runs_text(records) == '12 runs: L = 2, L = 4, L = 8, L = 16, 3 seeds each'
    assert figures.runs_text([record(2),
                              record(4, diverged=True)]) == '2 runs: L = 2, L = 4, 0 to 1 seeds; 1 diverged'
    lines = figures.estimates_table(records, ['causal', 'val_loss']).splitlines()
    assert len(lines) == 6 and lines[0].startswith('| L |') and all(line.count('|') == 4 for line in lines)
    assert '0.259' in figures.published_table(['causal', 'permutation'])
    rows = ledger([], 'depth')
    assert all(figures.verdict_text(row).startswith(f"**{row['verdict'].capitalize()}**") for row in rows)


def test_a_verdict_without_a_statistic_says_why():
    row = ledger([], 'depth')[0]
    text = lambda **changes: figures.verdict_text(row | changes
                                                  | dict(statistic=row['statistic']
                                                         | changes.get('statistic', {})))
    assert ('no seed was run at every setting' in text()
            and 'no seed was run' in text(statistic=dict(n=0, seeds=0)))
    same = text(statistic=dict(n=0, seeds=3),
                ours={'L=2': dict(value=0., low=0., high=0., n=3, over='seeds')})
    assert 'not defined: the metric is the same in all runs' in same and 'no seed' not in same
    assert 'over 3 seeds' in text(statistic=dict(n=3, seeds=3, value=1., low=.5, high=1.5))


def test_usefulness_at_the_published_threshold_is_the_score(records):
    for r in records:
        share = next(y for x, y in figures._useful_shares(r).items() if np.isclose(x, .1))
        assert np.isclose(share, r['scores']['scalars']['usefulness']['value'])


def test_results_folder(root, tmp_path):
    assert figures.results_folder(root / 'nbs' / 'reproduce') == figures.results_folder(
        root) == root / 'results'
    with pytest.raises(FileNotFoundError, match='not inside a clone'): figures.results_folder(tmp_path)


# ---- headline and report

def test_headline_is_saved_the_same_twice(records, tmp_path):
    for name in ('a.svg', 'b.svg', 'c.png'): figures.headline_figure(records, tmp_path / name)
    assert (tmp_path / 'a.svg').read_bytes() == (tmp_path / 'b.svg').read_bytes()
    assert (tmp_path / 'c.png').read_bytes().startswith(b'\x89PNG')
    with pytest.raises(ValueError, match='must end in .svg or .png'):
        figures.headline_figure(records, tmp_path / 'd.gif')


# ---- studies of variants

NAMES = ['val_loss', 'final_variance', 'causal', 'density_attention', 'accuracy']


@pytest.fixture(scope='module')
def gqa(): return variants()


LABELS = list(STUDIES['gqa'].changes(SCALES['laptop']))


beside_table = functools.partial(figures.study_table, paper=True)


def cells(table):
    "A Markdown table as a list of dictionaries."
    head, _, *rows = [[c.strip() for c in line.strip('|').split(' | ')]
                      for line in table.split('\n\n')[0].splitlines()]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_labels_are_the_studies_and_leave_records_alone(gqa):
    runs = figures.label_variants('gqa', gqa[::-1])
    assert ([r['variant'] for r in runs] == [name for name in LABELS for _ in range(3)]
            and not any('variant' in r for r in gqa))
    groups = figures.by_setting(runs, 'variant')
    assert list(groups) == LABELS and all([r['seed'] for r in g] == [0, 1, 2] for g in groups.values())
    assert all([r['name'] for r in groups[name]] == [r['name'] for r in group]
               for name, group in by_variant('gqa', gqa).items())
    assert figures.label('G=2, matched', 'variant') == 'G=2, matched'
    assert list(figures.by_setting(runs[::-1], 'variant')) == LABELS[::-1]
    with pytest.raises(ValueError, match='use label_variants'): figures.plot_variance(gqa, by='variant')
    runs[0]['variant'] = 'G=2'
    with pytest.raises(ValueError, match='the runs with G=2 differ in model.n_kv_heads'):
        figures.by_setting(runs, 'variant')


def test_what_was_measured_afterwards_does_not_set_runs_apart(gqa):
    more = deepcopy(gqa)
    more[0]['config']['measures'] = ['cloze']
    assert list(figures.by_setting(figures.label_variants('gqa', more), 'variant')) == LABELS


BY_VARIANT = {'variance': figures.plot_variance, 'loss': plot_loss,
              'thresholds': figures.plot_thresholds, 'training': plot_final_variance,
              'score': lambda r, by: figures.plot_score(r, 'causal', by=by),
              'parts': lambda r, by: figures.plot_parts(r, by=by),
              'distance': lambda r, by: figures.plot_distance(r, by=by), 'jacobian': figures.plot_jacobian,
              'lengths': lambda r, by: figures.plot_lengths(r, 'val_loss', by)}


@pytest.mark.parametrize('draw', BY_VARIANT.values(), ids=BY_VARIANT)
def test_figures_by_variant_name_every_variant(draw, gqa):
    """Names stand in the legend or on the axis, also when one variant diverged; nothing is smaller than 9
    points."""
    for records in (gqa, variants(diverged=[('G=2', s) for s in (0, 1, 2)])):
        ax = draw(figures.label_variants('gqa', records), by='variant')
        ax.figure.canvas.draw()
        texts = [t for t in ax.findobj(plt.Text) if t.get_visible() and t.get_text().strip()]
        words = {' '.join(t.get_text().split()) for t in texts}
        assert set(LABELS) - {'G=2'} <= words and min(t.get_fontsize() for t in texts) >= 9
        if records is gqa: assert 'G=2' in words


def test_versions_of_a_variant_share_a_color_and_no_two_lines_look_alike():
    for study in STUDIES.values():
        look = figures.looks(list(study.changes(SCALES['laptop'])), 'variant')
        if len(look) <= 10:
            assert len({(x['color'], x['ls'], x['marker']) for x in look.values()}) == len(look), study.name
    look = figures.looks(['G=4', 'G=4, matched', 'G=1'], 'variant')
    assert look['G=4']['color'] == look['G=4, matched']['color'] != look['G=1']['color']
    assert contrast(look['G=1']['color']) < contrast(look['G=4']['color'])  # by number, not by order
    look = figures.looks(list(STUDIES['sources'].changes(SCALES['laptop'])), 'variant')
    assert len({x['color'] for x in look.values()}) == 4                                  # one a source
    # so that points can be told apart
    assert len({(x['color'], x['marker']) for x in look.values()}) == len(look)


@pytest.mark.parametrize('name', ['perplexity', 'accuracy', 'density_attention', 'participation',
                                  'kv_density', 'val_loss@128', 'final_variance_median@512',
                                  'val_loss@common'])
def test_every_metric_has_words(name):
    title, axis = figures.metric_text(name)
    assert title and axis
    if '@' in name:
        assert (figures.metric_text(name.split('@')[0])[0] in title
                and ('common length' in title or name.split('@')[1] in title))


def test_unknown_metrics_are_refused():
    with pytest.raises(ValueError, match="name='lossy@128' must be one of causal"):
        figures.metric_text('lossy@128')


def test_metrics_of_all_kinds_have_titles(gqa):
    for r in gqa[:1]:
        for name in [*r['scores']['scalars'], *r['sparsity']['scalars']]:
            if name != 'loss': assert figures.metric_text(name)[0]


# ---- changes within a seed

def test_changes_are_differences_within_a_seed(gqa):
    """Variant k has loss 4 + k/2 + (1 + k) seed/10: against the first, k/2 + k seed/10, of which the mean
    is k/2 + k/10."""
    changed = figures.seed_changes(figures.label_variants('gqa', gqa), 'val_loss', 'G=1')
    assert list(changed) == LABELS[1:]
    for k, c in enumerate(changed.values(), 1):
        assert (c['by_seed'] == pytest.approx({s: .5 * k + .1 * k * s for s in (0, 1, 2)})
                and c['value'] == pytest.approx(.6 * k))
        half = 4.302653 * .1 * k / 3 ** .5  # Student, two degrees of freedom
        assert (c['low'] == pytest.approx(.6 * k - half, abs=1e-6)
                and c['high'] == pytest.approx(.6 * k + half, abs=1e-6))


def test_changes_of_variances_are_doublings(gqa):
    runs = figures.label_variants('gqa', gqa)
    changed = figures.seed_changes(runs, 'final_variance', 'G=1')
    assert changed['G=2']['by_seed'] == {0: 1, 1: 2, 2: 3} and changed['G=4']['by_seed'] == {0: 3, 1: 3, 2: 3}
    back = figures.seed_changes(runs, 'final_variance', 'G=2')
    assert back['G=1']['by_seed'] == {0: -1, 1: -2, 2: -3} and 'G=2' not in back


def test_diverged_runs_leave_their_seed_out_and_are_counted():
    runs = figures.label_variants('gqa',
                                  variants(diverged=[('G=1', 1), ('G=2', 0),
                                                     *(('G=4', s) for s in (0, 1, 2))],
                                                     missing=['G=4, matched']))
    changed = figures.seed_changes(runs, 'val_loss', 'G=1')
    assert (list(changed['G=2']['by_seed']) == [2] and changed['G=2']['n'] == 1
            and np.isnan(changed['G=2']['low']))
    assert (list(changed['G=2, matched']['by_seed']) == [0, 2]
            and changed['G=2, matched']['missing'] == '')
    assert (changed['G=4']['missing'] == 'diverged'
            and changed['G=2']['missing'] == '1 of 3 diverged')
    assert 'G=4, matched' not in changed


def test_forest_plot_draws_the_changes(gqa):
    fig = figures.plot_changes('gqa', gqa, ['val_loss', 'causal'])
    ax, changed = fig.axes[0], figures.seed_changes(figures.label_variants('gqa', gqa), 'val_loss', 'G=1')
    assert [t.get_text() for t in ax.get_yticklabels()] == LABELS[1:] and 'G=1' in ax.get_xlabel()
    means = [c.lines[0].get_xdata()[0] for c in ax.containers]
    assert means == pytest.approx([c['value'] for c in changed.values()])
    spans = [segment[:, 0] for c in ax.containers for segment in c.lines[2][0].get_segments()]
    assert np.allclose(spans, [(c['low'], c['high']) for c in changed.values()])
    assert any(np.allclose(line.get_xdata(), 0) and len(line.get_xdata()) == 2 for line in ax.get_lines())
    filled = [c.lines[0].get_markerfacecolor() != 'white' for c in ax.containers]
    assert filled == [c['low'] > 0 or c['high'] < 0 for c in changed.values()] == [True] * 4


def test_forest_plot_names_what_diverged():
    records = variants(diverged=[('G=2', 0), *(('G=4', s) for s in (0, 1, 2))])
    texts = [t.get_text() for t in figures.plot_changes('gqa', records,
                                                        ['val_loss']).axes[0].findobj(plt.Text)]
    assert 'diverged' in texts and '1 of 3 diverged' in texts and 'G=4' in texts
    texts = [t.get_text() for t in figures.plot_study('gqa', records, ['val_loss']).axes[0].findobj(plt.Text)]
    assert 'diverged' in texts and '1 of 3 diverged' in texts and 'G=4' in texts
    labels = figures.plot_scatter('gqa', records, 'density_attention',
                                  'final_variance').get_legend_handles_labels()[1]
    assert 'G=4 (diverged)' in labels and 'G=2 (1 of 3 diverged)' in labels


def test_unknown_references_are_refused(gqa):
    for call in (figures.plot_changes, figures.changes_table):
        with pytest.raises(ValueError, match="against='G=8' must be one of G=1; G=2"):
            call('gqa', gqa, ['val_loss'], against='G=8')
    assert 'change from G=4' in figures.changes_table('gqa', gqa, ['val_loss'], against='G=4')


@pytest.mark.parametrize('records', [variants(seeds=[0]), variants(missing=['G=1']),
                                     variants(diverged=[(name, s) for name in LABELS for s in (0, 1, 2)]),
                                     variants(missing=LABELS[1:]),
                                     variants(diverged=[('G=1', s) for s in (0, 1, 2)])],
                         ids=['one seed', 'no reference', 'all diverged', 'only the reference',
                              'reference diverged'])
def test_partial_studies_are_drawn_and_listed(records):
    for call in (figures.plot_study, figures.plot_changes): call('gqa', records, NAMES).canvas.draw()
    figures.plot_scatter('gqa', records, 'density_attention', 'final_variance').figure.canvas.draw()
    figures.plot_lengths(figures.label_variants('gqa', records), 'val_loss').figure.canvas.draw()
    for call in (figures.study_table, beside_table, figures.changes_table):
        assert {row[next(iter(row))] for row in cells(call('gqa', records, NAMES))} >= {
            r['variant'] for r in figures.label_variants('gqa', records)} - {'G=1'}


def test_one_seed_says_what_its_interval_is_over():
    records = variants(seeds=[0])
    assert 'say nothing about other seeds' in figures.study_table('gqa', records, ['val_loss'])
    assert 'interval over sequences' in figures.plot_study('gqa', records, ['val_loss']).axes[0].get_title()
    ax = figures.plot_changes('gqa', records, ['val_loss']).axes[0]
    assert '1 seed' in ax.get_title() and 'sequences' not in ax.get_title()  # a change has no interval then


# ---- tables of variants

def test_study_table_lists_estimates_seeds_and_what_is_missing():
    records = variants(diverged=[('G=2', 1)], missing=['G=4'])
    text = figures.study_table('gqa', records, NAMES)
    table = cells(text)
    assert ([row['variant'] for row in table] == [name for name in LABELS if name != 'G=4']
            and 'Not run: G=4.' in text)
    assert ([row['seeds'] for row in table] == ['3', '2', '3', '3']
            and [row['diverged'] for row in table] == ['', '1 of 3', '', ''])
    found = figures.estimates(figures.label_variants('gqa', records), 'val_loss', 'variant')
    assert [row['Held-out loss'] for row in table] == [figures.estimate_text(e) for e in found.values()]
    assert 'diverged' not in figures.study_table('gqa', variants(), NAMES)


def test_models_that_learnt_less_than_token_frequencies_get_a_dagger():
    """Losses of the variants, a seed each: one as large as the unigram loss, one larger in one seed, one
    larger in all."""
    losses = {'G=2': (6.4, 6.4, 6.4), 'G=4': (6.5, 6., 6.), 'G=4, matched': (7., 8., 9.)}
    records = variants(diverged=[('G=2, matched', 0)])
    for r in figures.label_variants('gqa', records):
        if r['variant'] in losses:
            next(x for x in records if x['name'] == r['name'])['final'] = r['final'] | dict(
                val_loss=interval(losses[r['variant']][r['seed']], .1), unigram_loss=6.4)
    for text in (figures.study_table('gqa', records, NAMES), beside_table('gqa', records, NAMES)):
        assert [row['variant'] for row in cells(text)][:5] == ['G=1', 'G=2 †', 'G=2, matched', 'G=4 †',
                                                               'G=4, matched †']
        note = text.split('\n\n')[1]
        assert (note.count('†') == 1 and 'not below 6.4 nats a token' in note
                and '(G=4: 1 of 3 seeds)' in note and note.endswith('.'))
    assert ('†' not in figures.study_table('gqa', variants(), NAMES)
            + beside_table('gqa', variants(), NAMES))
    assert not figures.learnt_little(record(2, diverged=True))


def test_the_recorded_models_that_learnt_little_are_marked(root):
    records = load_results(root / 'results', 'laptop')
    for study in STUDIES:
        runs = figures.label_variants(study, records)
        if not runs: continue  # a study that nobody has run yet
        weak = {r['variant'] for r in runs if r['final']['val_loss']
                and r['final']['val_loss']['value'] >= r['final']['unigram_loss']}
        marked = {row['variant'].removesuffix(' †')
                  for row in cells(figures.study_table(study, records, ['val_loss']))
                  if row['variant'].endswith('†')}
        assert marked == weak, study


def test_published_numbers_stand_beside_ours_and_are_labelled(gqa):
    names = ['val_loss', 'perplexity', 'usefulness', 'final_variance']
    table = cells(beside_table('gqa', gqa, names))
    paper = PUBLISHED['gqa']
    assert [row['variant'] for row in table] == LABELS + [name for name in paper if name not in LABELS]
    for row in table:
        theirs = [row[f'paper: {figures.metric_text(n)[0]}'] for n in names[1:]]
        assert theirs == [f'{paper[row["variant"]][n]:g}' if row['variant'] in paper else ''
                          for n in names[1:]]
        assert (row['Perplexity'] == '') == (row['variant'] not in LABELS)
    assert 'paper: Held-out loss' not in table[0]
    assert 'paper:' not in beside_table('gqa', gqa, ['causal'])


def test_correlation_table():
    rows = [dict(x='density_attention', y='final_variance', value=.5, low=.25, high=.75, n=3, variants=5),
            dict(x='density', y='val_loss', value=float('nan'), low=float('nan'), high=float('nan'), n=0,
                 variants=2), dict(x='density', y='val_loss', value=-.5, low=float('nan'), high=float('nan'),
                                   n=1, variants=2)]
    assert [row['rank correlation']
            for row in cells(figures.correlation_table(rows))] == ['0.5 (0.25\xa0to\xa00.75)', '-', '-0.5']
    assert cells(figures.correlation_table(rows))[0]['variants'] == '5'


# ---- figures of variants

def test_study_figure_has_a_picture_a_metric_and_a_ring_a_seed(gqa):
    fig = figures.plot_study('gqa', gqa, NAMES)
    assert (len(fig.axes) == len(NAMES) and fig.axes[1].get_yscale() == 'log'
            and fig.axes[0].get_yscale() == 'linear')
    ax, values = fig.axes[0], figures.estimates(figures.label_variants('gqa', gqa), 'val_loss', 'variant')
    assert [' '.join(t.get_text().split()) for t in ax.get_xticklabels()] == LABELS
    rings = next(line for line in ax.get_lines() if line.get_markerfacecolor() == 'none'
                 and len(line.get_xdata()) == 3 * len(LABELS))
    assert list(rings.get_ydata()[:3]) == pytest.approx([4, 4.1, 4.2]) and rings.get_linestyle() == 'None'
    assert ax.containers[0].lines[0].get_ydata() == pytest.approx([e['value'] for e in values.values()])


def test_scatter_has_a_point_a_run(gqa):
    ax = figures.plot_scatter('gqa', gqa, 'density_attention', 'final_variance')
    points = {line.get_label(): np.transpose(line.get_data()) for line in ax.get_lines()}
    assert (list(points) == LABELS and np.allclose(points['G=2'], [(.9, 2), (.9, 4), (.9, 8)])
            and ax.get_title() == '15 runs')
    assert ax.get_yscale() == 'log' and ax.get_xscale() == 'linear'


def test_lengths_are_drawn_with_a_ring_at_the_own_one():
    records = variants('context')
    runs = figures.label_variants('context', records)
    series = figures._series(runs, lambda r: figures._at_lengths(r, 'val_loss'), 'variant')
    for name, group in figures.by_setting(runs, 'variant').items():
        T = group[0]['config']['model']['context_length']
        assert series[name].x == [T // 2, T, 2 * T]
        assert np.allclose(series[name].mean,
                           np.mean([[r['lengths'][str(n)]['val_loss']['value'] for n in series[name].x]
                                    for r in group], axis=0))
    ax = figures.plot_lengths(runs, 'val_loss')
    rings = [line.get_xdata()[0] for line in ax.get_lines() if line.get_markersize() == 11]
    assert rings == [g[0]['config']['model']['context_length']
                     for g in figures.by_setting(runs, 'variant').values()]
    for r in runs: r.pop('lengths')
    assert any(t.get_text() == 'nothing to draw' for t in figures.plot_lengths(runs, 'val_loss').texts)


def with_floors(records: list[dict], pairs: list[float], triples: float = 3.52) -> list[dict]:
    "Records with floors, those of pairs taken in turn."
    return [r | dict(floors=dict(frequencies=5.9, pairs=pairs[i % len(pairs)], triples=triples))
            for i, r in enumerate(records)]


@pytest.mark.parametrize('draw', [plot_loss, lambda r: figures.plot_score(r, 'val_loss'),
                                  lambda r: figures.plot_lengths(figures.label_variants('gqa', r),
                                                                 'val_loss')],
                         ids=['loss', 'score', 'lengths'])
def test_floors_of_a_loss_are_named_horizontal_lines_in_sight(draw, records, request):
    # a table of pairs that all runs are far below
    floors = {'table of token pairs': 9.29, 'table of token triples': 3.52}
    ax = draw(with_floors(variants() if request.node.callspec.id == 'lengths' else records, [9.29]))
    lines = {line.get_label(): line.get_ydata() for line in ax.get_lines() if line.get_label() in floors}
    assert {name: set(y) for name, y in lines.items()} == {name: {loss} for name, loss in floors.items()}
    assert floors.keys() <= {text.get_text() for text in ax.get_legend().get_texts()}
    assert all(ax.get_ylim()[0] <= loss <= ax.get_ylim()[1] for loss in floors.values())


def test_floors_that_differ_between_runs_are_bands(records):
    bands = lambda ax: [p for p in ax.patches if p.get_alpha() == .15]
    assert (not bands(figures.plot_score(with_floors(records, [9.2]), 'val_loss'))
            and len(bands(figures.plot_score(with_floors(records, [9.2, 9.4]), 'val_loss'))) == 1)


def test_floors_belong_to_losses_only(records):
    ends = lambda ax: (len(ax.get_lines()), ax.get_ylim())
    assert ends(figures.plot_score(with_floors(records, [4.29]),
                                   'causal')) == ends(figures.plot_score(records, 'causal'))
    assert 'table of token triples' not in figures._floor_losses(with_floors(records, [4.29]), ('pairs',))


def test_a_notebook_goes_on_showing_figures():
    "The first figure of a notebook turns showing on, perhaps inside the style; it must stay on behind it."
    plt.ioff()
    with figures.use_style(): plt.ion()
    assert plt.isinteractive()
    plt.ioff()
    with figures.use_style(): pass
    assert not plt.isinteractive()
