"""The wheel holds what the tree holds, under one import package."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACES = {"pyro_sbp": "pyro_sbp", "cli": "pyro_sbp/cli", "experiments": "pyro_sbp/experiments"}


def test_the_wheel_has_the_files_of_the_tree(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    tracked = [name for name in tracked if (ROOT / name).is_file()]
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    # No isolation: it would fetch the build tools again.
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            str(tmp_path),
            str(source),
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = set()
    for name in tracked:
        top, _, rest = name.partition("/")
        if top in PLACES and name.endswith((".py", "py.typed", ".toml")):
            expected.add(f"{PLACES[top]}/{rest}")
    assert inside == expected


def test_importing_the_package_loads_neither_torch_nor_pyro():
    program = (
        "import sys, pyro_sbp; assert not {'torch', 'pyro', 'torchvision'} & set(sys.modules)\n"
        "assert pyro_sbp.__version__; pyro_sbp.load; assert 'pyro' not in sys.modules\n"
        "assert set(pyro_sbp.__all__) <= set(dir(pyro_sbp))\n"
        "for name in pyro_sbp.__all__: getattr(pyro_sbp, name)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)
