"Made-up records of runs, for tests of figures and reports. No number here was measured."
import math
import random
from copy import deepcopy

from sparsecod.studies import SCALES, STUDIES

MADE_UP = 'made up for a test'


def interval(value: float, half: float) -> dict:
    "A scalar with an interval, as `score_model` returns it."
    return dict(value=value, low=value - half, high=value + half)


def curve(L: int, rng: random.Random, steps: int) -> dict:
    "A training log, layer by layer."
    step = [1, *range(10, steps + 1, 10)]
    grow = [[(.0004 + .02 * l * (1 + l / 4) * (1 - math.exp(-s / 80))) * rng.uniform(.95, 1.05)
             for l in range(L + 1)] for s in step]
    return dict(step=step, loss=[7.6 * math.exp(-s / 60) + 4.2 + rng.uniform(-.05, .05) for s in step],
                lr=[3e-3] * len(step), grad_norm=[1.] * len(step), variance_mean=grow,
                variance_median=[[v * .9 for v in row] for row in grow],
                variance_without_first=[[v * .85 for v in row] for row in grow],
                attention_update=[[v * .2 for v in row[1:]] for row in grow],
                feed_forward_update=[[v * .5 for v in row[1:]] for row in grow])


def scores(L: int, rng: random.Random, variance: list) -> dict:
    "Scores by layer and pair, and their scalars."
    shake = lambda x: x * rng.uniform(.95, 1.05)
    pair = lambda base: [[shake(base * (1 + 1 / (l - s))) if s < l else None for l in range(1, L + 1)]
                         for s in range(1, L + 1)]
    swaps = [[shake(.5 / L / (1 + min(i, j))) if i != j else None for j in range(L)] for i in range(L)]
    swaps = [[None if i == j else swaps[min(i, j)][max(i, j)] for j in range(L)] for i in range(L)]
    arrays = dict(variance_mean=variance, variance_median=[v * .9 for v in variance],
                  variance_without_first=[v * .85 for v in variance],
                  jacobian_published=[shake(.025 / (1 + l / 4)) for l in range(L)],
                  jacobian_per_sequence=[shake(.03 / (1 + l / 4)) for l in range(L)],
                  jacobian_per_token=[shake(.05 / (1 + l / 4)) for l in range(L)],
                  usefulness_ratio=[shake(1.05 + .3 / (1 + l)) for l in range(L)],
                  linear_loss_increase=[shake(.5 / (1 + l)) for l in range(L)],
                  skip_loss_increase=[shake(.7 / (1 + l)) for l in range(L)], causal=pair(.4 / L ** .3),
                  causal_max=pair(.3 / L ** .3),
                  permutation=swaps)
    mean = lambda name: sum(v for row in arrays[name] for v in row
                            if v is not None) / max(1, sum(v is not None for row in arrays[name]
                                                           for v in row))
    useful = sum(r > 1.10 for r in arrays['usefulness_ratio']) / L
    values = dict(loss=4.4 - .01 * L, final_variance=variance[-1], final_variance_median=.9 * variance[-1],
                  final_variance_without_first=.85 * variance[-1],
                  jacobian_deviation=sum(arrays['jacobian_per_token']) / L,
                  jacobian_deviation_published=sum(arrays['jacobian_published']) / L,
                  jacobian_per_sequence=sum(arrays['jacobian_per_sequence']) / L, causal=mean('causal'),
                  causal_max=mean('causal_max'),
                  permutation=mean('permutation'), usefulness=useful,
                  linear_loss_increase=sum(arrays['linear_loss_increase']) / L,
                  skip_loss_increase=sum(arrays['skip_loss_increase']) / L)
    for name in ('causal', 'permutation'):  # blocks 2 .. L only
        rest = [v for row in arrays[name][1:] for v in row[1:] if v is not None]
        if rest: values[f'{name}_without_block_1'] = sum(rest) / len(rest)
    return dict(scalars={k: interval(v, .1 * abs(v)) for k, v in values.items()}, arrays=arrays,
                settings=dict(n_sequences=8, T=128))


