"""What the log costs: time of a training step that is logged against one that is not.

    python benchmarks/train_logging.py [--layers 8] [--pairs 40]

Logged and plain steps alternate, so that a machine that slows down or speeds up does so for both. Prints
one line of JSON; `overhead` is the share of the training time that goes into the log at the default
interval. It should stay under 0.03. """
import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from sparsecod.core import ModelConfig
from sparsecod.train import StreamWatch, TrainConfig, find_world, _log_step, start_run, training_step


class RandomCorpus:
    "Random tokens: the time of a step does not depend on what they say."
    def __init__(self, vocab_size):
        self.vocab_size, self.fingerprint = vocab_size, 'random'

    def batch(self, step, n_sequences, T, seed):
        return torch.randint(self.vocab_size, (n_sequences, T + 1),
                             generator=torch.Generator().manual_seed(step))


def timed_step(run, logged):
    "Seconds that one step takes, with its record if it is logged."
    start = time.perf_counter()
    watch = StreamWatch(run.model.config) if logged else None
    measured, _ = training_step(run, watch)
    run.step += 1
    if logged: _log_step(run, measured, watch)
    return time.perf_counter() - start


def logging_overhead(layers=8, pairs=40):
    "Median times of plain and logged steps, and the share that logging takes at the default interval."
    model_config = ModelConfig(n_layers=layers)
    config = TrainConfig(steps=10 ** 6)
    with tempfile.TemporaryDirectory() as folder:
        run = start_run(model_config, config, RandomCorpus(model_config.vocab_size), Path(folder),
                        find_world())
        for _ in range(3): timed_step(run, logged=True)  # warm-up
        times = [(timed_step(run, False), timed_step(run, True)) for _ in range(pairs)]
    plain, logged = (statistics.median(column) for column in zip(*times))
    return dict(layers=layers, plain_ms=1e3 * plain, logged_ms=1e3 * logged, ratio=logged / plain,
                log_every=config.log_every,
                overhead=(logged / plain - 1) / config.log_every)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--layers', type=int, default=8, help='blocks of the model (default: 8)')
    parser.add_argument('--pairs', type=int, default=40,
                        help='pairs of a plain and a logged step (default: 40)')
    options = parser.parse_args()
    print(json.dumps({k: round(v, 4) for k, v in logging_overhead(options.layers, options.pairs).items()}))
