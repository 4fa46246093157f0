"""How often do the intervals of `score_model` hold the truth?

    python benchmarks/interval_coverage.py [--pool 2000] [--draws 1000] [--out results/benchmarks/interval_coverage.json]

A small model is trained and scored once on a pool of held-out sequences; the scores of the whole pool are
the truth. Then as many sequences as a measurement has by default are drawn from what was measured, again
and again, and each draw gets its scores and intervals. The percentile bootstrap gets the first of the draws
too, for comparison. A quarter of an hour on one core. """
import argparse
import json
import os
import platform
import tempfile
from pathlib import Path

import torch
from score_model import commit, processor

import sparsecod.scores as scores
from sparsecod.core import ModelConfig
from sparsecod.data import DataConfig, prepare
from sparsecod.intervals import estimate, jackknife_estimate, leave_one_out, median_estimate, resamples
from sparsecod.train import TrainConfig, train

SIZES = dict(layers=4, d_model=32, heads=2, context=64, steps=400, pool=2000, draws=1000, bootstrap_draws=300)
EDGE = 1.015     # a second threshold of usefulness, near which the blocks of this model are


def measured_pool(a):
    "What is measured of each sequence of the pool, and of its Jacobians."
    corpus = prepare(DataConfig(), progress=False)
    shape = ModelConfig(vocab_size=corpus.vocab_size, n_layers=a.layers, d_model=a.d_model, n_heads=a.heads,
                        context_length=a.context)
    with tempfile.TemporaryDirectory() as folder:
        model = train(shape, TrainConfig(steps=a.steps, tokens_per_step=2048), corpus, folder,
                      progress=False).model
    windows = corpus.sample_windows('val', a.pool + 64, a.context, seed=0)
    config = scores.ScoreConfig(n_sequences=a.pool, n_jacobian=a.pool, batch_size=50)
    kept, join = [], scores._join_jacobians
    def keep(parts):
        kept.append(parts)
        return join(parts)
    scores._join_jacobians = keep
    try:
        with scores.untouched(model):
            measured, jacobians, _ = scores.measure(model, windows[:a.pool], windows[a.pool:], config)
    finally: scores._join_jacobians = join
    return measured, jacobians, kept, corpus.fingerprint


def usefulness(m, V):
    "Shares of useful blocks at two thresholds."
    return {f'usefulness at {threshold:g}': scores._usefulness_scores(m, V, threshold)['usefulness']
            for threshold in (scores.ScoreConfig.threshold, EDGE)}


def smooth_scores(m, jacobians, W, W_few):
    "All scalars but usefulness and the median, for each row of weights."
    return (scores.intervention_scores(m, W)[0] | scores.stream_scores(m['variance'], W)[0]
            | scores._jacobian_scores(jacobians, W_few)[0])


def drawn(m, rows):
    "The measurements of some sequences."
    return {name: x[:, rows] if name == 'variance' else x[..., rows] for name, x in m.items()}


def intervals(m, jacobians, n):
    "As `score_model` makes them."
    N = len(m['loss'])
    smooth = smooth_scores(m, jacobians, leave_one_out(N), leave_one_out(n))
    found = {name: jackknife_estimate(x, -float('inf') if name in scores._SIGNED else 0.)
             for name, x in smooth.items()}
    found |= {name: estimate(x)
              for name, x in usefulness(m, resamples(N, scores.ScoreConfig.n_bootstrap)).items()}
    return found | dict(final_variance_median=median_estimate(m['variance'][-1]))


def bootstrap_intervals(m, jacobians, n, seed):
    "Percentile bootstrap for everything."
    N, R = len(m['loss']), 500
    V = resamples(N, R, seed)
    rows = V[1:].long()
    medians = torch.stack([m['variance'][-1].repeat_interleave(row, 0).median() for row in rows])
    found = smooth_scores(m, jacobians, V, resamples(n, R, seed)) | usefulness(m, V)
    found['final_variance_median'] = torch.cat([m['variance'][-1].median()[None], medians])
    return {name: estimate(x) for name, x in found.items()}


def covered(a, measured, jacobians, parts):
    "For each score, how many intervals of how many held the truth: ours, and the bootstrap's."
    one, config, g = torch.ones(1, a.pool).double(), scores.ScoreConfig(), torch.Generator().manual_seed(0)
    truth = {name: x.item() for name, x in (smooth_scores(measured, jacobians, one,
                                                          one) | usefulness(measured, one)).items()}
    truth['final_variance_median'] = measured['variance'][-1].median().item()
    hits = {name: [] for name in truth}, {name: [] for name in truth}
    for draw in range(a.draws):
        rows, few = (torch.randint(a.pool, (n,), generator=g)
                     for n in (config.n_sequences, config.n_jacobian))
        some, J = (drawn(measured, rows),
                   [scores._join_jacobians([block[i] for i in few.tolist()]) for block in parts])
        kinds = ([intervals(some, J, len(few))]
                 + ([bootstrap_intervals(some, J, len(few), draw)] if draw < a.bootstrap_draws else []))
        for found, hit in zip(kinds, hits):
            for name, e in found.items(): hit[name].append(e['low'] <= truth[name] <= e['high'])
    share = lambda hit: sum(hit) / len(hit) if hit else None
    n = lambda name: config.n_jacobian if name.startswith('jacobian') else config.n_sequences
    return [dict(score=name, n=n(name), truth=value, coverage=share(hits[0][name]),
                 bootstrap=share(hits[1][name])) for name, value in truth.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default,
                            help=f'default {default}')
    parser.add_argument('--out', type=Path, help='where to write the results, as JSON')
    a = parser.parse_args()
    torch.set_num_threads(1)
    measured, jacobians, parts, fingerprint = measured_pool(a)
    rows = covered(a, measured, jacobians, parts)
    for row in rows:
        print(f"{row['score']:32s} n = {row['n']:2d}   {100 * row['coverage']:5.1f} %   bootstrap "
              f"{100 * (row['bootstrap'] or 0):5.1f} %")
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        record = dict(L=a.layers, T=a.context, pool=a.pool, draws=a.draws,
                      sizes={name: getattr(a, name) for name in SIZES}, coverage=rows,
                      corpus_fingerprint=fingerprint,
                      hardware=dict(processor=processor(), cores=os.cpu_count(), device='cpu'),
                      versions=dict(python=platform.python_version(), torch=torch.__version__),
                      commit=commit())
        a.out.write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
