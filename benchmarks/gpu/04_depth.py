"""The depth study, each depth at its own best rate of the sweep, shallow models first, one seed after the
other: depth.json.

    python benchmarks/gpu/04_depth.py [--scale tiny --device cpu] [--out DIR]

Holds whole records; `python benchmarks/gpu/unpack.py` puts them into results/gpu, where the chapters look.
"""
from common import Results, base_config, begin, best_rates, depth_study, least_time, run_here

a = begin(__doc__)
SEEDS = dict(gpu=2, tiny=1)

if __name__ == '__main__':
    results, rates = Results(a, 'depth'), best_rates(a)
    print('rates:', rates)
    try:
        for label, config in depth_study(a.scale, rates).runs(base_config(a.scale), SEEDS[a.scale]):
            results.part(f'{label}, seed {config.seed}', lambda: dict(record=run_here(a, config)),
                         least_time(a, config.model.n_layers))
    except KeyboardInterrupt: print('stopped; the same command goes on from the last checkpoint')
    raise SystemExit(results.end())
