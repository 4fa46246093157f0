"""At one depth: decay on no, some and all weights; a mixture of experts with each kind of gates; context lengths over a factor of 8: second.json.

    python benchmarks/gpu/06_second_half_hour.py [--scale tiny --device cpu] [--out DIR]

All runs at the rate that 03_rates.py found for this depth. Holds whole records, as 04_depth.py does.
"""
from common import Results, base_config, begin, best_rates, least_time, run_here

a = begin(__doc__)
DEPTH, SEEDS, LENGTHS = dict(gpu=16, tiny=2), dict(gpu=2, tiny=1), dict(gpu=(128, 1024), tiny=(16, 128))

from sparsecod.studies import Study, equivalent_decay, length_changes, moe_variants, vary


def variants(base) -> dict[str, dict]:
    "What each run changes."
    decay = equivalent_decay(base.train, .1)
    groups = {'λ=0.1': 'matrices', 'λ=0.1, all': 'all', 'λ=0.1, all but gains': 'all_but_gains'}
    found = {'λ=0': {'train.weight_decay': 0.}} | {label: {'train.weight_decay': decay, 'train.decay_groups': group} for label, group in groups.items()}
    shared = found['λ=0.1']
    found |= {label: shared | changes for label, changes in moe_variants(base).items() if label != 'dense'}
    return found | {f'T={T}': shared | length_changes(base, T) for T in LENGTHS[a.scale]}


if __name__ == '__main__':
    results, L = Results(a, 'second'), DEPTH[a.scale]
    base = vary(base_config(a.scale), {'model.n_layers': L, 'train.lr': best_rates(a)[L]})
    try:
        for label, config in Study('sources', 'What do decay, gates and length change?', variants).runs(base, SEEDS[a.scale]):
            results.part(f'{label}, seed {config.seed}', lambda: dict(record=run_here(a, config)), least_time(a, L))
    except KeyboardInterrupt: print('stopped; the same command goes on from the last checkpoint')
    raise SystemExit(results.end())
