"""Libraries that use torch.func, their own tests: with torch.func's transforms, and with ours in
their place.

python -m benchmarks.clients [NAME ...] [--checkout NAME=DIRECTORY] [--quick] [--write]. The
command makes an environment in .clients/ that sees this one's torch, installs the packages there
and takes the tests from their source distributions. Libraries whose source distribution has no
tests are run from a checkout, if one is named."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import tarfile
import venv
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.measure import Report, arguments

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".clients"
PYTHON = HOME / "venv" / "bin" / "python"


class Client(NamedTuple):
    """A package: the arguments of pytest that select its tests, and what these need beside it.
    ``version``: of the source distribution, None where the tests are in checkouts only."""

    version: str | None
    tests: str
    needs: str = ""


CLIENTS = {
    "curvlinops-for-pytorch": Client("3.0.1", "test/test_gradient_moments.py test/test_ggn.py"),
    "dattri": Client(
        "0.3.0", "test/dattri/func/test_fisher.py test/dattri/func/test_hessian.py", "requests"
    ),
    "opacus": Client(
        "1.6.0",
        "opacus/tests/per_sample_gradients_utils_test.py opacus/tests/grad_samples/linear_test.py",
        "hypothesis torchvision",
    ),
    "posteriors": Client(  # its settings make errors of warnings, tensordict's new ones too
        "0.1.3", "tests/test_torchopt.py tests/test_types.py -W ignore::FutureWarning", "graphviz"
    ),
    "traker": Client("0.3.2", "tests/test_class.py -k featurize", "torchvision"),
    "evox": Client(
        None,
        "unit_test/operators unit_test/core unit_test/utils "
        "unit_test/problems/test_hpo_wrapper.py",
        "evox",
    ),
    "pypose": Client(None, "tests/optim/test_jacobian.py", "pypose"),
    "theseus": Client(
        None,
        "tests/torchlie_tests/functional tests/theseus_tests/geometry/test_so3.py "
        "-k 'jacrev or exp_map or log_map or compose or inverse'",
        "lxml urdf-parser-py torchlie torchkin",
    ),
    "torchjd": Client(None, "tests/unit/autogram", "torchjd quadprog qpsolvers"),
    "torchode": Client(None, "tests/adjoint_test.py", "torchode"),
}
NOTES = (
    "27 tests of pypose exchange private functions of torch.func's that keep the class of a "
    "tensor; ours do not call them. Left out: nngeometry, whose tests load data from the network; "
    "evotorch, whose tests start ray in a mode that it has no more; laplace, which imports a "
    "module of curvlinops' that 3.0.1 has no more."
)


def pip(*args: str) -> None:
    pinned = HOME / "constraints.txt"
    pinned.write_text(f"torch=={torch.__version__}\n")
    command = [
        PYTHON,
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
        *args,
        "--constraint",
        pinned,
    ]
    subprocess.run(command, check=True)


def make_environment() -> None:
    """An environment that finds what this one has, and that is not installed into it."""
    if not PYTHON.exists():
        venv.create(HOME / "venv", with_pip=True)
        (packages,) = (HOME / "venv").glob("lib/*/site-packages")
        (packages / "shared.pth").write_text(str(Path(torch.__file__).parents[1]))
        pip("install", "wheel")  # some build without isolation, because they import torch


def sources(name: str, client: Client) -> Path:
    """The unpacked source distribution, with the package installed."""
    pinned, folder = f"{name}=={client.version}", HOME / f"{name}-{client.version}"
    if not folder.exists():
        pip("install", pinned, *client.needs.split())
        pip("download", "--no-deps", "--no-binary", name, "--dest", str(folder), pinned)
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


def outcomes(
    name: str, client: Client, folder: Path, library: str, threads: int
) -> dict[str, list]:
    """What became of each test: whether it calls a transform, its outcome, its seconds, and those
    of its third run."""
    path = HOME / f"{name}.{library}.json"
    path.unlink(missing_ok=True)
    places = (ROOT, folder, folder / "src", folder / "tests")
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, places)),
        "PYTHONHASHSEED": "0",
    }  # names of tests
    env |= {
        "OMP_NUM_THREADS": str(threads),
        "MPLBACKEND": "Agg",
        "TORCHDYNAMO_DISABLE": "1",
    }  # not measured here
    command = [
        PYTHON,
        ROOT / "benchmarks" / "clients_tests.py",
        library,
        path,
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    log = HOME / f"{name}.{library}.log"
    with log.open("w") as out:
        status = subprocess.run(
            [*command, *shlex.split(client.tests)], cwd=folder, env=env, stdout=out, stderr=out
        ).returncode
    if status not in (0, 1) or not path.exists():  # 1: a test failed
        raise SystemExit(f"{name}: pytest did not run its tests, see {log}")
    return json.loads(path.read_text())


def row(name: str, client: Client, folder: Path, threads: int) -> list[str]:
    theirs, ours = (
        outcomes(name, client, folder, library, threads) for library in ("torch.func", "aotfunc")
    )
    calling = [test for test, (calls, *_) in theirs.items() if calls]
    passing = [test for test in calling if theirs[test][1] == "passed"]
    both = [test for test in passing if test in ours and ours[test][1] == "passed"]
    again = [test for test in both if None not in (theirs[test][3], ours[test][3])]
    counts = [str(len(tests)) for tests in (calling, passing, both)]
    return [
        name,
        client.version or "checkout",
        *counts,
        ratio(theirs, ours, both, 2),
        ratio(theirs, ours, again, 3),
    ]


def ratio(theirs: dict, ours: dict, tests: list[str], column: int) -> str:
    """The time of ours over theirs for all of these tests together."""
    seconds = [sum(run[test][column] for test in tests) for run in (theirs, ours)]
    return f"{seconds[1] / seconds[0]:.2f}" if tests else "-"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="packages (default: all that there are tests of)"
    )
    parser.add_argument(
        "--checkout", action="append", default=[], metavar="NAME=DIRECTORY", help="of a library"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkouts = dict(option.split("=", 1) for option in options.checkout)
    known = [name for name, client in CLIENTS.items() if client.version or name in checkouts]
    names = options.names or (["posteriors"] if options.quick else known)
    report = Report("clients", "Libraries that use torch.func", "python -m benchmarks.clients")
    make_environment()
    rows = []
    for name in names:
        client = CLIENTS[name]
        if client.version is None:
            if name not in checkouts:
                parser.error(
                    f"the tests of {name} are not in its source distribution: --checkout "
                    f"{name}=DIRECTORY"
                )
            pip("install", *client.needs.split())
        folder = (
            Path(checkouts[name]).resolve() if client.version is None else sources(name, client)
        )
        rows.append(row(name, client, folder, options.threads))
        report.console.print(*rows[-1])
    head = [
        "package",
        "version",
        "tests that call a transform",
        "pass with torch.func",
        "pass with ours",
        "time, first run",
        "time, third run",
    ]
    report.table(
        "Tests of theirs, and the time of ours over torch.func's where both pass", head, rows
    )
    report.note(NOTES)
    if options.write:
        report.write()


if __name__ == "__main__":
    main()
