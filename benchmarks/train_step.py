"""How fast is a training step, against the same step of transformers' Llama?

    python benchmarks/train_step.py [--sizes small medium large] [--rounds 15] [--out results/benchmarks/train_step.json]

Both models have the same sizes, optimiser, clipping and loss, and read the same tokens. Each is timed eager
and compiled, with matrix products in fp32 and in bf16, each in a process of its own; ours as training runs
it (the stack compiled with the log's measurements, the loss a few positions at a time), and both also with
the memory of freed tensors kept, as training does. One step of each is timed in turn, so that all see the
same machine; the medians count. Time is that of the processor, which leaves out what other programs did
meanwhile. Compiling is not counted: it is paid once for a shape. """
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
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import sparsecod.compilation as compilation
from sparsecod.core import ModelConfig, Transformer
from sparsecod.integrity import check_stamp, read_json, stamp, write_text
from sparsecod.train import StreamWatch, TrainConfig, make_optimizer

SIZES = dict(small=dict(n_layers=8, d_model=64, n_heads=4, context_length=128),
             medium=dict(n_layers=8, d_model=128, n_heads=2, context_length=128),
             large=dict(n_layers=8, d_model=256, n_heads=4, context_length=256))
BARS = dict(small=1.5, medium=1.7, large=2.6)  # times the faster eager step in fp32
# kept: compiled, memory kept
MODES = (('fp32', 'eager'), ('bf16', 'eager'), ('fp32', 'compiled'), ('bf16', 'compiled'), ('bf16', 'kept'))
WAYS = tuple((owner, *mode) for owner in ('ours', 'llama') for mode in MODES)


def llama(config: ModelConfig) -> LlamaForCausalLM:
    "A Llama of the same sizes."
    c = config
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads,
        max_position_embeddings=c.context_length,
        rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, attn_implementation='sdpa', use_cache=False))


def make_step(config: ModelConfig, owner: str, precision: str, way: str, device: str = 'cpu'):
    "A function that does one training step on windows (B, T + 1) and returns the loss."
    torch.manual_seed(0)
    model = (Transformer(config) if owner == 'ours' else llama(config)).to(device)
    optimizer = make_optimizer(model, TrainConfig(steps=1))
    if owner == 'ours':
        fast = model if way == 'eager' else compilation.CompiledLoss(model)
        def loss_of(x, y):
            watch = StreamWatch(config, device) if way == 'compiled' else None
            if watch: watch.see_embedding(model.embed(x))
            return fast(x, targets=y, watch=watch)
    else:
        def plain(x, y):
            return functional.cross_entropy(model(input_ids=x).logits.float().flatten(0, 1), y.flatten())
        loss_of = torch.compile(plain, dynamic=False) if way == 'compiled' else plain
    def step(windows):
        with torch.autocast(device, torch.bfloat16, enabled=precision == 'bf16'):
            loss = loss_of(windows[:, :-1], windows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
    return step


def prepare(config: ModelConfig, tokens: int, way: tuple):
    "In a process of its own: a kind of step, and the windows that it reads."
    global step, windows, memory
    torch.set_num_threads(1)
    compilation.use_compiler_cache()
    owner, precision, mode = way
    memory = ExitStack()
    if mode == 'kept': memory.enter_context(compilation.kept_memory())
    torch.manual_seed(0)
    windows = torch.randint(config.vocab_size, (tokens // config.context_length, config.context_length + 1))
    step = make_step(config, owner, precision, 'compiled' if mode == 'kept' else mode)


def timed() -> tuple[float, float]:
    "In such a process: seconds of one step, and its loss."
    start = time.process_time()
    loss = step(windows)
    return time.process_time() - start, loss


def compare(config: ModelConfig, tokens: int, rounds: int) -> dict:
    "Tokens a second of every way, and what their second losses are."
    with ExitStack() as stack:
        workers = {way: stack.enter_context(ProcessPoolExecutor(1, get_context('spawn'), prepare,
                                                                (config, tokens, way))) for way in WAYS}
        def run(way): return workers[way].submit(timed).result()
        losses = {way: [run(way)[1] for _ in range(2)][1] for way in WAYS}
        seconds = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way in WAYS: seconds[way].append(run(way)[0])
    return {' '.join(way): dict(tokens_per_s=tokens / statistics.median(seconds[way]), loss=losses[way],
                                quartiles=[tokens / q for q in statistics.quantiles(seconds[way], n=4)[::-2]])
                                for way in WAYS}


def product_speeds(n: int = 1024, repeats: int = 9) -> dict:
    "GFLOP/s of square matrix products on one thread, by precision: what bounds a step on this machine."
    torch.set_num_threads(1)
    speeds = {}
    for name, kind in dict(fp32=torch.float32, bf16=torch.bfloat16).items():
        a, b, times = torch.randn(n, n).to(kind), torch.randn(n, n).to(kind), []
        for _ in range(repeats):
            start = time.process_time()
            a @ b
            times.append(time.process_time() - start)
        speeds[name] = 2 * n ** 3 / statistics.median(times) / 1e9
    return speeds


def summary(speeds: dict) -> dict:
    "Our fastest against the faster eager step in fp32 and against the peer's fastest."
    def best(*words):
        return max(v['tokens_per_s'] for k, v in speeds.items() if all(w in k.split() for w in words))
    eager, ours, peer = (max(best('eager', 'fp32', 'ours'), best('eager', 'fp32', 'llama')),
                         best('ours', 'bf16'), best('llama'))
    return dict(times_eager=ours / eager, times_peer=ours / peer)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sizes', nargs='+', choices=SIZES, default=list(SIZES))
    parser.add_argument('--rounds', type=int, default=15, help='steps of each kind (default: 15)')
    parser.add_argument('--tokens', type=int, default=4096, help='targets a step (default: 4096)')
    parser.add_argument('--vocab', type=int, default=2048, help='V (default: 2048)')
    parser.add_argument('--out', type=Path, help='write a JSON file')
    options = parser.parse_args()
    found = {}
    for name in options.sizes:
        config = ModelConfig(vocab_size=options.vocab, **SIZES[name])
        speeds = compare(config, options.tokens, options.rounds)
        found[name] = dict(model=config.to_dict(), speeds=speeds, bar=BARS[name], **summary(speeds))
        for way, v in speeds.items():
            print(f"{name:7} {way:20} {v['tokens_per_s']:8,.0f} tokens a second, second loss {v['loss']:.4f}",
                  flush=True)
        print(f"{name:7} {found[name]['times_eager']:.2f} times the faster eager fp32 step (bar {BARS[name]}), "
              f"{found[name]['times_peer']:.2f} times the peer's fastest", flush=True)
    if options.out:
        if options.out.exists():  # sizes may be measured one after the other
            earlier = check_stamp(read_json(options.out), options.out)
            if earlier['commit'] == commit(): found = earlier['sizes'] | found
        record = dict(sizes={name: found[name] for name in SIZES if name in found}, rounds=options.rounds,
                      tokens=options.tokens, threads=1, torch=torch.__version__,
                      python=platform.python_version(), hardware=processor(), products=product_speeds(),
                      busy=os.getloadavg()[0], commit=commit())
        write_text(options.out, json.dumps(stamp(record), indent=1))
