"""Does a run in compiled bf16 end where the same run in plain fp32 does?

    python benchmarks/precision.py [--steps 300] [--seeds 1] [--out results/benchmarks/precision.json]

Model, data and rate are those of scale desk. Two runs of each seed read the same tokens; the difference of
their held-out losses has an interval over the sequences, and the bar is 0.02 nats. """
import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from score_model import commit, processor

from sparsecod.data import prepare
from sparsecod.integrity import stamp, write_text
from sparsecod.intervals import mean_estimate
from sparsecod.studies import SCALES, vary
from sparsecod.train import evaluate, train

BAR = 0.02   # nats


def losses(config, corpus, windows) -> tuple[torch.Tensor, float]:
    "Held-out loss of each sequence, (N,), and the seconds of the processor that the training took."
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        model = train(config.model, config.train, corpus, folder).model
        return evaluate(model, windows), time.process_time() - start


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=300, help='steps of a run (default: 300)')
    parser.add_argument('--seeds', type=int, default=1, help='how many seeds (default: 1)')
    parser.add_argument('--out', type=Path, help='where to write the results, as JSON')
    options = parser.parse_args()
    desk = vary(SCALES['desk'], {'train.steps': options.steps})
    corpus, rows = prepare(desk.data, progress=False), []
    for seed in range(options.seeds):
        config = vary(desk, {'seed': seed})
        windows = corpus.sample_windows('val', config.n_eval, config.model.context_length, seed)
        fast, fast_seconds = losses(config, corpus, windows)
        plain, plain_seconds = losses(vary(config, {'train.precision': 'fp32', 'train.compile': 'off'}),
                                      corpus, windows)
        rows.append(dict(seed=seed, plain=plain.mean().item(), fast=fast.mean().item(),
                         difference=mean_estimate(fast - plain), times=plain_seconds / fast_seconds))
        print(rows[-1], flush=True)
    if options.out:
        m = desk.model
        record = dict(steps=options.steps, tokens_per_step=desk.train.tokens_per_step, model=m.to_dict(),
                      bar=BAR, rows=rows, corpus=corpus.fingerprint,
                      hardware=dict(processor=processor(), device='cpu'),
                      versions=dict(torch=torch.__version__), commit=commit())
        write_text(options.out, json.dumps(stamp(record), indent=1) + '\n')
