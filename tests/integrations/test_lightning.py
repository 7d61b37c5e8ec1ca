"""The callback of Lightning."""

import warnings
from types import SimpleNamespace

import pyro
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_sbp as sbp

lightning = pytest.importorskip("lightning.pytorch")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
    pytest.mark.slow,
]


def network():
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()
        self.sizes = []

    def training_step(self, batch, index):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        self.sizes.append(sum(p.numel() for p in self.parameters()))
        return torch.optim.Adam(self.parameters(), 1e-2)


@pytest.fixture(autouse=True)
def seeded():
    pyro.clear_param_store()
    torch.manual_seed(0)


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 6, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return DataLoader(TensorDataset(x, y), batch_size=32)


def callback(start=1, end=6, **options):
    from pyro_sbp.integrations.lightning import PruneCallback

    options = {"kl_scale": 2.0, "noise_learning_rate": 0.1, "init_log_scale": -1.0} | options
    return PruneCallback("net", torch.randn(4, 6), start, end, **options)


def strong(start=0, end=2, **options):
    """A callback that removes units within two epochs."""
    return callback(start, end, **{"kl_scale": 20.0, "noise_learning_rate": 0.3} | options)


def trainer(path, *callbacks, epochs=8, **options):
    return lightning.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=path, **options,
    )  # fmt: skip


def test_the_network_becomes_smaller_and_goes_on_with_an_optimizer_of_its_own(tmp_path):
    module, prune = Module(), callback()
    before = module.net
    fit = trainer(tmp_path, prune, epochs=16, enable_checkpointing=False)
    fit.fit(module, data())
    assert module.net is not before
    kept = prune.pruner.units()["0"]
    assert 0 < kept < 24 and module.net[0].out_features == kept
    assert module.sizes == [24 * 7 + 3 * 25, kept * 7 + 3 * (kept + 1)]
    trained = {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in module.net.parameters()}
    assert float(fit.callback_metrics["units/0"]) == kept
    x, y = data().dataset.tensors
    assert float((module.net(x).argmax(1) == y).float().mean()) > 0.8


def test_the_divergence_counts_once_a_step_with_accumulated_gradients(tmp_path):
    def posterior(batches):
        pyro.clear_param_store()
        torch.manual_seed(0)
        module, prune = Module(), callback(0, 1, init_log_scale=-9.0, kl_scale=50.0)
        for parameter in module.net[2].parameters():
            torch.nn.init.zeros_(parameter).requires_grad_(False)  # the likelihood has no gradient
        fit = trainer(
            tmp_path, prune, epochs=1, accumulate_grad_batches=batches,
            enable_checkpointing=False, max_steps=2,
        )  # fmt: skip
        fit.fit(module, data())
        return prune.pruner.state_dict()

    one, several = posterior(1), posterior(4)
    for name, value in one.items():
        torch.testing.assert_close(several[name], value)


