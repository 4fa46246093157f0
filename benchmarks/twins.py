"""Train models whose streams differ in size, with and without an optimiser that is rescaled along:
results/twins.json.

    python benchmarks/twins.py [--seeds 3] [--out results/twins.json]

Runs that the file holds already are not made again. About two minutes a run on one core.
"""
import argparse
import json
import time
from pathlib import Path

import torch
from tqdm import tqdm

from sparsecod.data import prepare
from sparsecod.integrity import Damaged, check_stamp, read_json, stamp, write_text
from sparsecod.ngrams import floors
from sparsecod.scores import ScoreConfig, score_model
from sparsecod.studies import SCALES, code_state, fit_vocabulary, hardware, shortened, vary, versions
from sparsecod.train import evaluate
from sparsecod.twins import Factors, image, scaled, slowed, train_scaled, twin

ROOT = Path(__file__).resolve().parents[1]
ARMS = {'usual': lambda c: Factors(), 'twin': twin, 'scaled': scaled, 'image': image, 'slowed': slowed}
SCORE = ScoreConfig(n_sequences=16, n_jacobian=2)


def measure(arm: str, c: float, seed: int, config, corpus) -> dict:
    "Train one model and score it."
    start, losses = time.perf_counter(), []
    train = config.train.replace(seed=seed)
    for loss, model in train_scaled(config.model, train, corpus, ARMS[arm](c)): losses.append(loss)
    windows = corpus.sample_windows('val', 256, config.model.context_length, seed)
    found = score_model(model, *corpus.sample_windows('val', SCORE.n_sequences + SCORE.n_fit,
                                                      config.model.context_length, 10 + seed).split(
        [SCORE.n_sequences, SCORE.n_fit]), SCORE, progress=False)
    n = train.tokens_per_step // config.model.context_length
    return dict(arm=arm, c=c, seed=seed, seconds=round(time.perf_counter() - start),
                losses=losses[::10] + losses[-1:],
                val_loss=float(evaluate(model, windows).mean()),
                floors=shortened(floors(corpus, train.steps, n, config.model.context_length, seed, windows)),
                scalars={name: s['value'] for name, s in found['scalars'].items()},
                variance_median=found['arrays']['variance_median'],
                variance_mean=found['arrays']['variance_mean'],
                linear_loss_increase=found['arrays']['linear_loss_increase'])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=3, help='of the arms that are not exact')
    parser.add_argument('--out', type=Path, default=ROOT / 'results' / 'twins.json')
    options = parser.parse_args()
    config = vary(SCALES['laptop'], {'model.n_layers': 4, 'train.micro_batch_tokens': 4096,
                                     'train.precision': 'fp32', 'train.compile': 'off'})
    corpus = prepare(config.data, progress=False)
    config = fit_vocabulary(config, corpus)
    facts = dict(config=config.to_dict(), corpus=corpus.fingerprint, hardware=hardware(torch.device('cpu')),
                 versions=versions(), **code_state())
    try: runs = check_stamp(read_json(options.out), options.out)['runs']
    except Damaged: runs = []
    wanted = [('usual', 1, 0), ('twin', 8, 0), ('scaled', 8, 0), ('image', 8, 0), ('twin', 1 / 8, 0),
              ('slowed', 8, 0), ('scaled', 1 / 8, 0), ('slowed', 1 / 8, 0)]
    wanted += [(arm, c, seed) for seed in range(1, options.seeds) for arm, c in
               [('usual', 1), ('scaled', 8), ('scaled', 1 / 8), ('slowed', 8), ('slowed', 1 / 8)]]
    for arm, c, seed in tqdm([w for w in wanted if w not in {(r['arm'], r['c'], r['seed']) for r in runs}]):
        runs.append(measure(arm, c, seed, config, corpus))
        write_text(options.out, json.dumps(stamp(facts | dict(runs=runs)), indent=1))
