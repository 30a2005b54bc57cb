"""What is said of captures and compilations that take long, by a clock of the test's."""

import re
import threading

import pytest
import torch

from aotfunc import grad, jit, partition, progress, show_progress
from aotfunc.errors import BackendWarning
from aotfunc.partition import Bytes, Peak
from aotfunc.partition.exact import StateGraph
from aotfunc.partition.solve import Network
from aotfunc.partition.within import Within
from aotfunc.progress import Screen, Watch, doing, with_progress
from tests.partition.test_solve import MODELS


class Said(list):
    """A screen that keeps what it shows."""

    def show(self, seconds, text):
        self.append(text)

    def clear(self):
        self.append("")


@pytest.fixture
def watch(monkeypatch):
    """A watch that looks when the test says so; seconds pass by ``watch.now += 1``."""
    watch = Watch(Said(), lambda: watch.now)
    watch.now, watch.thread = 100.0, threading.current_thread()
    monkeypatch.setattr(progress, "WATCH", watch)
    with show_progress():
        yield watch


def test_steps_are_said_after_two_seconds_and_cleared(watch):
    with doing(lambda: "outer"):
        watch.now += 2
        watch.say()
        assert watch.screen == []
        watch.now += 0.6
        watch.say()
        for item in with_progress("items", "abcd"):
            if item == "c":
                watch.now += 10
                watch.say()
        watch.say()
    said = ["aotfunc, 3 s: outer", "aotfunc, 13 s: outer › items, 2 of 4", "aotfunc, 13 s: outer"]
    assert watch.screen == [*said, ""] and not watch.running


def test_a_capture_says_where_it_is(watch):
    def f(x):
        y = x.sin()
        watch.now += 3
        watch.say()
        return y.cos()

    grad(lambda x: f(x).sum())(torch.ones(3))
    (said,) = filter(None, watch.screen)
    assert said.startswith("aotfunc, 3 s: capture, 1 ops (at test_progress.py:")
    assert said.endswith(" in f: y = x.sin())")


def test_a_compilation_says_which_half_it_is(watch):
    def compiler(gm, example_inputs):
        watch.now += 3
        watch.say()
        return gm.forward

    jit(lambda x: x.sin().sum(), backend=compiler)(torch.ones(3, requires_grad=True)).backward()
    said = [*filter(None, watch.screen)]
    assert said == [f"aotfunc, 3 s: jit, {half} of 2 ops" for half in ("forward", "backward")]


def steps_of(what, watch, monkeypatch, *functions):
    """Let the watch look whenever one of these functions of other libraries is called."""
    for owner, name in functions:
        original = getattr(owner, name)

        def looked(*args, original=original, **kwargs):
            watch.now += 3
            watch.say()
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, looked)
    what()
    steps = [said.rpartition(" › ")[2] for said in filter(None, watch.screen)]
    return [re.sub(r"^aotfunc, \d+ s: ", "", step) for step in steps]


def test_inductor_says_how_far_it_is(watch, monkeypatch):
    from torch._inductor import codecache, compile_fx, config, graph, scheduler
    from torch._inductor.fx_passes import post_grad

    functions = [
        (compile_fx, "fake_tensor_prop"),
        (post_grad, "remove_noop_ops"),
        (graph.GraphLowering, "call_function"),
        (scheduler.Scheduler, "fuse_nodes"),
        (scheduler.Scheduler, "enter_context"),
        (codecache.LambdaFuture, "result"),
    ]
    monkeypatch.setattr(codecache.LambdaFuture, "result", refuse)  # no time for g++
    f = jit(lambda x: (x.sin() @ x).cos(), backend="inductor")
    with config.patch(fx_graph_cache=False), pytest.warns(BackendWarning, match="refuse"):
        found = steps_of(lambda: f(torch.ones(4, 4)), watch, monkeypatch, *functions)
    assert [*dict.fromkeys(found)] == [
        "Inductor, preparation",
        "Inductor, passes over the graph",
        *[f"Inductor, lowering, {i} of 5" for i in (1, 2, 3)],
        "Inductor, fusion of 3 ops",
        *[f"Inductor, kernels, {i} of 3" for i in range(3)],
        "Inductor, compiler, 0 of 2",
    ]


def refuse(*args, **kwargs):
    raise OSError("refused")


def test_a_partition_says_how_far_it_is(watch, monkeypatch):
    joint = MODELS["transformer"]().module

    def reports():
        most = partition(joint, num_fwd_outputs=1).report.bytes
        for budget, exact in ((Bytes(most // 2), True), (Peak(10 * most), False)):
            report = partition(joint, memory_budget=budget, exact=exact, num_fwd_outputs=1).report
            assert report.gap < 1

    functions = [(StateGraph, "extend"), (Network, "cut"), (Within, "peak")]
    found = steps_of(reports, watch, monkeypatch, *functions)
    assert {re.sub(r"\d+", "#", step) for step in found} == {
        "cut #",
        "best choice, # s",
        "peaks of the frontier, # of #",
    }


def test_an_error_ends_its_steps(watch):
    def f(x):
        raise KeyError

    with pytest.raises(KeyError):
        grad(f)(torch.ones(()))
    assert not watch.running


def test_silent_unless_asked(watch):
    with show_progress(False), doing(lambda: "step"):
        watch.now += 60
        watch.say()
        assert not watch.running
        with show_progress(), doing(lambda: "asked"):
            assert watch.running
    assert watch.screen == [""]


def test_of_several_threads_the_longest_is_said(watch):
    inside, done = threading.Barrier(2), threading.Event()

    def other():
        with show_progress(), doing(lambda: "other"):
            inside.wait()
            done.wait()

    thread = threading.Thread(target=other)
    with doing(lambda: "first"):
        watch.now += 1
        thread.start()
        inside.wait()
        watch.now += 2
        watch.say()
        forked = Watch(Said())
        forked.running = dict(watch.running)
        forked.alone()  # as in a process that was forked here
        assert [*forked.running] == [threading.get_ident()]
    watch.say()
    assert watch.screen == ["aotfunc, 3 s: first"]  # not cleared while another thread is busy
    watch.now += 1
    watch.say()
    assert watch.screen[1:] == ["aotfunc, 3 s: other"]
    done.set()
    thread.join()
    assert not watch.running and watch.screen[-1] == ""


def test_threads_that_begin_and_end_while_one_looks(monkeypatch):
    monkeypatch.setattr(progress, "BETWEEN", 0.0005)
    monkeypatch.setattr(progress, "AFTER", 0.0)
    watch = Watch(Said())
    monkeypatch.setattr(progress, "WATCH", watch)

    def work():
        with show_progress():
            for _ in range(300):
                with doing(lambda: "a"):
                    for _ in with_progress("b", range(3)):
                        pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    while (looking := watch.thread) is not None:
        looking.join(1)
    assert not watch.running


def test_what_is_no_terminal_gets_a_line_every_ten_seconds(capsys, monkeypatch):
    monkeypatch.setattr(progress, "TERMINAL", False)
    screen = Screen()
    for seconds in (2.1, 5, 12.2, 13):
        screen.show(seconds, f"{seconds}")
    assert capsys.readouterr().err == "2.1\n12.2\n"


def test_a_terminal_gets_one_line_that_is_rewritten(capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(progress, "TERMINAL", True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    screen = Screen()
    screen.show(2.1, "short")
    screen.show(2.2, "a text that is too long for the line")
    screen.clear()
    printed = capsys.readouterr().err
    assert "short" in printed and "a text that is too …" in printed
    assert "\x1b[2K" in printed and printed.count("\n") <= 1
