"""The commands for a GPU: they go on where they stopped, trust only what is theirs, and start models as
published."""
import json
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'benchmarks' / 'gpu'))
import common
from sparsecod.integrity import stamp
from sparsecod.studies import _DEPTHS, SCALES


@pytest.fixture
def a(tmp_path):
    for name in ('out', 'work'): (tmp_path / name).mkdir()
    return Namespace(scale='tiny', device='cpu', out=tmp_path / 'out', work=tmp_path / 'work',
                     end=time.monotonic() + 100)


def test_parts_are_made_once_and_failures_again(a):
    made = []
    def broken(): raise RuntimeError('a kernel is missing')
    def good(): return dict(value=made.append(1) or len(made))
    results = common.Results(a, 'x')
    assert results.part('one', good)['value'] == 1 and results.part('two', broken) is None
    assert results.end() == 1 and 'a kernel is missing' in results.parts['two']['error']
    again = common.Results(a, 'x')
    assert (again.part('one', good)['value'] == 1 and again.part('two', good)['value'] == 2
            and again.end() == 0)
    (a.out / 'x.json').unlink()  # what came back may be gone: the copy under work counts
    assert set(common.Results(a, 'x').parts) == {'one', 'two'}


def test_nothing_is_begun_that_would_end_too_late(a):
    results = common.Results(a, 'x')
    results.part('long', lambda: pytest.fail('begun'), seconds=200)
    assert results.late == ['long'] and results.end() == 0


@pytest.mark.parametrize('change', [dict(hardware='another card'), dict(scale='gpu'), None])
def test_files_of_another_card_or_scale_and_damaged_ones_do_not_count(a, change):
    common.Results(a, 'x').part('one', lambda: dict(value=1))
    for path in (a.out / 'x.json', a.work / 'x.json'):
        found = json.loads(path.read_text(encoding='utf-8'))
        if change: found = stamp(found | dict(facts=found['facts'] | change))
        else: found['parts']['one']['value'] = 2
        path.write_text(json.dumps(found), encoding='utf-8')
    assert common.Results(a, 'x').parts == {}


def test_each_depth_gets_its_best_rate(a):
    results = common.Results(a, 'rates')
    with pytest.raises(SystemExit, match='L=1.*not complete'): common.best_rates(a)
    for L, losses in {1: (3., 2., None), 2: (1., 2., 3.)}.items():        # None: it diverged
        for i, loss in enumerate(losses, 1):
            results.part(f'{L} {i}', lambda: dict(L=L, lr=i / 10, val_loss=loss))
    rates = common.best_rates(a)
    assert rates == {1: .2, 2: .1}
    runs = common.depth_study('tiny', rates).runs(common.base_config('tiny'), 1)
    assert [(config.model.n_layers, config.train.lr) for _, config in runs] == [(1, .2), (2, .1)]


def test_models_start_as_published():
    m, published = common.base_config('gpu').model, SCALES['paper'].model
    assert abs(m.d_model * m.init_std ** 2 - published.d_model * published.init_std ** 2) < 1e-9
    c = common.base_config('gpu')
    assert c.train.steps * c.train.tokens_per_step >= 60e6
    label, first = common.depth_study('gpu', dict.fromkeys(common.DEPTHS['gpu'], 1e-3)).runs(c, 1)[0]
    assert first.measures == ('null',) and common.DEPTHS['gpu'] == _DEPTHS['gpu']
