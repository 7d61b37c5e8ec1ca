"""The mix-in for the Trainer of transformers."""

import pyro
import pytest
import torch

import pyro_sbp as sbp
from pyro_sbp.integrations.hub import save_pretrained

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
    pytest.mark.slow,
]


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    # It takes tests/datasets, which is on the path, for the package `datasets`.
    monkeypatch.setattr("transformers.trainer.is_datasets_available", lambda: False)
    pyro.clear_param_store()
    torch.manual_seed(0)


def model():
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=12, num_labels=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def sentences(count=96):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 40, (count, 8), generator=generator)
    labels = (ids[:, 1] > 20).long()
    return [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y}
        for i, y in zip(ids, labels, strict=True)
    ]


def pruner(net, **options):
    ids = torch.randint(3, 40, (2, 8))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"noise_learning_rate": 0.1, "init_log_scale": -1.0, "kl_scale": 1.0} | options
    return sbp.Pruner(net, example, 96, **options)


def trainer(net, path, pruner, **options):
    from pyro_sbp.integrations.transformers import PruneMixin

    class PruneTrainer(PruneMixin, transformers.Trainer):
        pass

    options = {"num_train_epochs": 4, "learning_rate": 5e-3, "save_strategy": "no"} | options
    arguments = transformers.TrainingArguments(
        str(path), per_device_train_batch_size=16, report_to=[], use_cpu=True,
        disable_tqdm=True, logging_strategy="no", **options,
    )  # fmt: skip
    return PruneTrainer(
        net, arguments, pruner=pruner, train_dataset=sentences(), eval_dataset=sentences(32)
    )


def test_a_model_is_trained_with_noise_and_pruned(tmp_path):
    net = model()
    noise = pruner(net, noise_learning_rate=0.3, kl_scale=20.0)
    before = {name: value.clone() for name, value in noise.state_dict().items()}
    fit = trainer(net, tmp_path, noise)
    fit.train()
    assert noise.noisy_calls == 4 * 6
    assert all(not torch.equal(noise.state_dict()[name], before[name]) for name in before)
    small = noise.prune()
    assert sum(noise.units().values()) < sum(gate.size for gate in noise.gates)
    assert sbp.count_macs(small, noise.example_input) < sbp.count_macs(net, noise.example_input)


def test_evaluation_shows_the_pruned_model(tmp_path):
    net = model()
    noise = pruner(net)
    with torch.no_grad():
        for parameter in noise.guide.log_scales.parameters():
            parameter.copy_(2 * torch.randn_like(parameter))
    fit = trainer(net, tmp_path, noise)
    noise.attach()
    shown = fit.evaluate()["eval_loss"]
    small = noise.prune()
    plain = transformers.Trainer(small, fit.args, eval_dataset=sentences(32))
    assert plain.evaluate()["eval_loss"] == pytest.approx(shown, rel=1e-4)


def test_accumulated_gradients_count_the_divergence_once(tmp_path):
    def posterior(steps):
        pyro.clear_param_store()
        torch.manual_seed(0)
        net = model()
        for parameter in net.classifier.parameters():
            torch.nn.init.zeros_(parameter)  # the likelihood has no gradient
        noise = pruner(net, init_log_scale=-9.0, kl_scale=50.0)
        fit = trainer(
            net, tmp_path, noise, gradient_accumulation_steps=steps, learning_rate=0.0,
            max_steps=1, lr_scheduler_type="constant",
        )  # fmt: skip
        fit.train()
        return noise.state_dict()

    one, several = posterior(1), posterior(3)
    for name, value in one.items():
        torch.testing.assert_close(several[name], value)


def test_a_checkpoint_holds_the_posterior(tmp_path):
    net = model()
    noise = pruner(net)
    trainer(net, tmp_path, noise, max_steps=3, save_strategy="steps", save_steps=3).train()
    found = torch.load(tmp_path / "checkpoint-3" / "posterior.pt", weights_only=True)
    again, resumed = model(), None
    other = pruner(again)
    fit = trainer(again, tmp_path, other, max_steps=3, save_strategy="no")
    fit.train(resume_from_checkpoint=True)  # nothing is left to train
    resumed = other.state_dict()
    for name, value in noise.state_dict().items():
        torch.testing.assert_close(found[name], value)
        torch.testing.assert_close(resumed[name], value)


def test_a_target_of_macs_is_followed_and_resumed(tmp_path):
    options = {"target_macs_ratio": 1.2, "num_steps": 48}
    net = model()
    noise = pruner(net, **options)
    trainer(net, tmp_path, noise, max_steps=6, save_strategy="steps", save_steps=6).train()
    again = model()
    other = pruner(again, **options)
    trainer(again, tmp_path, other, num_train_epochs=8).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-6")
    )
    steps = [p.state_dict()["macs_target"]["steps"] for p in (noise, other)]
    assert steps == [6, 48]
    small = other.prune()
    macs = [sbp.count_macs(n, noise.example_input) for n in (again, small)]
    assert macs[0] / macs[1] >= 1.2
    assert other.control.factor != 1


def test_the_noise_stays_after_training_until_it_is_pruned(tmp_path):
    net = model()
    noise = pruner(net, noise_learning_rate=0.3)
    fit = trainer(net, tmp_path, noise)
    fit.train()
    with pytest.raises(ValueError, match=r"saved while the noise of a Pruner .*pruner\.prune"):
        sbp.save(net, tmp_path / "small", type(net))
    with pytest.raises(ValueError, match=r"saved while the noise of a Pruner .*pruner\.prune"):
        save_pretrained(net, tmp_path / "hub")
    shown = fit.evaluate()["eval_loss"]
    fit.train()  # training can continue
    assert noise.attached
    after = fit.evaluate()["eval_loss"]
    assert after != pytest.approx(shown, rel=1e-4)
    small = noise.prune()
    plain = transformers.Trainer(small, fit.args, eval_dataset=sentences(32))
    assert plain.evaluate()["eval_loss"] == pytest.approx(after, rel=1e-4)


def test_the_best_model_has_the_posterior_of_its_checkpoint(tmp_path):
    net = model()
    noise = pruner(net, noise_learning_rate=0.3, kl_scale=20.0)
    fit = trainer(
        net, tmp_path, noise, save_strategy="epoch", eval_strategy="epoch", num_train_epochs=3,
        load_best_model_at_end=True, metric_for_best_model="noise", greater_is_better=False,
    )  # fmt: skip
    # The first epoch is the best one.
    fit.compute_metrics = lambda _: {"noise": fit.state.epoch}
    fit.train()
    assert fit.state.best_model_checkpoint == str(tmp_path / "checkpoint-6")
    best = torch.load(tmp_path / "checkpoint-6" / "posterior.pt", weights_only=True)
    last = torch.load(tmp_path / "checkpoint-18" / "posterior.pt", weights_only=True)
    for name, value in noise.state_dict().items():
        torch.testing.assert_close(value, best[name])
        assert not torch.equal(value, last[name])
    (tmp_path / "checkpoint-18" / "posterior.pt").unlink()
    with pytest.raises(ValueError, match=r"has no posterior\.pt, so its model was trained without"):
        fit.train(resume_from_checkpoint=str(tmp_path / "checkpoint-18"))


def test_a_pruner_of_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the pruner and the trainer have different models"):
        trainer(model(), tmp_path, pruner(model()))
