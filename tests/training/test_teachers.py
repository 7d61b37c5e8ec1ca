"""Fine-tuning by the soft labels of dense networks of other runs."""

import json

import pytest
import torch
import torch.nn.functional as F
from tiny_network import Net, labelled_images

from pyro_sbp.deployment.loading import load
from pyro_sbp.errors import RequestError
from pyro_sbp.recipes import Request, SBPRecipe
from pyro_sbp.training.again import prune_again
from pyro_sbp.training.teachers import Teachers, check_teacher
from pyro_sbp.training.train import train

SHORT = {"dense_epochs": 2, "epochs": 2, "batch_size": 10, "learning_rate": 0.01}
#: With a learning rate that changes nothing, the loss of fine-tuning is that of the pruned network.
TAUGHT = {**SHORT, "finetune_epochs": 1, "finetune_learning_rate": 1e-12, "distill": 3.0}


def request_of(recipe, **changes):
    return Request("tiny_network:Net", "digits", recipe, **changes)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Two runs with dense networks of different seeds."""
    root = tmp_path_factory.mktemp("teachers")
    for seed in (1, 2):
        recipe = SBPRecipe(finetune_epochs=0, **SHORT)
        train(request_of(recipe, seed=seed), labelled_images(), root / str(seed))
    return str(root / "1"), str(root / "2")


def network_of(run):
    net = Net(2)
    net.load_state_dict(torch.load(f"{run}/dense.pt", weights_only=True))
    return net.eval()


def lines_of(directory):
    text = (directory / "metrics.jsonl").read_text()
    return [{**json.loads(line), "seconds": 0} for line in text.splitlines()]


def test_an_ensemble_averages_probabilities(dense):
    nets, x = [network_of(run) for run in dense], torch.rand(5, 1, 4, 4)
    mean = sum(net(x).softmax(1) for net in nets) / 2
    torch.testing.assert_close(Teachers(nets, ["a", "b"])(x).exp(), mean.detach())
    torch.testing.assert_close(Teachers(nets[:1], ["a"])(x), nets[0](x).log_softmax(1).detach())


@pytest.mark.parametrize("count", [1, 2])
def test_fine_tuning_learns_the_soft_labels_of_the_teachers(count, dense, tmp_path):
    data = labelled_images()
    found = train(
        request_of(SBPRecipe(**TAUGHT), teachers=dense[:count]), data, tmp_path / "taught"
    )
    assert found.teachers == ("tiny_network:Net",) * count
    x, _ = data.train.batch(slice(0, 100))
    with torch.no_grad():
        soft = (sum(network_of(run)(x).softmax(1) for run in dense[:count]) / count).log()
        student = load(tmp_path / "taught" / "pruned", Net)(x)
    soft, student = ((logits / 3).log_softmax(1) for logits in (soft, student))
    expected = 9 * F.kl_div(student, soft, log_target=True, reduction="batchmean")
    lines = lines_of(tmp_path / "taught")
    assert lines[-1]["nll"] == pytest.approx(float(expected), rel=1e-4)
    # Before fine-tuning, the run is that without a teacher, whose soft labels are others.
    train(request_of(SBPRecipe(**TAUGHT)), data, tmp_path / "alone")
    alone = lines_of(tmp_path / "alone")
    assert alone[:-1] == lines[:-1] and alone[-1]["nll"] != pytest.approx(lines[-1]["nll"], rel=0.1)


def test_pruning_again_needs_the_teachers_only_to_fine_tune(dense, tmp_path):
    data = labelled_images()
    train(request_of(SBPRecipe(finetune_epochs=0, **SHORT)), data, tmp_path / "teacher")
    request = request_of(SBPRecipe(**TAUGHT), teachers=(str(tmp_path / "teacher"),))
    found = train(request, data, tmp_path / "run")
    assert found.to_dict()["teachers"] == ["tiny_network:Net"]
    again = prune_again(request, data, tmp_path / "run", tmp_path / "a", finetune_epochs=1)
    assert again.teachers == found.teachers
    (tmp_path / "teacher" / "dense.pt").unlink()
    pruned = prune_again(request, data, tmp_path / "run", tmp_path / "b", threshold=1.0)
    assert "teachers" not in pruned.to_dict()
    with pytest.raises(RequestError, match=r"has no dense\.pt"):
        prune_again(request, data, tmp_path / "run", tmp_path / "c", finetune_epochs=1)


@pytest.mark.parametrize(
    "changes, settings, message",
    [
        ({"dataset": "mnist"}, {}, "has the data set digits, and this run has mnist"),
        ({"image_size": 8}, {}, "has images of the size None, and this run has 8"),
        ({}, {"standardize": True}, "has standardize False, and this run has True"),
        ({}, {"holdout": 10}, "reserves 0 images .* this run 10, .* give the same holdout"),
    ],
)
def test_a_teacher_of_other_images_is_refused(changes, settings, message, dense):
    request = request_of(SBPRecipe(**TAUGHT, **settings)).to_dict()
    request = Request.from_dict({**request, **changes})
    with pytest.raises(RequestError, match=message):
        check_teacher(dense[0], request)


def test_a_teacher_needs_a_temperature_and_a_dense_network(tmp_path, dense):
    with pytest.raises(RequestError, match="distill, their temperature, is 0; set distill"):
        request_of(SBPRecipe(), teachers=dense)
    with pytest.raises(RequestError, match="there is no directory"):
        check_teacher(tmp_path / "none", request_of(SBPRecipe(**TAUGHT)))
    found = request_of(SBPRecipe(**TAUGHT), teachers=dense)
    assert Request.from_dict(json.loads(json.dumps(found.to_dict()))) == found
