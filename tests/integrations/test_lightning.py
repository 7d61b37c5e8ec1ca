"""The callback of Lightning."""

import pyro
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("lightning.pytorch")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
    pytest.mark.slow,
]


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))
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
