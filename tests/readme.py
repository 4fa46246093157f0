"""The part of README.md that comes from results/: written by `make readme`, compared by a test."""
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README, FIGURE = ROOT / 'README.md', ROOT / 'results' / 'desk' / 'headline.png'
MARKS = '<!-- findings: written by `make readme` from results/ -->', '<!-- end of findings -->'


def counts(rows: list[dict]) -> str:
    "How many rows were confirmed, contradicted, left open, and untrained."
    return ' / '.join(str(sum(r['verdict'] == v for r in rows))
                      for v in ('confirmed', 'contradicted', 'open', 'untrained'))


def findings() -> str:
    "The rows that carry the argument, and verdicts counted by study."
    from sparsecod.claims import headlines, short_markdown, standing_ledger
    from sparsecod.studies import STUDIES, by_variant, load_results
    folder = ROOT / 'results'
    records, rows = ({scale: load_results(folder, scale) for scale in ('laptop', 'desk')},
                     standing_ledger(folder))
    lines = [short_markdown(headlines(rows)), '',
             'All of them by study, as confirmed / contradicted / open / untrained, without the rows on the '
             'size of a variance (from runs of scale desk where three seeds of them are there, else laptop):',
             '',
             "| study | its question | runs | the paper's claims | our controls |", '|---|---|---|---|---|']
    for name, study in STUDIES.items():
        mine = [r for r in rows if r['study'] == name]
        runs = sum(len(group) for scale in {r['scale'] for r in mine}
                   for group in by_variant(name, records[scale]).values())
        if not runs: continue
        lines.append(f"| {name} | {study.question} | {runs} | "
                     f"{counts([r for r in mine if not r['control']])} | "
                     f"{counts([r for r in mine if r['control']])} |")
    sums = [r for r in rows if r['study'] is None]
    lines.append(f"| - | Do the published page's own numbers add up? (arithmetic) | - | "
                 f"{counts([r for r in sums if not r['control']])} | "
                 f"{counts([r for r in sums if r['control']])} |")
    return '\n'.join(lines)


def parts(text: str) -> tuple[str, str, str]:
    "README before, inside and after the marks."
    found = re.fullmatch(f'(.*{re.escape(MARKS[0])}\n)(.*)(\n{re.escape(MARKS[1])}.*)', text, re.DOTALL)
    if not found: sys.exit(f'README.md must hold the lines {MARKS[0]} and {MARKS[1]}')
    return found.groups()


def main():
    import matplotlib
    matplotlib.use('agg')
    from sparsecod.figures import headline_figure
    from sparsecod.studies import load_results
    before, _, after = parts(README.read_text(encoding='utf-8'))
    README.write_text(before + findings() + after, encoding='utf-8')
    headline_figure(load_results(ROOT / 'results', 'desk', 'depth'), FIGURE)


if __name__ == '__main__':
    main()
