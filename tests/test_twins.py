"Models whose streams differ in size and in nothing else."
import pytest
import torch

from sparsecod.core import ModelConfig, Transformer
from sparsecod.data import Corpus
from sparsecod.train import TrainConfig, train
from sparsecod.twins import Factors, image, rescale, scaled, slowed, train_scaled, twin

CONFIG = ModelConfig(vocab_size=300, n_layers=2, d_model=16, n_heads=2, context_length=16, init_std=.1)


@pytest.fixture(scope='module')
def corpus():
    return Corpus.from_texts([f'{i} and {i + 1} are {2 * i + 1}, and {i} times {i} is {i * i}.'
                              for i in range(300)], vocab_size=300)


@pytest.mark.parametrize('changes', [{}, dict(n_experts=4), dict(n_experts=4, d_shared_expert=8),
                                     dict(norm='layernorm_scaling'), dict(n_kv_heads=1)])
@pytest.mark.parametrize('c', [1 / 4, 3.0])
def test_a_rescaled_model_computes_the_same(changes, c):
    torch.manual_seed(0)
    model = Transformer(CONFIG.replace(**changes))
    tokens = torch.randint(300, (3, 17))
    before = model(tokens[:, :-1], targets=tokens[:, 1:])
    h = model.run(model.embed(tokens[:, :-1]))
    rescale(model, c)
    assert model(tokens[:, :-1], targets=tokens[:, 1:]).item() == pytest.approx(before.item(), rel=1e-5)
    assert torch.allclose(model.run(model.embed(tokens[:, :-1])), c * h, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('changes, field',
                         [(dict(tie_embeddings=True), 'tie_embeddings'), (dict(norm='peri_ln'), 'norm')])
def test_what_has_no_twin_is_refused(changes, field):
    model = Transformer(CONFIG.replace(**changes))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=field): rescale(model, 2.)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize('changes', [{}, dict(n_experts=4)])
@pytest.mark.parametrize('groups', ['matrices', 'all'])
def test_twins_train_alike_to_the_last_bit(corpus, changes, groups):
    train_config = TrainConfig(steps=8, tokens_per_step=64, lr=2e-2, weight_decay=.5, decay_groups=groups,
                               clip=.5, precision='fp32', compile='off')
    run = lambda factors: list(train_scaled(CONFIG.replace(**changes), train_config, corpus, factors))
    plain, losses = run(Factors()), lambda steps: [loss for loss, _ in steps]
    for c in (1 / 16, 4.):
        assert losses(run(twin(c))) == losses(plain)
        assert losses(run(scaled(c))) == losses(run(image(c))) != losses(plain)
        assert losses(run(slowed(c))) != losses(plain)
    for left_out in twin(4.)._fields:                                    # each factor is needed
        assert losses(run(twin(4.)._replace(**{left_out: 1.}))) != losses(plain), left_out


def test_without_factors_it_is_plain_training(corpus, tmp_path):
    config = TrainConfig(steps=6, tokens_per_step=64, lr=1e-2, log_every=1, precision='fp32', compile='off')
    found = train(CONFIG, config, corpus, tmp_path, progress=False)
    *_, (_, model) = train_scaled(CONFIG, config, corpus)
    for a, b in zip(found.model.parameters(), model.parameters()): assert torch.allclose(a, b, atol=1e-6)
