"""Twins in fp32, and a real deep model scored in full, with its time: twins.json and real_model.json.

    python benchmarks/gpu/05_twins_and_real_model.py [--model FOLDER] [--scale tiny --device cpu] [--out DIR]

Twins are equal to the last bit where a computation is repeatable. On a GPU it may not be, so an arm is run
twice, and the twins may differ as much as that. Without --model, the deep model has the shape of
SmolLM2-135M and random weights, on which the time does not depend. """
import time
from types import SimpleNamespace

from common import Results, base_config, begin

a = begin(__doc__, 'folder of a model of the transformers library, with its tokenizer')

import score_deep
import torch

from sparsecod.data import prepare
from sparsecod.scores import ScoreConfig, expected_seconds, open_model, score_model
from sparsecod.studies import fit_vocabulary, vary
from sparsecod.twins import Factors, train_scaled, twin

ARMS = {'usual': Factors(), 'usual again': Factors(), 'twin, c = 8': twin(8), 'twin, c = 1/8': twin(1 / 8)}
TINY_MODEL = dict(score_deep.SIZES, layers=3, d_model=32, d_ff=64, heads=2, kv_heads=1, vocab=64, context=16,
                  sequences=2, fit=4, jacobians=1)


def setting():
    "The run that is twinned, and its corpus."
    base = base_config(a.scale)
    size = ({'model.n_layers': 16, 'train.steps': 150, 'train.tokens_per_step': 2 ** 14} if a.scale == 'gpu'
            else {'model.n_layers': 2, 'train.steps': 8})
    config = vary(base, size | {'train.precision': 'fp32', 'train.compile': 'off',
                                'train.micro_batch_tokens': None})
    corpus = prepare(config.data, progress=False)
    return fit_vocabulary(config, corpus), corpus


def arm(name: str) -> dict:
    "Train one arm; its losses, and its scores."
    config, corpus = setting()
    losses = []
    for loss, model in train_scaled(config.model, config.train, corpus, ARMS[name], a.device):
        losses.append(loss)
    T, score = config.model.context_length, ScoreConfig(n_sequences=4, n_fit=8, n_jacobian=1)
    windows, fit = corpus.sample_windows('val', 12, T, 0).split([4, 8])
    found = score_model(model, windows, fit, score, progress=False)
    return dict(losses=losses, variance_median=found['arrays']['variance_median'],
                scalars={key: s['value'] for key, s in found['scalars'].items()})


def differences(parts: dict) -> dict:
    "How far the other arms are from the usual one: losses, and scores other than variances, relative."
    usual, found = parts['usual'], {}
    for name in ARMS:
        other = parts[name]
        scores = {k: abs(other['scalars'][k] - v) / max(abs(v), 1e-9) for k, v in usual['scalars'].items()
                  if v is not None and 'variance' not in k}
        found[name] = dict(losses=max(abs(x - y) for x, y in zip(usual['losses'], other['losses'])),
                           scores=max(scores.values()),
                           variance_ratio=other['variance_median'][-1] / usual['variance_median'][-1])
    return found


def deep(pairs: int | None) -> dict:
    "Score a deep model; what it took and what was expected."
    sizes = SimpleNamespace(**(score_deep.SIZES if a.scale == 'gpu' else TINY_MODEL))
    config = ScoreConfig(n_sequences=sizes.sequences, n_fit=sizes.fit, n_jacobian=sizes.jacobians)
    network, windows, fit = score_deep.build(sizes)
    if a.model:
        network, tokenizer = open_model(a.model)
        data = prepare(base_config(a.scale).data, progress=False)
        text = ''.join(data.tokenizer.decode(w.tolist()) for w in data.sample_windows('val', 400, 256, 0))
        n = sizes.sequences + sizes.fit
        windows, fit = torch.tensor(tokenizer.encode(text)[:n * (sizes.context + 1)]).view(n, -1).split(
            [sizes.sequences, sizes.fit])
    network = network.to(a.device)
    if a.device == 'cuda': torch.cuda.reset_peak_memory_stats()
    adapted = open_model(network)[0]
    expected = expected_seconds(adapted, windows, fit, config, pairs=pairs)
    start = time.perf_counter()
    found = score_model(network, windows, fit, config, progress=False, pairs=pairs)
    return dict(model=a.model or 'random weights', sizes=vars(sizes), pairs=found['settings']['pairs'],
                scoring_seconds=time.perf_counter() - start, expected_seconds=expected,
                peak_memory=torch.cuda.max_memory_allocated() if a.device == 'cuda' else None,
                scores=found if a.model else None,
                scalars={key: s['value'] for key, s in found['scalars'].items()})


if __name__ == '__main__':
    twins, real = Results(a, 'twins'), Results(a, 'real_model')
    for name in ARMS: twins.part(name, lambda: arm(name), 60 if a.scale == 'gpu' else 1)
    if all('losses' in twins.parts.get(name, {}) for name in ARMS):
        twins.part('differences', lambda: differences(twins.parts), 0)
    for name, pairs in {'sampled pairs': None, 'all pairs': 0}.items():
        real.part(name, lambda: deep(pairs), 60 if a.scale == 'gpu' else 1)
    raise SystemExit(max(twins.end(), real.end()))
