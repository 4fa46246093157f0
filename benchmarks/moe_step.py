"""How much longer does a training step of a mixture of experts take than a dense one with as many active parameters?

    python benchmarks/moe_step.py [--layers 8] [--d-model 64] [--experts 8] [--repeats 31] [--json results/benchmarks/moe_step.json]

Dense and mixture steps alternate, so that both see the same machine. Each mixture step is divided by the dense step of its own round; the
median of these ratios is what counts (the bar is 1.5), and the middle half of the rounds says how steady it is. Both by the clock on the wall
and by processor time, which leaves out the time that other programs had the processor.
"""
import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
from score_model import commit, processor

import sparsecod.moe as moe
from sparsecod.core import ModelConfig, Transformer, param_counts
from sparsecod.integrity import stamp, write_text
from sparsecod.moe import experts_grouped, experts_loop

SIZES = dict(layers=8, d_model=64, experts=8, per_token=2, tokens=4096, context=128, repeats=31, threads=1)
BAR = 1.5  # times the dense step
CLOCKS = dict(wall=time.perf_counter, processor=time.process_time)


def make(config):
    torch.manual_seed(0)
    model = Transformer(config)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def step(model, optimizer, tokens):
    "Seconds of one training step, by each clock."
    start = {name: clock() for name, clock in CLOCKS.items()}
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return {name: clock() - start[name] for name, clock in CLOCKS.items()}


def alternate(runs, tokens, repeats):
    "Seconds of each kind of step in each round; the first round, in which kernels are loaded, is left out."
    models, times, usual = {name: make(config) for name, (config, _) in runs.items()}, {name: [] for name in runs}, moe.run_experts
    for repeat in range(repeats + 1):
        for name, (_, experts) in runs.items():
            moe.run_experts = experts or usual
            seconds = step(*models[name], tokens)
            if repeat: times[name].append(seconds)
    moe.run_experts = usual
    return times


def ratio(times, dense):
    "Ratios to the dense step of the same round: median and quartiles."
    ratios = [t / d for t, d in zip(times, dense)]
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return dict(seconds=statistics.median(times), times_dense=median, quartiles=[low, high])


def summary(config, times, dense):
    "Parameters, and by each clock the time of a step and its ratio to a dense one."
    counts = param_counts(config)
    clocks = {clock: ratio([t[clock] for t in times], [d[clock] for d in dense]) for clock in CLOCKS}
    return dict(parameters=counts['total'], active_parameters=counts['active'], **clocks,
                within_bar=all(found['times_dense'] <= BAR for found in clocks.values()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in SIZES.items(): parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f'default {default}')
    parser.add_argument('--json', type=Path, help='where to write the results, as JSON')
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    dense = ModelConfig(n_layers=a.layers, d_model=a.d_model, n_heads=a.d_model // 16, context_length=a.context)
    mixture = dense.replace(n_experts=a.experts, experts_per_token=a.per_token)
    tokens = torch.randint(dense.vocab_size, (a.tokens // a.context, a.context + 1))
    runs = {'dense': (dense, None), 'grouped': (mixture, experts_grouped), 'loop': (mixture, experts_loop)}
    times = alternate(runs, tokens, a.repeats)
    results = {name: summary(config, times[name], times['dense']) for name, (config, _) in runs.items()}
    for name, r in results.items():
        print(f"{name}: {r['active_parameters']:,} active parameters")
        for clock in CLOCKS:
            seconds, times_dense, (low, high) = r[clock].values()
            print(f"  {clock:9s} {1000 * seconds:7.0f} ms a step  {times_dense:.2f} x dense (middle half of the rounds {low:.2f} to {high:.2f})")
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        record = dict(sizes={name: getattr(a, name) for name in SIZES}, bar=BAR, results=results,
                      hardware=dict(processor=processor(), cores=os.cpu_count(), device='cpu'),
                      versions=dict(python=platform.python_version(), torch=torch.__version__), commit=commit())
        write_text(a.json, json.dumps(stamp(record), indent=1) + '\n')


if __name__ == '__main__':
    main()
