"""pyro-sbp doctor: the facts about this machine and installation that a bug report needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pyro_sbp.datasets.sources import SOURCES

__all__ = ["doctor"]


@click.command()
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    default=Path("data"),
    help="Directory of the data sets.  [default: data]",
)
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    help="Check only this data set, such as mnist or folder:PATH; may be repeated."
    "  [default: all but folders]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the facts as one JSON object.")
def doctor(data_dir: Path, datasets: tuple[str, ...], as_json: bool) -> None:
    """Print versions, devices, memory, extras and data sets.

    Paste the output into bug reports: it contains neither the name of the user nor the home
    directory. It needs no network, and reports packages that are missing or broken.
    """
    from pyro_sbp.training.environment import read_environment

    found = read_environment(data_dir, datasets or (*SOURCES, "digits")).to_dict()
    click.echo(json.dumps(found, indent=2) if as_json else "\n".join(_lines(found)))


def _lines(found: dict[str, Any]) -> list[str]:
    devices, threads, load, memory = (
        found[key] for key in ("devices", "threads", "load", "memory")
    )
    machine = {
        "platform": found["platform"],
        "cpu": f"{devices['cpu']}, {devices['cpus']} CPUs",
        "cuda": _cuda(devices),
        "threads": _threads(threads),
        "load": _load(load),
        "memory": f"{_size(memory['total'])}, {_size(memory['available'])} available, "
        f"{_size(memory['usable'])} within the container's limit",
        "disk": f"{_size(found['disk'])} free in the current directory",
    }
    versions = {name: version or "not installed" for name, version in found["versions"].items()}
    extras = {name: _extra(extra) for name, extra in found["extras"].items()}
    datasets = {
        name: status["state"] + (f": {status['detail']}" if status["detail"] else "")
        for name, status in found["datasets"].items()
    }
    problems = [f"  {problem}" for problem in found["problems"]]
    return [
        *_section("versions", versions),
        *_section("machine", machine),
        *_section("extras", extras),
        *_section(f"data sets in {found['data_dir']}", datasets),
        *(["problems", *problems] if problems else ["no problems"]),
    ]


def _section(title: str, rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows), default=0)
    return [title, *(f"  {name:<{width}}  {text}" for name, text in rows.items()), ""]


def _cuda(devices: dict[str, Any]) -> str:
    parts = [
        f"{cuda['name']}, compute capability {cuda['capability']}, {_size(cuda['memory'])}, "
        f"{_size(cuda['free_memory'])} free"
        for cuda in devices["cuda"]
    ] or ["no device"]
    version = devices["cuda_version"]
    parts.append("torch without CUDA" if version is None else f"torch for CUDA {version}")
    parts.append(f"driver {devices['driver']}" if devices["driver"] else "no driver found")
    return "; ".join(parts)


def _threads(threads: dict[str, Any]) -> str:
    torch = "torch cannot be imported" if threads["torch"] is None else f"torch {threads['torch']}"
    chosen = f"pyro-sbp {threads['chosen']} (from {threads['source']})"
    return "; ".join([torch, chosen, *(f"{n}={v}" for n, v in threads["variables"].items())])


def _load(load: dict[str, Any]) -> str:
    busy = f"others use {load['busy_cores']:.1f} of {load['usable_cores']:.4g} cores"
    averages = " ".join(f"{average:.2f}" for average in load["averages"])
    return f"{busy}; load averages {averages or 'unknown'}"


def _extra(extra: dict[str, Any]) -> str:
    packages = [
        f"{name} {package['version'] or ''}".strip()
        + (f" ({package['problem']})" if package["problem"] else "")
        for name, package in extra["packages"].items()
    ]
    return f"{'installed' if extra['installed'] else 'not installed'}: {', '.join(packages)}"


def _size(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"
