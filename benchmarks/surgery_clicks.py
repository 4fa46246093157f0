"""How long does a click on the operating table take, until the loss is there?

    python benchmarks/surgery_clicks.py MODEL [--threads 2] [--out results/benchmarks/surgery_clicks.json]

MODEL is a GGUF file or a folder. Blocks from the first to the last are skipped, lose a part, change places
and are linearised, one after another, while the table writes its texts and measures in advance, as it does
between the clicks of a person. Seconds are those of the clock. """
import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import transformers
from score_model import commit, processor

from sparsecod.integrity import stamp, write_text
from sparsecod.surgery import Table
from sparsecod.widgets import surgery_widget

PAUSE = 1.5   # seconds between clicks


def click(table: Table, l: int, tool: str) -> float:
    "Seconds from the click to the loss."
    before, start = table.losses, time.perf_counter()
    table.click(l, tool)
    while table.losses is before and not table.error: time.sleep(.002)
    if table.error: raise SystemExit(f'{tool} of block {l}: {table.error}')
    found = time.perf_counter() - start
    time.sleep(PAUSE)
    return found


def measure(table: Table) -> list[dict]:
    "Every tool on blocks from the first to the last."
    L, rows = len(table.plan.places), []
    blocks = [1, *(round(L * part) for part in (.25, .5, .75)), L]
    while table.losses is None: time.sleep(.01)
    for tool in ('skip', 'no attention', 'no feed-forward'):
        for l in blocks:
            rows.append(dict(tool=tool, block=l, seconds=click(table, l, tool)))
            table.undo()
            time.sleep(PAUSE)
    for l in blocks[:-1]:
        table.click(l, 'swap')
        rows.append(dict(tool='swap', block=l, seconds=click(table, l + 1, 'swap')))
    table.wait()                                       # the affine maps are fitted in advance
    rows += [dict(tool='linear', block=l, seconds=click(table, l, 'linear')) for l in blocks]
    return rows


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', help='a GGUF file or a folder')
    parser.add_argument('--threads', type=int, default=2, help='threads of PyTorch (default: 2)')
    parser.add_argument('--out', type=Path, help='where to write the results, as JSON')
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = surgery_widget(options.model).table
    rows = measure(table)
    seconds = [row['seconds'] for row in rows]
    print(f'{len(rows)} clicks: median {statistics.median(seconds):.2f} s, slowest {max(seconds):.2f} s')
    if options.out:
        N, T = table.surgery.windows.shape
        record = dict(model=Path(options.model).name, blocks=len(table.plan.places), windows=N, T=T - 1,
                      threads=options.threads, median=statistics.median(seconds),
                      slowest=max(seconds), clicks=rows, hardware=dict(processor=processor(), device='cpu'),
                      versions=dict(torch=torch.__version__, transformers=transformers.__version__),
                      commit=commit())
        write_text(options.out, json.dumps(stamp(record), indent=1) + '\n')