def test_a_checkpoint_of_an_epoch_with_noise_is_resumed(tmp_path):
    class Stop(lightning.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 2

    first, module = callback(1, 6), Module()
    fit = trainer(tmp_path, first, Stop(), epochs=6)
    fit.fit(module, data())
    path = tmp_path / "noise.ckpt"
    fit.save_checkpoint(path)
    stopped = {name: value.clone() for name, value in first.pruner.state_dict().items()}
    pyro.clear_param_store()
    second, resumed = callback(1, 6), []

    class Watch(lightning.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if not resumed:
                state = second.pruner.state_dict()
                resumed.append({name: value.clone() for name, value in state.items()})

    module = Module()
    trainer(tmp_path, second, Watch(), epochs=7, enable_checkpointing=False).fit(
        module, data(), ckpt_path=path, weights_only=False
    )
    for name, value in resumed[0].items():
        torch.testing.assert_close(value, stopped[name])
    assert module.net[0].out_features < 24


def stop_after(epoch):
    class Stop(lightning.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == epoch

    return Stop()


class Validated(Module):
    def validation_step(self, batch, index):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    test_step = validation_step

    def predict_step(self, batch):
        return self.net(batch[0])


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """A checkpoint of an epoch with noise, and the outputs of its pruned network."""
    path = tmp_path_factory.mktemp("noisy")
    pyro.clear_param_store()
    torch.manual_seed(0)
    module, prune = Validated(), callback(1, 6)
    fit = trainer(path, prune, stop_after(3), enable_checkpointing=False)
    fit.fit(module, data())
    file = path / "noise.ckpt"
    fit.save_checkpoint(file)
    small = prune.pruner.prune().eval()
    with torch.no_grad():
        return file, small(data().dataset.tensors[0])


@pytest.mark.parametrize("options", [{}, {"max_steps": 20}], ids=["stopped", "steps"])
def test_a_fit_that_ends_with_noise_warns_and_the_network_is_not_saved(tmp_path, options):
    module, prune = Module(), callback(1, 6)
    stops = [] if options else [stop_after(2)]
    fit = trainer(tmp_path, prune, *stops, epochs=6, enable_checkpointing=False, **options)
    with pytest.warns(UserWarning, match=r"ended after 3 epochs, before end_epoch = 6: .* 'net'"):
        fit.fit(module, data())
    with pytest.raises(ValueError, match=r"saved while the noise of a Pruner .*pruner\.prune"):
        sbp.save(module.net, tmp_path / "small", constructor=network)
    shown = module.eval().net(x := data().dataset.tensors[0])
    module.net = prune.pruner.prune()
    sbp.save(module.net, tmp_path / "small", constructor=network)
    same = sbp.load(tmp_path / "small", constructor=network)
    torch.testing.assert_close(same(x), shown)
    # The network is pruned now, so a further fit only fine-tunes it.
    kept = module.net.train()
    trainer(tmp_path, prune, epochs=8, enable_checkpointing=False).fit(module, data())
    assert module.net is kept


def test_a_fit_that_ends_before_the_noise_warns(tmp_path):
    with pytest.warns(UserWarning, match="ended after 2 epochs, .* is not pruned; train until"):
        trainer(tmp_path, callback(3, 6), stop_after(1), enable_checkpointing=False).fit(
            Module(), data()
        )


def test_a_fit_until_the_cut_does_not_warn(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, callback(1, 6), epochs=6, enable_checkpointing=False).fit(
            Module(), data()
        )
    assert not [w for w in caught if "prune" in str(w.message)]


@pytest.mark.parametrize("what", ["validate", "test"])
def test_a_checkpoint_with_noise_is_measured_as_its_pruned_network(noisy, tmp_path, what):
    file, output = noisy
    prune = callback(1, 6)
    measure = trainer(tmp_path, prune, enable_checkpointing=False)
    (found,) = getattr(measure, what)(
        module := Validated(), data(), ckpt_path=file, verbose=False, weights_only=False
    )
    expected = float(F.cross_entropy(output, data().dataset.tensors[1]))
    assert found["val_loss"] == pytest.approx(expected, rel=1e-4)
    # The pruned network of the checkpoint is at hand.
    small = prune.pruner.prune().eval()
    torch.testing.assert_close(small(data().dataset.tensors[0]), output)
    assert small is not module.net


def test_predictions_of_a_checkpoint_with_noise_are_those_of_its_pruned_network(noisy, tmp_path):
    file, output = noisy
    measure = trainer(tmp_path, callback(1, 6), enable_checkpointing=False)
    found = measure.predict(Validated(), data(), ckpt_path=file, weights_only=False)
    torch.testing.assert_close(torch.cat(found), output)


def test_noise_in_memory_does_not_stay_on_the_weights_of_a_checkpoint(noisy, tmp_path):
    module, prune = Validated(), callback(1, 6)
    fit = trainer(tmp_path, prune, stop_after(0), enable_checkpointing=False)
    fit.fit(module, data())
    before = tmp_path / "dense.ckpt"
    fit.save_checkpoint(before)
    with torch.no_grad():
        dense = module.eval().net(x := data().dataset.tensors[0])
    module.train()
    trainer(tmp_path, prune, stop_after(2), enable_checkpointing=False).fit(
        module, data(), ckpt_path=before, weights_only=False
    )
    assert prune.pruner.attached
    measure = trainer(tmp_path, prune, enable_checkpointing=False)
    for file, expected in [(before, dense), noisy]:
        found = measure.predict(module, data(), ckpt_path=file, weights_only=False)
        torch.testing.assert_close(torch.cat(found), expected)
    assert prune.pruner.net(x).shape == (256, 3)


def test_training_goes_on_after_the_measurement_of_a_checkpoint(noisy, tmp_path):
    file, _ = noisy
    module, prune = Validated(), callback(0, 2)
    measure = trainer(tmp_path, prune, enable_checkpointing=False)
    measure.validate(module, data(), ckpt_path=file, verbose=False, weights_only=False)
    stated = {name: value.clone() for name, value in prune.pruner.state_dict().items()}
    fit = trainer(tmp_path, prune, stop_after(0), epochs=2, enable_checkpointing=False)
    fit.fit(module, data())
    assert prune.pruner.noisy_calls == 8 and prune.pruner.model.num_data == 256
    assert all(not torch.equal(prune.pruner.state_dict()[name], stated[name]) for name in stated)


def test_a_checkpoint_with_weights_only_warns(tmp_path):
    module, prune = Validated(), callback(1, 6)
    checkpoints = lightning.callbacks.ModelCheckpoint(tmp_path, save_weights_only=True)
    fit = trainer(tmp_path, prune, checkpoints, stop_after(2))
    with pytest.warns(UserWarning, match="with save_weights_only, the checkpoints of epochs with"):
        fit.fit(module, data())
    measure = trainer(tmp_path, callback(1, 6), enable_checkpointing=False)
    with pytest.warns(UserWarning, match="has only weights, so it is not known whether"):
        measure.validate(Validated(), data(), ckpt_path=checkpoints.best_model_path, verbose=False)


@pytest.mark.parametrize("at_validation", [False, True])
def test_checkpoints_of_the_last_epoch_with_noise(tmp_path, at_validation):
    """A checkpoint at the end of the training epoch is written after the cut, one at the end of
    the validation before the cut."""
    saved = lightning.callbacks.ModelCheckpoint(
        tmp_path, monitor="val_loss", save_top_k=-1, save_on_train_epoch_end=not at_validation
    )
    module = Validated()
    fit = trainer(tmp_path, strong(1, 3), saved, epochs=3)
    fit.fit(module, data(), data())
    (last,) = tmp_path.glob("epoch=2-*.ckpt")
    weights = torch.load(last, weights_only=False)["state_dict"]["net.0.weight"]
    assert (len(weights) == 24) == at_validation and len(module.net[0].weight) < 24
    if at_validation:  # training is resumed at the cut
        second = Validated()
        trainer(tmp_path, strong(1, 3), epochs=4, enable_checkpointing=False).fit(
            second, data(), data(), ckpt_path=last, weights_only=False
        )
        assert second.net[0].out_features == module.net[0].out_features


def test_a_later_checkpoint_is_loaded_into_the_pruned_network(tmp_path):
    module = Validated()
    fit = trainer(tmp_path, strong(1, 3), epochs=5, enable_checkpointing=False)
    fit.fit(module, data())
    last = tmp_path / "last.ckpt"
    fit.save_checkpoint(last)
    sbp.save(module.net, tmp_path / "small", constructor=network)
    with pytest.raises(RuntimeError, match=r"'net' of the checkpoint is pruned; before loading it"):
        trainer(tmp_path, strong(1, 3), epochs=7).fit(
            Validated(), data(), ckpt_path=last, weights_only=False
        )
    resumed = Validated()
    resumed.net = sbp.load(tmp_path / "small", constructor=network).train()
    small = resumed.net
    trainer(tmp_path, strong(1, 3), epochs=7, enable_checkpointing=False).fit(
        resumed, data(), ckpt_path=last, weights_only=False
    )
    assert resumed.net is small
    before = tmp_path / "before.ckpt"
    fit = trainer(tmp_path, callback(3, 6), stop_after(0), enable_checkpointing=False)
    fit.fit(Validated(), data())
    fit.save_checkpoint(before)
    with pytest.raises(RuntimeError, match="of the module is pruned, and that of the checkpoint"):
        trainer(tmp_path, strong(1, 3)).test(resumed, data(), ckpt_path=before, weights_only=False)


def test_a_callback_is_used_again_for_a_new_module(tmp_path):
    prune = strong()
    for _ in range(2):
        module = Module()
        trainer(tmp_path, prune, epochs=2, enable_checkpointing=False).fit(module, data())
        assert module.net[0].out_features < 24


def test_noise_stays_if_another_callback_looks_at_the_pruned_network(tmp_path):
    prune, sizes = strong(0, 3), []

    class Look(lightning.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch < 2:
                sizes.append(prune.pruner.prune()[0].out_features)

    module = Module()
    trainer(tmp_path, prune, Look(), epochs=3, enable_checkpointing=False).fit(module, data())
    assert prune.pruner.noisy_calls == 3 * 8 and len(sizes) == 2
    assert module.net[0].out_features == max(prune.pruner.units()["0"], 1) < 24


def test_budgets_are_options(tmp_path):
    x = torch.randn(4, 6)
    for options in ({"macs_ratio": 3}, {"what": {"macs_ratio": 3}}):
        module = Module()
        macs = sbp.count_macs(module.net, x)
        prune = strong(round_to=2, **options)
        trainer(tmp_path, prune, epochs=2, enable_checkpointing=False).fit(module, data())
        assert sbp.count_macs(module.net, x) <= macs / 3
        assert module.net[0].out_features % 2 == 0
    with pytest.raises(ValueError, match="macs_ratio is given twice, also in what"):
        callback(macs_ratio=3, what={"macs_ratio": 2})
    with pytest.raises(ValueError, match=r"macs_ratio is 0\.5; expected a number >= 1"):
        callback(macs_ratio=0.5)
    with pytest.raises(TypeError, match=r"no option 'kl_scal'; expected some of .*kl_scale"):
        callback(kl_scal=2)
    with pytest.raises(TypeError, match="what has 'kl_scale'; expected some of threshold, "):
        callback(what={"kl_scale": 2})


def macs_ratio(small):
    dense = network()
    x = torch.randn(4, 6)
    return sbp.count_macs(dense, x) / sbp.count_macs(small, x)


def test_a_target_of_macs_is_reached_in_the_epochs_with_noise(tmp_path):
    module, prune = Module(), callback(1, 11, target_macs_ratio=4)
    loader = DataLoader(data().dataset, batch_size=20)  # 13 batches, the last one is smaller
    fit = trainer(tmp_path, prune, epochs=12, accumulate_grad_batches=2, enable_checkpointing=False)
    fit.fit(module, loader)
    state = prune.pruner.state_dict()["macs_target"]
    assert state["steps"] == state["num_steps"] == 10 * 7
    assert 4 <= macs_ratio(module.net) <= 4.8  # the ratio with 6 of 24 units, or with 5
    assert not prune.pruner.target.far


def test_a_target_of_macs_is_resumed_from_a_checkpoint(tmp_path):
    options = {"target_macs_ratio": 4, "num_data": 256}
    first, module = callback(0, 10, **options), Module()
    fit = trainer(tmp_path, first, stop_after(5), epochs=10, enable_checkpointing=False)
    fit.fit(module, data())
    path = tmp_path / "noise.ckpt"
    fit.save_checkpoint(path)
    stopped = first.pruner.control.state_dict()
    second, measured, module = callback(0, 10, **options), callback(0, 10, **options), Validated()
    trainer(tmp_path, measured, enable_checkpointing=False).validate(
        module, data(), ckpt_path=path, verbose=False, weights_only=False
    )
    assert measured.pruner.control.state_dict() == stopped
    module = Module()
    trainer(tmp_path, second, epochs=10, enable_checkpointing=False).fit(
        module, data(), ckpt_path=path, weights_only=False
    )
    state = second.pruner.state_dict()["macs_target"]
    assert state["steps"] == state["num_steps"] == 80
    assert 4 <= macs_ratio(module.net) <= 4.8


def test_targets_that_cannot_be_followed_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"target_macs_ratio is 0\.5; expected a number >= 1"):
        callback(target_macs_ratio=0.5)
    with pytest.raises(ValueError, match="num_steps is 9, and has no effect without a target"):
        callback(num_steps=9)
    with pytest.raises(ValueError, match="target_macs_ratio and macs_ratio are given, which"):
        callback(target_macs_ratio=4, macs_ratio=2)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from data().dataset

    loader = DataLoader(Stream(), batch_size=32)
    options = {"target_macs_ratio": 4, "num_data": 256}
    with pytest.raises(ValueError, match=r"data without a length; give it as num_steps"):
        trainer(tmp_path, callback(0, 2, **options), epochs=2).fit(Module(), loader)
    prune = callback(0, 3, num_steps=24, **options)
    trainer(tmp_path, prune, epochs=3, enable_checkpointing=False).fit(Module(), loader)
    assert prune.pruner.state_dict()["macs_target"]["steps"] == 24
    assert prune.pruner.control.factor != 1


def without_epochs(path, prune, module, match):
    """Fit a module whose pruning is refused before the first of its epochs without noise."""
    epochs = []

    class Count(lightning.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            epochs.append(trainer.current_epoch)

    fit = trainer(path, prune, Count(), enable_checkpointing=False)
    with pytest.raises(ValueError, match=match):
        fit.fit(module, data())
    assert epochs == [] and prune.pruner is None


def test_what_cannot_be_pruned_is_refused_before_the_epochs_without_noise(tmp_path):
    # With one of 24 hidden units, 9 of 216 MACs remain.
    options = {"target_macs_ratio": 25}
    without_epochs(tmp_path, callback(3, 6, **options), Module(), "25; expected at most 24.00")
    without_epochs(tmp_path, callback(3, 6, kl_scale={"1": 2.0}), Module(), "'1'")
    module = Module()
    module.net = nn.Linear(6, 3)
    without_epochs(tmp_path, callback(3, 6), module, "no layer of Linear is prunable")


def test_the_check_before_the_training_does_not_change_it():
    module, prune = Module(), callback(1, 6)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    drawn = torch.get_rng_state()
    prune.on_train_start(SimpleNamespace(current_epoch=0, train_dataloader=data()), module)
    assert torch.equal(torch.get_rng_state(), drawn) and prune.pruner is None
    assert module.training and not module.net._forward_pre_hooks
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


def test_the_steps_of_a_target_are_those_of_the_optimizer_with_noise():
    def steps(module=None, **changes):
        values = {"num_training_batches": 9, "accumulate_grad_batches": 2, "current_epoch": 0}
        of = SimpleNamespace(**{**values, "callbacks": [], **changes})
        return callback(1, 16, target_macs_ratio=4)._num_steps(of, module or Module())

    assert steps() == 15 * 5
    assert steps(current_epoch=6) == 10 * 5
    manual = Module()
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match="is not known with manual optimization"):
        steps(manual)
    scheduler = lightning.callbacks.GradientAccumulationScheduler({0: 1, 1: 4})
    with pytest.raises(ValueError, match="GradientAccumulationScheduler"):
        steps(callbacks=[scheduler])


def test_a_cut_that_removes_nothing_warns(tmp_path):
    module = Module()
    prune = callback(0, 1, init_log_scale=-6.0, noise_learning_rate=1e-3)
    with pytest.warns(UserWarning, match="no unit was removed; the smallest signal-to-noise"):
        trainer(tmp_path, prune, epochs=1, enable_checkpointing=False).fit(module, data())


def test_layers_of_the_module_itself_are_refused(tmp_path):
    class Flat(Module):
        def __init__(self):
            lightning.LightningModule.__init__(self)
            self.fc1, self.fc2 = nn.Linear(6, 24), nn.Linear(24, 3)

    with pytest.raises(
        ValueError, match=r"modules are fc1, fc2\. Put the layers to prune into one"
    ):
        trainer(tmp_path, callback()).fit(Flat(), data())


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected 0 <= start_epoch < end_epoch"):
        callback(3, 3)
    with pytest.raises(ValueError, match="training ends after 4 epochs, before"):
        trainer(tmp_path, callback(1, 6), epochs=4).fit(Module(), data())
    other = callback()
    other.network = "network"
    with pytest.raises(ValueError, match="has no network 'network'; its modules are net"):
        trainer(tmp_path, other).fit(Module(), data())

    class Piecewise(Module):
        def training_step(self, batch, index):
            x, y = batch
            for layer in self.net:
                x = layer(x)
            return F.cross_entropy(x, y)

    with pytest.raises(RuntimeError, match="did not call the network 'net'"):
        trainer(tmp_path, callback(0, 2)).fit(Piecewise(), data())
