"""Every code snippet of the project's seed texts (functorch's README, the torch.func tour, a blog
note), as written."""

from functools import partial

import torch
import torch.nn.functional as F

from aotfunc import grad, hessian, jacfwd, jacrev, jvp, make_functional, make_fx, vjp, vmap
from tests.reference import assert_same, grads, loop

# functorch README
# -------------------------------------------------------------------------------------------------


def test_install_check():
    x = torch.randn(3)
    y = vmap(torch.sin)(x)
    assert torch.allclose(y, x.sin())


def test_readme_vmap():
    batch_size, feature_size = 3, 5
    weights = torch.randn(feature_size, requires_grad=True)

    def model(feature_vec):
        # Very simple linear model with activation
        assert feature_vec.dim() == 1
        return feature_vec.dot(weights).relu()

    examples = torch.randn(batch_size, feature_size)
    result = vmap(model)(examples)
    assert_same(result, loop(model)(examples))
    # the weights require grad and are closed over: an outer backward reaches them
    (g,) = torch.autograd.grad(result.sum(), weights)
    (expected,) = torch.autograd.grad(loop(model)(examples).sum(), weights)
    assert_same(g, expected)


def test_readme_grad():
    x = torch.randn([])
    cos_x = grad(lambda x: torch.sin(x))(x)
    assert torch.allclose(cos_x, x.cos())

    # Second-order gradients
    neg_sin_x = grad(grad(lambda x: torch.sin(x)))(x)
    assert torch.allclose(neg_sin_x, -x.sin())


def test_readme_per_sample_gradients():
    batch_size, feature_size = 3, 5

    def model(weights, feature_vec):
        # Very simple linear model with activation
        assert feature_vec.dim() == 1
        return feature_vec.dot(weights).relu()

    def compute_loss(weights, example, target):
        y = model(weights, example)
        return ((y - target) ** 2).mean()  # MSELoss

    weights = torch.randn(feature_size, requires_grad=True)
    examples = torch.randn(batch_size, feature_size)
    targets = torch.randn(batch_size)
    inputs = (weights, examples, targets)
    grad_weight_per_example = vmap(grad(compute_loss), in_dims=(None, 0, 0))(*inputs)
    assert grad_weight_per_example.shape == (batch_size, feature_size)
    assert_same(grad_weight_per_example, loop(grads(compute_loss), in_dims=(None, 0, 0))(*inputs))


def test_readme_vjp():
    func, inputs, cotangents = torch.sin, torch.randn(3), (torch.randn(3),)
    outputs, vjp_fn = vjp(func, inputs)
    vjps = vjp_fn(*cotangents)
    assert isinstance(vjps, tuple)
    assert_same((outputs, vjps[0]), (inputs.sin(), cotangents[0] * inputs.cos()))


def test_readme_jvp():
    x = torch.randn(5)
    y = torch.randn(5)
    f = lambda x, y: x * y
    _, output = jvp(f, (x, y), (torch.ones(5), torch.ones(5)))
    assert torch.allclose(output, x + y)


def test_readme_jacobians():
    x = torch.randn(5)
    expected = torch.diag(torch.cos(x))
    assert torch.allclose(jacrev(torch.sin)(x), expected)
    assert torch.allclose(jacfwd(torch.sin)(x), expected)

    x = torch.randn(64, 5)
    jacobian = vmap(jacrev(torch.sin))(x)
    assert jacobian.shape == (64, 5, 5)
    assert_same(jacobian, torch.diag_embed(x.cos()))


def test_readme_hessians():
    def f(x):
        return x.sin().sum()

    x = torch.randn(5)
    hessian0 = jacrev(jacrev(f))(x)
    hessian1 = jacfwd(jacrev(f))(x)
    hess = hessian(f)(x)
    for h in (hessian0, hessian1, hess):
        assert_same(h, torch.diag(-x.sin()))


def test_readme_make_fx():
    def f(x):
        return torch.sin(x).sum()

    x = torch.randn(100)
    grad_f = make_fx(grad(f))(x)
    assert_same(grad_f(x), x.cos())
    calls = [node for node in grad_f.graph.nodes if node.op == "call_function"]
    assert [node.target for node in calls] == [torch.ops.aten.cos.default]
    assert "torch.ops.aten.cos" in grad_f.code


def test_readme_make_functional():
    model = torch.nn.Linear(3, 3)
    data = torch.randn(64, 3)
    targets = torch.randn(64, 3)

    func_model, params = make_functional(model)

    def compute_loss(params, data, targets):
        preds = func_model(params, data)
        return torch.mean((preds - targets) ** 2)

    per_sample_grads = vmap(grad(compute_loss), (None, 0, 0))(params, data, targets)
    assert [g.shape for g in per_sample_grads] == [(64, 3, 3), (64, 3)]
    error = 2 / 3 * (F.linear(data, model.weight, model.bias) - targets)
    assert_same(tuple(per_sample_grads), (error[:, :, None] * data[:, None, :], error))


# the torch.func tour: what it has beside the README
# ------------------------------------------------------------------


def test_tour_vjp_of_a_triple():
    inputs = torch.randn(3)
    func = torch.sin
    cotangents = (torch.randn(3),)
    outputs, vjp_fn = vjp(func, inputs)
    vjps = vjp_fn(*cotangents)
    assert_same(vjps, (cotangents[0] * inputs.cos(),))


def test_tour_jvp():
    x = torch.randn(5)
    y = torch.randn(5)
    f = lambda x, y: x * y
    _, out_tangent = jvp(f, (x, y), (torch.ones(5), torch.ones(5)))
    assert torch.allclose(out_tangent, x + y)


# the blog note
# -------------------------------------------------------------------------------------------------


def predict(weight, bias, x):
    return F.linear(x, weight, bias).tanh()


def test_note_jacobian_by_vmap_of_vjp():
    D = 4
    weight = torch.randn(D, D)
    bias = torch.randn(D)
    x = torch.randn(D)  # feature vector
    xp = x.clone().requires_grad_()
    unit_vectors = torch.eye(D)

    def compute_jac(xp):
        jacobian_rows = [
            torch.autograd.grad(predict(weight, bias, xp), xp, vec)[0] for vec in unit_vectors
        ]
        return torch.stack(jacobian_rows)

    jac = compute_jac(xp)

    _, vjp_fn = vjp(partial(predict, weight, bias), x)
    (ft_jacobian,) = vmap(vjp_fn)(unit_vectors)
    assert torch.allclose(ft_jacobian, jac)
    assert torch.allclose(jacrev(partial(predict, weight, bias))(x), jac)
    assert torch.allclose(jacfwd(partial(predict, weight, bias))(x), jac)
