"""How long does `score_model` take on a real deep model, with all pairs of blocks swapped and with some?

    python benchmarks/score_deep.py [--layers 30] [--sequences 8] [--threads 2] [--all-pairs] [--out results/benchmarks/score_deep.json]

The model has the shape of SmolLM2-135M and random weights, since the time does not depend on them. Sampled
pairs are scored and timed, by part and in seconds of the clock and of the processor (which others on the
machine disturb less). All pairs are scored too with --all-pairs; else their time is what `expected_seconds`
says, and the record holds how far that was off for sampled pairs. """
import argparse
import json
import time
from pathlib import Path

import torch
import transformers
from score_model import commit, processor

import sparsecod.scores as scores
from sparsecod.integrity import stamp, write_text

SIZES = dict(layers=30, d_model=576, d_ff=1536, heads=9, kv_heads=3, vocab=49152, context=128, sequences=8,
             fit=64, jacobians=4, memory_mb=4096, threads=2)
PARTS = dict(maps='affine fits', base='streams', skip='skips', linear='affine replacements', swap='swaps',
             jacobian='Jacobians')


class TimedParts(scores.Parts):
    "Keeps nothing on disk, but the seconds of the processor that each part takes."
    def get(self, name, make):
        start = time.process_time()
        found = super().get(name, make)
        kind = name.split('-')[2 if name.startswith('batch') else 0]
        self.seconds[kind] += time.process_time() - start
        return found


def build(a):
    "The network, and sequences to score and to fit on."
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=a.d_model, num_hidden_layers=a.layers,
                                      num_attention_heads=a.heads, num_key_value_heads=a.kv_heads,
                                      intermediate_size=a.d_ff, vocab_size=a.vocab, tie_word_embeddings=True,
                                      max_position_embeddings=2048)
    tokens = torch.randint(a.vocab, (a.sequences + a.fit, a.context + 1))
    return transformers.LlamaForCausalLM(config).eval(), tokens[:a.sequences], tokens[a.sequences:]


def run(network, windows, fit, config, memory, pairs):
    "Score; what it took, and what it was expected to take."
    options = dict(config=config, memory=memory, pairs=pairs)
    TimedParts.seconds, scores.Parts = dict.fromkeys(PARTS, 0.0), TimedParts
    expected = scores.expected_seconds(scores.open_model(network)[0], windows, fit, **options)
    clock, used = time.perf_counter(), time.process_time()
    found = scores.score_model(network, windows, fit, progress=False, **options)
    clock, used = time.perf_counter() - clock, time.process_time() - used
    return dict(pairs=found['settings']['pairs'], seconds=clock, cpu_seconds=used, expected_seconds=expected,
                cpu_seconds_by_part=TimedParts.seconds,
                permutation=found['scalars']['permutation'], loss=found['scalars']['loss']['value'])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default,
                            help=f'default {default}')
    parser.add_argument('--all-pairs', action='store_true', help='score with all pairs as well')
    parser.add_argument('--out', type=Path, help='where to write the results, as JSON')
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    config = scores.ScoreConfig(n_sequences=a.sequences, n_fit=a.fit, n_jacobian=a.jacobians)
    network, windows, fit = build(a)
    adapted, memory = scores.open_model(network)[0], a.memory_mb * 2 ** 20
    every = scores.expected_seconds(adapted, windows, fit, config, memory, pairs=0)
    results = dict(sampled=run(network, windows, fit, config, memory, None))
    if a.all_pairs: results['all'] = run(network, windows, fit, config, memory, 0)
    plan = scores.plan_memory(adapted, len(windows), a.context, config, memory)
    units = {name: sum(scores.planned_work(adapted, windows, fit, config, plan,
                                           swapped=scores.choose_pairs(a.layers, pairs)).values())
             for name, pairs in (('sampled', None), ('all', 0))}
    for name, r in results.items():
        print(f"{name}: {r['pairs']} pairs, {r['seconds']:.0f} s, {r['cpu_seconds']:.0f} s of the processor, "
              f"expected {r['expected_seconds']:.0f} s")
    print(f"all pairs: expected {every:.0f} s; block runs {units['all']:,.0f}, sampled "
          f"{units['sampled']:,.0f}")
    if a.out:
        record = dict(sizes={name: getattr(a, name) for name in SIZES}, results=results,
                      all_pairs_expected_seconds=every, block_runs=units,
                      hardware=dict(processor=processor(), device='cpu'),
                      versions=dict(torch=torch.__version__, transformers=transformers.__version__),
                      commit=commit())
        write_text(a.out, json.dumps(stamp(record), indent=1) + '\n')


if __name__ == '__main__':
    main()
