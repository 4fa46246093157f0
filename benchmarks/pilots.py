"Try learning rates for every depth of a scale: python benchmarks/pilots.py --scale desk --out results"
import argparse

from sparsecod.studies import PILOTS, by_variant, run_study

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument('--scale', default='desk', help='tiny, laptop, desk or gpu')
parser.add_argument('--out', default='results', help='folder of records')
parser.add_argument('--seeds', type=int, default=1, help='how many')
parser.add_argument('--jobs', type=int, help='runs at a time')
arguments = parser.parse_args()
records = run_study(PILOTS, arguments.scale, arguments.seeds, arguments.out, arguments.jobs)
for label, runs in by_variant(PILOTS, records).items():
    print(f'{label:<16}', *(f"{r['final']['val_loss']['value']:.3f}" if r['status'] == 'finished' else r['status'] for r in runs))
