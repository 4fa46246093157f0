"""At one depth: decay on no, some and all weights; a mixture of experts with each kind of gates; context
lengths over a factor of 8: second.json.

    python benchmarks/gpu/06_second_half_hour.py [--scale tiny --device cpu] [--out DIR]

All runs at the rate that 03_rates.py found for this depth. Holds whole records, as 04_depth.py does.
"""
from common import Results, base_config, begin, best_rates, least_time, run_here

a = begin(__doc__)
DEPTH, SEEDS = dict(gpu=16, tiny=2), dict(gpu=2, tiny=1)

from sparsecod.studies import STUDIES, variant_key, vary


def runs(base, seeds: int) -> list:
    "Label and configuration of the runs of three studies, those that studies share once."
    found = {}
    for seed in range(seeds):
        for name in ('decay', 'moe', 'context'):
            for label, config in STUDIES[name].runs(base, [seed]):
                found.setdefault((variant_key(config), seed), (label, config))
    return list(found.values())


if __name__ == '__main__':
    results, L = Results(a, 'second'), DEPTH[a.scale]
    base = vary(base_config(a.scale), {'model.n_layers': L, 'train.lr': best_rates(a)[L]})
    try:
        for label, config in runs(base, SEEDS[a.scale]):
            results.part(f'{label}, seed {config.seed}', lambda: dict(record=run_here(a, config)),
                         least_time(a, L))
    except KeyboardInterrupt: print('stopped; the same command goes on from the last checkpoint')
    raise SystemExit(results.end())
