"""Write sparsecod/templates/vega.js, the library that draws explorers and score pages, from the package
vl-convert-python: `python tests/vega.py`."""
from pathlib import Path

FILE = Path(__file__).parents[1] / 'sparsecod' / 'templates' / 'vega.js'
NOTE = ('// Vega, Vega-Lite and Vega-Embed (BSD-3-Clause, vega.github.io) with what they need, in one file. '
        'Made by tests/vega.py.\n')


def bundle() -> str:
    "The library as one script that can stand in a page, twice too."
    import vl_convert
    text = vl_convert.javascript_bundle().replace('</script', '<\\/script')
    return f'{NOTE}window.vegaEmbed || (() => {{{text}}})()\n'


if __name__ == '__main__': FILE.write_text(bundle(), encoding='utf-8')
