"""How much longer does a training step of a mixture of experts take than a dense one with as many active parameters?

    python benchmarks/moe_step.py [--layers 8] [--d-model 64] [--experts 8] [--repeats 5]

Dense and mixture steps alternate, so that both see the same machine; the medians and their ratio are printed.
"""
import argparse
import statistics
import time

import torch

from sparsecod.core import ModelConfig, Transformer, param_counts
from sparsecod.moe import experts_grouped, experts_loop
import sparsecod.moe as moe


def make(config):
    torch.manual_seed(0)
    model = Transformer(config)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def step(model, optimizer, tokens):
    start = time.perf_counter()
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in dict(layers=8, d_model=64, experts=8, per_token=2, tokens=4096, context=128, repeats=5, threads=1).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f'default {default}')
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    dense = ModelConfig(n_layers=a.layers, d_model=a.d_model, n_heads=a.d_model // 16, context_length=a.context)
    mixture = dense.replace(n_experts=a.experts, experts_per_token=a.per_token)
    tokens = torch.randint(dense.vocab_size, (a.tokens // a.context, a.context + 1))
    runs = {'dense': (dense, None), 'mixture, grouped': (mixture, experts_grouped), 'mixture, loop': (mixture, experts_loop)}
    models, times, default = {name: make(c) for name, (c, _) in runs.items()}, {name: [] for name in runs}, moe.run_experts
    for repeat in range(a.repeats + 1):                     # the first round warms up
        for name, (_, run) in runs.items():
            moe.run_experts = run or default
            seconds = step(*models[name], tokens)
            if repeat: times[name].append(seconds)
    base = statistics.median(times['dense'])
    for name, (config, _) in runs.items():
        t = statistics.median(times[name])
        print(f"{name:18s} {param_counts(config)['active']:>10,} active parameters  {1000 * t:7.0f} ms a step  {t / base:.2f} x dense")


if __name__ == '__main__':
    main()
