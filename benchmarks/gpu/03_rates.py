"""Which learning rate suits which depth? Short runs of every depth at half, once and twice the rate of the
scale: rates.json.

Short runs favour a rate that is ahead early: at scale `desk` they chose one that whole runs did worse with.
Half an hour has no room for whole ones, so what the depth study says of losses is to be read with that in
mind.

    python benchmarks/gpu/03_rates.py [--scale tiny --device cpu] [--out DIR]
"""
from common import DEPTHS, FACTORS, Results, base_config, begin, least_time, run_here

a = begin(__doc__)

from sparsecod.studies import vary

if __name__ == '__main__':
    results, base, spent = Results(a, 'rates'), base_config(a.scale), {}
    few = {'score.n_sequences': 4, 'score.n_fit': 8, 'score.n_jacobian': 1,
           'train.steps': base.train.steps // 10, 'measures': ()}

    def try_rate(L: int, lr: float) -> dict:
        "A tenth of the steps at one rate."
        record = run_here(a, vary(base, few | {'model.n_layers': L, 'train.lr': lr}))
        loss = (record['final']['val_loss'] or {}).get('value')
        return dict(L=L, lr=lr, status=record['status'], val_loss=loss,
                    train_seconds=record['seconds']['train'],
                    tokens_per_s=record['tokens'] / max(record['seconds']['train'], 1e-3),
                    curve=record['curve']['loss'])

    try:
        for L in DEPTHS[a.scale]:
            for factor in FACTORS:
                results.part(f'L={L}, {factor:g}', lambda: try_rate(L, factor * base.train.lr),
                             least_time(a, L))
    except KeyboardInterrupt: print('stopped; the same command goes on')
    raise SystemExit(results.end())
