"""What does a compiled training step spend its time on, and what does logging cost it?

    python benchmarks/step_profile.py [--sizes small medium large mixture] [--rounds 7] [--out results/benchmarks/step_profile.json]

Eager fp32 steps, compiled bf16 steps, and compiled steps without what the log measures take turns; the
medians of the processor's time count, on one thread. Shares are those of a profile of a few compiled steps.
"""
import argparse
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from score_model import commit, processor
from torch.profiler import ProfilerActivity, profile
from train_step import SIZES, make_step

from sparsecod.compilation import kept_memory, use_compiler_cache
from sparsecod.core import ModelConfig
from sparsecod.integrity import stamp, write_text

WARM_UP = 50  # compiled steps that are not counted: they make kernels
WAYS = dict(eager=('fp32', 'eager'), compiled=('bf16', 'compiled'), unlogged=('bf16', 'unlogged'))
PARTS = {'aten::mm': 'products', 'aten::addmm': 'products', 'aten::_grouped_mm': 'products',
         'aten::bmm': 'attention', 'aten::topk': 'sorting', 'aten::sort': 'sorting'}
MODELS = SIZES | dict(mixture=SIZES['small'] | dict(n_experts=8, experts_per_token=2))


def shares(step, windows, steps: int = 3) -> dict:
    """Shares of the time of a step, by what it is spent on: a loss and an update as a whole, everything
    else by its own time."""
    spent = dict.fromkeys(('products', 'attention', 'sorting', 'fused', 'loss', 'update', 'rest'), 0.0)
    def add(event, whole=None):
        if event.name.startswith('LinearCrossEntropy'): whole = 'loss'
        elif event.name.startswith(('Optimizer.step', 'aten::_foreach')): whole = 'update'
        spent[whole or PARTS.get(event.name)
              or ('fused' if 'CompiledFxGraph' in event.name else 'rest')] += event.self_cpu_time_total
        for child in event.cpu_children: add(child, whole)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(steps): step(windows)
    for event in found.events():
        if event.cpu_parent is None: add(event)
    return {part: t / sum(spent.values()) for part, t in spent.items()}


def measure(name: str, tokens: int, rounds: int) -> dict:
    "Seconds of each kind of step of a model, and the shares of a compiled one."
    config = ModelConfig(vocab_size=2048, **MODELS[name])
    torch.set_num_threads(1)
    use_compiler_cache()
    shape = tokens // config.context_length, config.context_length + 1
    steps = {name: make_step(config, 'ours', *way) for name, way in WAYS.items()}
    seconds = {name: [] for name in WAYS}
    with kept_memory():
        for r in range(-WARM_UP, rounds):
            for name, step in steps.items():
                if name == 'eager' and -WARM_UP < r < 0: continue
                windows = torch.randint(config.vocab_size, shape)
                start = time.process_time()
                step(windows)
                if r >= 0: seconds[name].append(time.process_time() - start)
        return dict(model=config.to_dict(), seconds={name: statistics.median(s) for name, s in seconds.items()},
                    least={name: min(s) for name, s in seconds.items()}, spent=shares(steps['compiled'], windows))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sizes', nargs='+', choices=MODELS, default=list(MODELS))
    parser.add_argument('--rounds', type=int, default=7, help='steps of each kind (default: 7)')
    parser.add_argument('--tokens', type=int, default=4096, help='targets a step (default: 4096)')
    parser.add_argument('--out', type=Path, help='write a JSON file')
    options = parser.parse_args()
    found = {}
    for name in options.sizes:
        with ProcessPoolExecutor(1, get_context('spawn')) as worker:  # of its own, as a run has
            found[name] = worker.submit(measure, name, options.tokens, options.rounds).result()
        print(name, json.dumps({k: v for k, v in found[name].items() if k != 'model'}), flush=True)
        if options.out:
            record = dict(sizes=found, rounds=options.rounds, tokens=options.tokens, threads=1,
                          torch=torch.__version__,
                          hardware=processor(), commit=commit())
            write_text(options.out, json.dumps(stamp(record), indent=1))
