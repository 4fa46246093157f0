"""The part of README.md that comes from results/: written by `make readme`, compared by a test."""
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README, FIGURE = ROOT / 'README.md', ROOT / 'results' / 'laptop' / 'headline.png'
MARKS = '<!-- findings: written by `make readme` from results/ -->', '<!-- end of findings -->'


def table(rows: list[dict]) -> list[str]:
    "Rows of the ledger, a line a claim."
    from sparsecod.studies import statistic_text
    lines = ['| verdict | claim | statistic, 95 % interval over seeds |', '|---|---|---|']
    return lines + [f"| {r['verdict']} | {'control: ' * r['control']}{r['statement']} | {r['rule'].split('; confirmed')[0]}: {statistic_text(r)} |"
                    for r in rows]


def findings() -> str:
    "What was judged by runs: the paper's claims and what our controls contradict, then, folded, the other controls."
    from sparsecod.studies import ledger, load_results, verdict_counts
    records = load_results(ROOT / 'results', 'laptop')
    rows = [r for r in ledger(records) if r['statistic'] and r['statistic']['n']]
    first = [r for r in rows if not r['control'] or r['verdict'] == 'contradicted']
    return '\n'.join([*table(first), '', f'All of it: {verdict_counts(rows)}.', '', '<details><summary>The other controls</summary>', '',
                      *table([r for r in rows if r not in first]), '', '</details>'])


def parts(text: str) -> tuple[str, str, str]:
    "README before, inside and after the marks."
    found = re.fullmatch(f'(.*{re.escape(MARKS[0])}\n)(.*)(\n{re.escape(MARKS[1])}.*)', text, re.DOTALL)
    if not found: sys.exit(f'README.md must hold the lines {MARKS[0]} and {MARKS[1]}')
    return found.groups()


def main():
    import matplotlib
    matplotlib.use('agg')
    from sparsecod.explore import headline_figure
    from sparsecod.studies import load_results
    before, _, after = parts(README.read_text(encoding='utf-8'))
    README.write_text(before + findings() + after, encoding='utf-8')
    headline_figure(load_results(ROOT / 'results', 'laptop', 'depth'), FIGURE)


if __name__ == '__main__':
    main()
