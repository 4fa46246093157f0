"""How much longer does a training step of a mixture of experts take than a dense one with as many active
parameters?

    python benchmarks/moe_step.py [--layers 8] [--d-model 64] [--experts 8] [--repeats 31] [--json results/benchmarks/moe_step.json]

Every kind of step has a process of its own, on one thread and with the memory of freed tensors kept, as in
training; they take turns, so that all see the same machine. Each mixture step is divided by the
dense step of its own round that is computed likewise: plain in fp32, or compiled in bf16 as training
compiles it. The median of these ratios is what counts (the bars are 1.5 and 1.25), and the middle half of
the rounds says how steady it is. Both by the clock on the wall and by processor time, which leaves out the
time that other programs had the processor. """
import argparse
import json
import os
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

import torch
from score_model import commit, processor
from train_step import make_step

import sparsecod.moe as moe
from sparsecod.compilation import kept_memory, use_compiler_cache
from sparsecod.core import ModelConfig, param_counts
from sparsecod.integrity import stamp, write_text
from sparsecod.moe import experts_grouped, experts_loop

SIZES = dict(layers=8, d_model=64, experts=8, per_token=2, tokens=4096, context=128, repeats=31)
BARS = dict(eager=1.5, compiled=1.25)  # times the dense step
CLOCKS = dict(wall=time.perf_counter, processor=time.process_time)
WARM_UP = 50  # rounds: later, few numbers of rows are new to a mixture


def prepare(config: ModelConfig, tokens: int, way: str, experts):
    "In a process of its own: a kind of step, and what draws the windows that it reads."
    global step, draw, memory
    torch.set_num_threads(1)
    use_compiler_cache()
    memory = ExitStack()
    memory.enter_context(kept_memory())
    if experts: moe.run_experts = experts
    torch.manual_seed(0)
    shape = tokens // config.context_length, config.context_length + 1
    draw = lambda: torch.randint(config.vocab_size, shape)
    step = make_step(config, 'ours', 'fp32' if way == 'eager' else 'bf16', way)


def timed() -> dict:
    "In such a process: seconds of one step, on windows of its own, by each clock."
    windows = draw()
    start = {clock: now() for clock, now in CLOCKS.items()}
    step(windows)
    return {clock: now() - start[clock] for clock, now in CLOCKS.items()}


def alternate(runs: dict, tokens: int, repeats: int) -> dict:
    "Seconds of each kind of step in each round, without the first rounds, in which kernels are made."
    with ExitStack() as stack:
        workers = {name: stack.enter_context(ProcessPoolExecutor(1, get_context('spawn'), prepare,
                                                                 (config, tokens, way, experts)))
                   for name, (config, way, experts) in runs.items()}
        times = {name: [] for name in runs}
        for _ in range(WARM_UP + repeats):
            for name, worker in workers.items(): times[name].append(worker.submit(timed).result())
    return {name: found[WARM_UP:] for name, found in times.items()}


def ratio(times, dense):
    "Ratios to the dense step of the same round: median and quartiles."
    ratios = [t / d for t, d in zip(times, dense)]
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return dict(seconds=statistics.median(times), times_dense=median, quartiles=[low, high])


def summary(config, way, times, dense):
    "Parameters, and by each clock the time of a step and its ratio to a dense one."
    counts = param_counts(config)
    clocks = {clock: ratio([t[clock] for t in times], [d[clock] for d in dense]) for clock in CLOCKS}
    return dict(parameters=counts['total'], active_parameters=counts['active'], **clocks,
                within_bar=all(found['times_dense'] <= BARS[way] for found in clocks.values()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default,
                            help=f'default {default}')
    parser.add_argument('--json', type=Path, help='where to write the results, as JSON')
    a = parser.parse_args()
    dense = ModelConfig(n_layers=a.layers, d_model=a.d_model, n_heads=a.d_model // 16,
                        context_length=a.context)
    mixture = dense.replace(n_experts=a.experts, experts_per_token=a.per_token)
    runs = {'dense': (dense, 'eager', None), 'grouped': (mixture, 'eager', experts_grouped),
            'loop': (mixture, 'eager', experts_loop),
            'dense_compiled': (dense, 'compiled', None), 'compiled': (mixture, 'compiled', None)}
    times = alternate(runs, a.tokens, a.repeats)
    results = {name: summary(config, way, times[name], times['dense' if way == 'eager' else 'dense_compiled'])
               for name, (config, way, _) in runs.items()}
    for name, r in results.items():
        print(f"{name}: {r['active_parameters']:,} active parameters")
        for clock in CLOCKS:
            seconds, times_dense, (low, high) = r[clock].values()
            print(f"  {clock:9s} {1000 * seconds:7.0f} ms a step  {times_dense:.2f} x dense (middle half of "
                  f"the rounds {low:.2f} to {high:.2f})")
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        record = dict(sizes={name: getattr(a, name) for name in SIZES}, threads=1, bars=BARS, results=results,
                      hardware=dict(processor=processor(), cores=os.cpu_count(), device='cpu'),
                      versions=dict(python=platform.python_version(), torch=torch.__version__),
                      commit=commit())
        write_text(a.json, json.dumps(stamp(record), indent=1) + '\n')


if __name__ == '__main__':
    main()
