"""Exported functions as ONNX models, run by onnxruntime."""

import pytest
import torch
from torch import nn

from aotfunc import cond, export, grad, scan, vmap, while_loop
from aotfunc.errors import ArgumentError, BackendError

x = torch.randn(3, 4)


def test_models(tmp_path):
    """One model holds a network, its gradients, per-sample gradients, trees and results that are
    arguments; its inputs have the arguments' names."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net = nn.Sequential(
        nn.Conv1d(1, 4, 3),
        nn.BatchNorm1d(4),
        nn.GELU(),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(8, 2),
    ).eval()
    energy = lambda w, x: (x @ w).tanh().square().sum()

    def f(batch, w, k, *, shift):
        y = net(batch["z"][:, None]) * k - batch["a"][0] + 2 * shift[:2]
        return {"y": y, "force": -grad(energy, 1)(w, batch["z"])}, [
            vmap(grad(energy), (None, 0))(w, batch["z"]),
            None,
        ]

    args, shift = ({"z": x, "a": [x[:, :2] * 3]}, torch.randn(4, 4), 3), torch.randn(4)
    export(f, *args, shift=shift).to_onnx(output_names=["y", "f", "g"]).save(tmp_path / "f.onnx")
    session = runtime.InferenceSession(tmp_path / "f.onnx")
    given = {"batch_z": x, "batch_a_0": x[:, :2] * 3, "w": args[1], "shift": shift}
    y, force, per_sample = session.run(["y", "f", "g"], {k: t.numpy() for k, t in given.items()})
    (named, (samples, _)) = f(*args, shift=shift)
    found = [torch.from_numpy(t) for t in (y, force, per_sample)]
    torch.testing.assert_close(found, [named["y"].detach(), named["force"], samples])
    same = export(lambda x, i: (x, i + 1), x, torch.arange(3)).to_onnx()
    torch.testing.assert_close([*same(x, torch.arange(3))], [x, torch.arange(1, 4)])
    with pytest.raises(ArgumentError, match=r"cannot be converted by torch.onnx: .*linalg_solve"):
        export(lambda a: torch.linalg.solve(a, a), x[:, :3]).to_onnx()


def branch(c, x):
    return cond(c > 0, torch.sin, torch.cos, x)


def doubled(x):
    return while_loop(lambda x: x.sum() < 100, lambda x: x * 2, x.abs(), max_steps=20)


@pytest.mark.parametrize(
    "f, words",
    [
        (nn.Dropout(), "draws random numbers"),
        (nn.BatchNorm1d(4), "writes to an argument or a buffer"),
        (lambda x: x.mul_(2), "writes to an argument or a buffer"),
        (lambda x: (x * 2, 3), "returns Python values"),
        (lambda x: x * 2, "a model whose output 0 is another"),
        (lambda x: branch(x.sum(), x), "that values decide on .*torch.where for branches"),
        (doubled, "that values decide on .*a fixed length, for loops"),
        (grad(lambda x: doubled(x).sum()), "that values decide on"),
        (
            lambda x: scan(lambda c, y: (branch(c, y).sum(), y), x.sum(), x)[0],
            "that values decide on",
        ),
        (lambda x: x.expand(2, 3, 4) * 3, "a model whose output 0 is another"),
    ],
)
def test_refused(monkeypatch, f, words):
    monkeypatch.setattr("aotfunc.api.onnx.find_spec", lambda name: True)
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: lambda x: [x * 3])
    with pytest.raises(ArgumentError, match=words):
        export(f, x).to_onnx()
    export(lambda x: x * 3, x).to_onnx()


def test_without_the_packages(monkeypatch):
    monkeypatch.setattr("aotfunc.api.onnx.find_spec", lambda name: None)
    with pytest.raises(BackendError, match="needs onnxscript and onnxruntime: pip install"):
        export(torch.sin, x).to_onnx()
