"""Caches are bounded by weight: what was used least recently goes, and programs do not pile up."""

import threading

import pytest
import torch

import aotfunc as A
from aotfunc import cache, graph
from aotfunc.cache import Cache
from aotfunc.capture import captured
from aotfunc.transforms import walk


def test_what_was_used_least_recently_goes():
    memo = Cache(64)
    memo.put("kept", 0.5)
    for i in range(1000):
        memo.put(i, str(i))
        assert memo.get("kept") == 0.5 and memo.get(i) == str(i)
        assert len(memo) <= 64
    assert memo.get(0) is None and memo.get(999 - 16) is not None


def test_weights_count():
    memo = Cache(1000, weigh=len)
    for i in range(100):
        memo.put(i, "x" * 100)
        assert sum(map(len, memo.values())) <= max(1000, 2 * cache.FEW * 100)
    memo = Cache(10, weigh=len)
    for i in range(100):  # each is heavier than all together may be: the last few stay
        memo.put(i, "x" * 100)
        assert memo.get(i) and len(memo) <= 2 * cache.FEW
    assert memo.get(99 - cache.FEW // 2)


def test_once_pop_and_clear():
    memo = Cache(8)
    made = []
    for _ in range(2):
        assert memo.once("a", lambda: made.append(1) or "value") == "value"
    assert made == [1] and list(memo) == ["a"]
    assert memo.pop("a") == "value" and memo.pop("a") is None and len(memo) == 0
    memo.put("a", 1)
    A.clear_caches()
    assert memo.get("a") is None


def test_threads_share_a_cache():
    memo = Cache(64)

    def work(k):
        for i in range(3000):
            memo.put((k, i), i)
            assert memo.get((k, i)) in (i, None)
            memo.once(i % 50, lambda i=i: i % 50)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(memo) <= 64 + 2 * len(threads)


def nodes(memo: Cache) -> int:
    return sum(map(memo.weigh, memo.values()))


@pytest.fixture
def small(monkeypatch):
    A.clear_caches()
    for memo in (captured._programs, graph._derived, walk._fragments):
        monkeypatch.setattr(memo, "limit", 2000)
    monkeypatch.setattr("aotfunc.runtime.compiled.NODES", 2000)
    yield
    A.clear_caches()


def chain(x, c):
    for _ in range(25):
        x = (x * c).sin()
    return x.sum()


def right(x, c):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(chain(x, c), x)[0]


def test_a_number_that_changes(small):
    x = torch.rand(3, dtype=torch.float64)
    # The number is asked for its value, so that each one has an entry of its own.
    jitted = A.jit(lambda x, c: chain(x, c) if c > 0 else x.sum())
    for i in range(40):
        c = 1 + i / 64
        torch.testing.assert_close(A.grad(chain)(x, c), right(x, c))
        y = x.clone().requires_grad_()
        jitted(y, c).backward()
        torch.testing.assert_close(y.grad, right(x, c))
        for memo in (
            captured._programs,
            graph._derived,
            walk._fragments,
            jitted.entries,
            jitted._recent,
        ):
            assert nodes(memo) <= 2600
    assert len(jitted.entries) >= 10


def test_a_batch_size_that_changes(small):
    f = A.jit(chain)
    for n in range(1, 30):
        x = torch.rand(n, 3)
        expected = torch.stack([chain(v, 0.5) for v in x])
        torch.testing.assert_close(A.vmap(lambda x: chain(x, 0.5))(x), expected)
        torch.testing.assert_close(A.vmap(lambda x: f(x, 0.5))(x), expected)
        assert nodes(graph._derived) <= 2600
    assert f.captures <= 4  # one sample is one signature, whatever the batch


def test_clear_caches():
    f = A.jit(lambda x: x.sin() * 3)
    x = torch.rand(3)
    f(x)
    A.grad(lambda x: f(x).sum())(x)
    A.clear_caches()
    assert not len(f.entries) and not len(captured._programs) and not len(graph._derived)
    assert not any(known.cache_info().currsize for known in cache.REMEMBERED)
    torch.testing.assert_close(f(x), x.sin() * 3)
    torch.testing.assert_close(A.grad(lambda x: f(x).sum())(x), x.cos() * 3)


def test_cleared_in_the_middle_of_a_capture():
    def f(x):
        y = x.sin()
        A.clear_caches()
        return (y * x).sum()

    x = torch.rand(3, dtype=torch.float64)
    for transform in (A.grad, lambda f: A.grad(A.jit(f))):
        torch.testing.assert_close(transform(f)(x), x.cos() * x + x.sin())
    torch.testing.assert_close(A.vmap(f)(x[None]), f(x)[None])
