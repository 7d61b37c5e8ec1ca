"""pyro-sbp train and bench, in process."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import run, train_quickly
from warm_processes import COMMAND_LINE, WarmProcess

from pyro_sbp.cli import cli, common
from pyro_sbp.cli.stopping import Stopped
from pyro_sbp.datasets import sources


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train_quickly("sbp", tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(finished, tmp_path, number):
    _, _, args = finished
    more = ["--epochs", "1000", "--output-dir", tmp_path / "run", "--device", "cpu"]
    with WarmProcess(COMMAND_LINE, *args, *more) as process:
        for line in process.stderr:
            if "gated 2/1000" in line:
                process.send_signal(number)
                break
        rest = process.stderr.read()
        assert process.wait(60) == 128 + number
    assert rest.splitlines()[-1].startswith("stopped; resume with `pyro-sbp train --resume ")
    assert (tmp_path / "run" / "checkpoint.pt").exists() and "Traceback" not in rest


def test_a_parameter_that_is_not_finite_stops_the_run_and_is_named(finished, tmp_path, monkeypatch):
    _, _, args = finished
    step = torch.optim.Adam.step
    count = 0

    def poisoned(self, *rest):
        nonlocal count
        count += 1
        step(self, *rest)
        if count == 30:
            with torch.no_grad():
                self.param_groups[0]["params"][2][0] = torch.nan

    monkeypatch.setattr(torch.optim.Adam, "step", poisoned)
    result = run(*args, "--output-dir", tmp_path / "run", "--device", "cpu")
    assert result.exit_code == 1 and len(result.stderr.strip().splitlines()) == 3
    assert "the parameter 'fc1.weight' is not finite in epoch 2 of phase 'dense'" in result.stderr
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["place"]["epoch"] == 1
    assert all(bool(value.isfinite().all()) for value in saved["current"]["module"].values())


def test_a_refused_resume_keeps_the_run(finished, tmp_path):
    directory, _, _ = finished
    (tmp_path / "recipe.json").write_text((directory / "recipe.json").read_text())
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    result = run("train", "--resume", tmp_path)
    assert result.exit_code == 2 and "checkpoint.pt is damaged" in result.stderr
    torch.save({"request": "{}"}, tmp_path / "checkpoint.pt")
    result = run("train", "--resume", tmp_path)
    assert result.exit_code == 2 and "it is not the checkpoint of a run" in result.stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert names - {".lock"} == {"recipe.json", "checkpoint.pt"}
    for text in ("[]", "5", "{"):
        (tmp_path / "recipe.json").write_text(text)
        result = run("train", "--resume", tmp_path)
        assert result.exit_code == 2 and "recipe.json is damaged" in result.stderr


def test_commands_end_with_the_result_and_what_to_type_next(finished):
    directory, trained, _ = finished
    summary = json.loads((directory / "summary.json").read_text())
    shares = [100 * summary[x]["pruned"] / summary[x]["dense"] for x in ("macs", "parameters")]
    errors = [summary["error"][name] for name in ("finetuned", "dense")]
    measured = run("bench", directory, "--seconds", "0.01", "--threads", "1")
    result, *_ = trained.stdout.splitlines()[-3:]
    speed, again, _ = measured.stdout.splitlines()[-3:]
    assert result == again
    numbers = [float(number) for number in re.findall(r"[\d.]+(?= %)", result)]
    assert numbers[:2] == pytest.approx(shares, rel=5e-3)
    assert numbers[2:] == pytest.approx(errors, abs=5e-3)
    speedups = [row["speedup"] for row in json.loads((directory / "bench.json").read_text())]
    said = [float(number) for number in re.findall(r"\d+\.\d", speed)]
    assert [said[0], said[-1]] == pytest.approx([min(speedups), max(speedups)], abs=0.051)
    for output in (trained.stdout, measured.stdout):
        commands = re.findall(r"`pyro-sbp (\w+) ", output.splitlines()[-1])
        assert len(commands) == 2 and set(commands) <= set(cli.commands)


def test_click_refuses_in_one_line_too():
    for args in (["train", "--epochs", "x"], ["train", "--nonsense"], ["frobnicate"], ["export"]):
        result = run(*args)
        assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1


def test_bench_takes_the_newest_run(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("bench")
    assert result.exit_code == 2 and "there is no run under runs/" in result.output
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(finished[0], target_is_directory=True)
    assert run("bench", "--seconds", "0.05", "--threads", "1").exit_code == 0


def test_bench_tells_runtimes_apart(finished, tmp_path, monkeypatch):
    from pyro_sbp.deployment import exporting
    from pyro_sbp.deployment.runtimes import RUNTIMES

    directory = tmp_path / "run"
    shutil.copytree(finished[0], directory)
    args = ["bench", directory, "--seconds", "0.02", "--threads", "1", "--batch-size", "1"]
    asked = ("onnxruntime", "eager", "eager")
    result = run(*args, *(word for runtime in asked for word in ("--runtime", runtime)))
    assert result.exit_code == 0, result.output
    head, _, *rows = result.stdout.splitlines()
    assert "  runtime " in head and "  onnxruntime " in rows[0] and "  eager " in rows[1]
    rows = json.loads((directory / "bench.json").read_text())
    cpu = [row["runtime"] for row in rows if row["device"].startswith("cpu")]
    assert cpu == ["onnxruntime", "eager"]
    result = run(*args)
    head, _, *rows = result.stdout.splitlines()
    assert "runtime" not in head and "eager" not in rows[0]
    (path := directory / "bench.json").unlink()
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    result = run(*args, "--runtime", "onnxruntime")
    assert result.exit_code == 2 and not path.exists()
    assert (
        result.stderr.strip() == "Error: ONNX needs more packages: pip install 'pyro-sbp[export]'"
    )
    (option,) = [p for p in cli.commands["bench"].params if p.name == "runtimes"]
    assert tuple(option.type.choices) == RUNTIMES


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(sources, "_reachable", lambda host: False)
    monkeypatch.setattr(common, "_cuda_devices", lambda: 0)


BAD = [
    (
        ["--arch", "LeNet-5"],
        "unknown arch 'LeNet-5'; did you mean 'lenet5'? expected lenet-500-300, ",
    ),
    (["--arch", "lenet5", "--dataset", "minst"], "; did you mean 'mnist'? expected mnist, "),
    (["--arch", "lenet5", "--method", "spb"], "; did you mean 'sbp'?"),
    (["--arch", "lenet5", "--recipe", "lenet5_digits"], "; did you mean 'lenet5-digits'?"),
    (["--arch", "./nets/mine.py:Net"], "names a file; expected a module, 'nets.mine:Net'"),
    (
        ["--arch", "lenet5", "--epochs", "2", "--set", "epochs=3"],
        "--epochs and --set epochs=3 contradict each other; give one",
    ),
    (["--arch", "lenet5", "--logger", "wand"], "unknown logger 'wand'; did you mean 'wandb'?"),
    (["--arch", "lenet6"], "unknown arch 'lenet6'; did you mean 'lenet5'? expected "),
    ([], "--arch is missing"),
    (
        ["--arch", "no_such.module:thing"],
        "expected one that is installed or in the current directory",
    ),
    (["--arch", "lenet5", "--method", "magic"], "unknown method 'magic'; expected sbp"),
    (
        ["--arch", "lenet5", "--dataset", "minst"],
        "unknown data set 'minst'; did you mean 'mnist'? expected ",
    ),
    (
        ["--arch", "lenet5", "--device", "tpu"],
        "unknown device 'tpu'; did you mean 'cpu'? expected auto, cpu, cuda",
    ),
    (["--arch", "lenet5", "--device", "cuda"], "there is no CUDA device on this machine"),
    (["--arch", "lenet5", "--recipe", "soup"], "unknown recipe 'soup'"),
    (
        ["--arch", "lenet5", "--epochs", "0"],
        "epochs is 0; expected an integer >= 1",
    ),
    (
        ["--arch", "lenet5", "--macs-weight", "-1"],
        "macs_weight is -1.0; expected a number >= 0",
    ),
    (
        ["--arch", "lenet5", "--batch-size", "0"],
        "batch_size is 0; expected an integer >= 1",
    ),
    (
        ["--arch", "lenet5", "--learning-rate", "-1"],
        "learning_rate is -1.0; expected a number > 0",
    ),
    (["--arch", "lenet5", "--seed", "-1"], "seed is -1"),
    (["--arch", "lenet5", "--data-dir", "nowhere"], "--dataset digits"),
    (  # settings that are allowed only together, as an option and as --set
        [
            *("--arch", "lenet5", "--method", "rbp", "--target-macs-ratio", "5"),
            *("--set", "order=together", "--data-dir", "nowhere"),
        ],
        "--dataset digits",
    ),
    (
        ["--arch", "lenet5", "--dataset", "digits", "--workers", "2"],
        "--workers applies to folder:PATH",
    ),
    (["--arch", "lenet5", "--workers", "-1"], "-1 is not in the range x>=0"),
    (["--arch", "torchvision.models:resnet18"], "--dataset is missing"),
    (["--resume", "nowhere"], "there is no directory nowhere"),
    (["--resume", "nowhere", "--epochs", "3"], "leave out --epochs"),
]


@pytest.mark.parametrize(("args", "words"), BAD, ids=[" ".join(args) for args, _ in BAD])
def test_bad_requests_get_one_line_and_nothing_is_written(
    args, words, tmp_path, monkeypatch, offline
):
    monkeypatch.chdir(tmp_path)
    result = run("train", *args)
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_requests_that_only_the_network_can_refuse_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.toml").write_text("kl_scale = {conv9 = 3.0}")
    Path("crop.toml").write_text("crop = 28")
    monkeypatch.syspath_prepend(tmp_path)
    Path("broken.py").write_text("class Net(")
    Path("wrong.py").write_text("import torch\nNet = torch.nn.Netz")
    for args, words in (
        (["--arch", "lenet5", "--recipe", "recipe.toml"], "'conv9'; the gates are conv1"),
        (["--arch", "lenet5", "--recipe", "crop.toml"], "expected less than the images' 28 x 28"),
        (
            ["--arch", "torch.nn:ReLU"],
            "does not return logits [batch, 10], one column per class: it returns [8, 1, 8, 8] for",
        ),
        (["--arch", "torch.nn:Linear"], "the network cannot be built from no arguments: "),
        (["--arch", "broken:Net"], "cannot import 'broken' of --arch: SyntaxError, "),
        (["--arch", "wrong:Net"], "cannot import 'wrong' of --arch: AttributeError, "),
        (["--arch", "torch.nn:Identiy"], "has no 'Identiy'; did you mean 'Identity'?"),
        (["--arch", "torch.nn:Dropout"], "does not return logits"),
        (["--arch", "collections:OrderedDict"], "of --arch does not build a network"),
        (["--arch", "torch.nn:Nothing"], "module 'torch.nn' of --arch has no 'Nothing'"),
    ):
        result = run("train", *args, "--dataset", "digits", "--device", "cpu")
        assert result.exit_code == 2 and words in result.stderr, result.stderr
        assert not Path("runs").exists()


def test_what_lies_here_is_a_better_guess(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("shapes").mkdir()
    Path("mine.toml").write_text("epochs = 0")
    for args, words in (
        (["--dataset", "shapes"], "did you mean 'folder:shapes'?"),
        (["--recipe", "mine"], "did you mean 'mine.toml'?"),
        (
            ["--recipe", "mine.toml"],
            "Error: mine.toml: epochs is 0; expected an integer >= 1",
        ),
    ):
        result = run("train", "--arch", "lenet5", *args)
        assert result.exit_code == 2 and words in result.stderr, result.stderr


def test_a_run_of_few_steps_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("short.toml").write_text(
        "dense_epochs = 0\nepochs = 2\nfinetune_epochs = 0\nbatch_size = 64\nholdout = 38"
    )
    args = ("--arch", "lenet-300-100", "--dataset", "digits", "--recipe", "short.toml")
    result = run("train", *args, "--device", "cpu")
    assert result.exit_code == 0, result.output
    # 1,400 images in batches of 64.
    assert "Each gate had noise for 44 steps, but noise needs a few thousand" in result.stdout
    title = "training lenet-300-100 on digits: method sbp, recipe short, seed 0, precision 32-true"
    assert result.stderr.splitlines()[0] == title
    assert "had noise" not in common.little_removed(5000)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("checkpoint.pt", "is a checkpoint of a run; expected a state dict of the network"),
        ("pruned/model.safetensors", "has the weights of a pruned network; expected those of"),
    ],
)
def test_files_of_a_run_are_no_weights_to_start_from(finished, tmp_path, file, words):
    directory, _, args = finished
    result = run(*args, "--weights", directory / file, "--output-dir", tmp_path / "run")
    assert result.exit_code == 2 and words in result.stderr


def test_a_run_from_the_dense_weights_of_another_records_their_error(finished, tmp_path):
    directory, _, args = finished
    more = ("--weights", directory / "dense.pt", "--epochs", "3", "--set", "finetune_epochs=0")
    assert run(*args, *more, "--output-dir", tmp_path / "run").exit_code == 0
    before, after = (
        json.loads((path / "summary.json").read_text()) for path in (directory, tmp_path / "run")
    )
    assert after["error"]["dense"] == before["error"]["dense"] is not None
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert not any(json.loads(line)["phase"] == "dense" for line in lines)


def test_a_dense_network_is_trained_from_weights_on_request(finished, tmp_path):
    directory, _, args = finished
    more = ("--weights", directory / "dense.pt", "--set", "dense_epochs=1", "--epochs", "1")
    more = (*more, "--set", "finetune_epochs=0", "--set", "learning_rate=1e-9")
    assert run(*args, *more, "--output-dir", tmp_path / "run").exit_code == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["phase"] == "dense"
    before, after = (
        json.loads((path / "summary.json").read_text()) for path in (directory, tmp_path / "run")
    )
    assert after["error"]["dense"] == before["error"]["dense"]  # it started from the weights


def test_a_directory_in_use_is_not_touched(finished, tmp_path):
    directory, _, args = finished
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    result = run(*args, "--output-dir", directory)
    assert result.exit_code == 2 and "is not empty: it contains a finished run" in result.stderr
    assert "give another --output-dir" in result.stderr
    for more in ([], ["--epochs", "20"]):
        result = run("train", "--resume", directory, *more)
        assert result.exit_code == 2 and "train again with more --epochs" in result.stderr
    assert before == {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    (tmp_path / "file").write_text("mine")
    result = run(*args, "--output-dir", tmp_path / "file" / "run")
    assert result.exit_code == 2 and "is not a writable directory" in result.stderr


def test_a_directory_that_cannot_be_made_is_refused(finished, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    _, _, args = finished
    monkeypatch.setattr(Path, "mkdir", refuse)
    result = run(*args, "--output-dir", tmp_path / "run")
    assert result.exit_code == 2 and "run: Permission denied" in result.stderr


def test_bench_refuses_a_damaged_run(finished, tmp_path):
    directory, _, _ = finished
    for name in ("recipe.json", "summary.json"):
        (tmp_path / name).write_text((directory / name).read_text())
    result = run("bench", tmp_path)
    assert result.exit_code == 2 and "network.json is missing" in result.stderr


def test_a_recipe_brings_its_method(tmp_path):
    args = ("--arch", "lenet-300-100", "--dataset", "digits", "--recipe", "rbp-digits")
    short = ("--set", "dense_epochs=1", "--epochs", "3", "--set", "finetune_epochs=0")
    result = run("train", *args, *short, "--device", "cpu", "--output-dir", tmp_path / "run")
    assert result.exit_code == 0, result.output
    asked = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert (asked["method"], asked["recipe"]["order"]) == ("rbp", "forward")
    assert (asked["recipe"]["dense_epochs"], asked["recipe"]["finetune_epochs"]) == (1, 0)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["threads"] >= 1
    result = run("train", *args, "--method", "sbp", "--output-dir", tmp_path / "other")
    assert result.exit_code == 2 and not (tmp_path / "other").exists()
    assert "the recipe 'rbp-digits' is for rbp, and --method is sbp; leave out" in result.stderr


def test_held_out_images_have_columns_in_the_closing_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("short.toml").write_text("dense_epochs = 1\nepochs = 1\nfinetune_epochs = 0\n")
    args = ("--arch", "lenet-300-100", "--dataset", "digits", "--recipe", "short.toml")
    result = run("train", *args, "--set", "holdout=400", "--device", "cpu", "--output-dir", "run")
    assert result.exit_code == 0, result.output
    summary = json.loads(Path("run/summary.json").read_text())
    lines = result.stdout[result.stdout.index("network  ") :].split("\n")
    head = "network test error, % NLL ECE, % validation error, % NLL ECE, %"
    assert lines[0].split() == head.split()
    values = []
    for split, error in (("test", "error"), ("validation", "validation_error")):
        found = summary["calibration"][split]["dense"]
        values += [f"{summary[error]['dense']:.2f}", f"{found['nll']:.4f}", f"{found['ece']:.2f}"]
    assert lines[2].split() == ["dense", *values]
    assert " + weighted kl " in result.stderr


def test_a_run_resumes_with_the_threads_that_it_was_started_with(tmp_path, monkeypatch):
    from pyro_sbp.training import threads
    from pyro_sbp.training import train as training

    monkeypatch.chdir(tmp_path)
    Path("short.toml").write_text("dense_epochs = 1\nepochs = 1\nfinetune_epochs = 0\n")
    args = ("--arch", "lenet-300-100", "--dataset", "digits", "--recipe", "short.toml")
    train = training.train
    monkeypatch.setattr(training, "train", lambda *rest: train(*rest[:4], stop=lambda: True))
    with pytest.raises(Stopped):
        run("train", *args, "--threads", "2", "--device", "cpu", "--output-dir", "run")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert json.loads(Path("run/recipe.json").read_text())["threads"] == 2
    # A variable of the user's would be stronger, and a machine of one core has no second thread.
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_usable_cpus", lambda: {0, 1})
    assert run("train", "--resume", "run").exit_code == 0
    assert json.loads(Path("run/summary.json").read_text())["threads"] == 2