def record(
    L: int,               # blocks
    seed: int = 0,
    steps: int = 200,
    diverged: bool = False,
    **changes,            # of the training configuration
) -> dict:
    "The record of a run that never happened."
    rng = random.Random(1000 * L + seed)
    log = curve(L, rng, steps)
    made = dict(
        schema=1, name=f'L{L}_D64_T128_seed{seed}', id=f'{rng.randrange(16 ** 8):08x}', scale='laptop',
        seed=seed, status='finished',
        config=dict(model=dict(n_layers=L, d_model=64, n_heads=4, context_length=128, vocab_size=2048,
                               norm='pre_ln'),
                    train=dict(dict(steps=steps, tokens_per_step=4096, lr=3e-3, weight_decay=.1, seed=seed),
                               **changes),
                    data=dict(source='stdlib', vocab_size=2048), score=dict(threshold=1.10, n_sequences=32)),
        step=steps, tokens=steps * 4096, seconds=dict(train=20. * L, score=2. * L), curve=log,
        final=dict(val_loss=interval(4.4 - .01 * L, .05), perplexity=math.exp(4.4 - .01 * L),
                   unigram_loss=6.4), floors=dict(frequencies=6.4, pairs=5.2, triples=4.9),
        scores=scores(L, rng, log['variance_mean'][-1]),
        provenance=dict(hardware=MADE_UP, cores=2, threads=1, device='cpu', python='3.11', torch='2.13.0',
                        sparsecod='0.1.0',
                        versions=dict(numpy='2.4.6'), commit='0' * 40, dirty=True, date='2026-01-01T00:00:00',
                        corpus_fingerprint='f' * 16,
                        corpus_stats=dict(documents=100, duplicates=3, train_tokens=10 ** 6,
                                          val_tokens=10 ** 5)))
    return ends_early(made) if diverged else made


def ends_early(made: dict) -> dict:
    "The same run, had its loss become infinite half-way."
    made = deepcopy(made)
    half = len(made['curve']['step']) // 2
    for name, values in made['curve'].items(): made['curve'][name] = values[:half]
    made['curve']['loss'][-1] = None
    made.update(status='diverged', step=made['curve']['step'][-1])
    made['final'].update(val_loss=None, perplexity=None)
    made['curve']['variance_mean'][-1] = None  # the step that found the loss infinite measured no variances
    del made['scores']
    return made


def depth_study(seeds: int = 3, depths=(2, 4, 8, 16)) -> list:
    "Records of a whole depth study."
    return [record(L, seed) for L in depths for seed in range(seeds)]


def variants(study='gqa', seeds=(0, 1, 2), diverged=(), missing=()):
    "Made-up records of a study at laptop scale; `diverged` holds (label, seed), `missing` labels."
    made = []
    for i, (name, config) in enumerate(STUDIES[study].runs(SCALES['laptop'], seeds)):
        if name in missing: continue
        L, T = config.model.n_layers, config.model.context_length
        r = (record(L, config.seed, diverged=(name, config.seed) in diverged)
             | dict(name=f'{study}-{i}', config=config.to_dict()))
        if r['status'] == 'finished':
            k = list(STUDIES[study].changes(SCALES['laptop'])).index(name)
            r['sparsity'] = dict(scalars=dict(density_attention=1 - .1 * k, density_feed_forward=.9),
                                 arrays={})
            r['cloze'] = dict(accuracy=interval(.3 + .01 * k, .1))
            r['final'] = r['final'] | dict(val_loss=interval(4 + .5 * k + .1 * config.seed * (1 + k), .05),
                                           unigram_loss=99.)
            r['scores']['scalars']['final_variance'] = interval(2. ** (k + config.seed * (k == 1)), .01)
            r['lengths'] = {str(n): dict(val_loss=interval(4 + k + i / n, .1),
                                         final_variance=interval(1 + k, .1)) for n in (T // 2, T, 2 * T)}
        made.append(r)
    return made
