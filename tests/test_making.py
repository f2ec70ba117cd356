"""Work in threads beside the one that decides, and which stages Prefect tries again."""

import threading

import pytest
from conftest import TINY_PARAMS
from ruamel.yaml import YAML

from flows.at_once import AtOnce
from flows.making import RETRY_DELAYS, as_task
from neft_core.config import parse_params
from neft_core.graph import Stage


def params(hub_model: bool, hub_data: bool):
    data = YAML(typ="safe").load(TINY_PARAMS)
    if hub_model:
        data["model"] = {"kind": "hub", "path": "data/none", "id": "o/m", "revision": "a" * 40}
    if hub_data:
        splits = {"train": "train", "dev": "dev", "test": "test"}
        source = {"kind": "hub", "path": "data/none", "id": "o/d", "splits": splits}
        data["tasks"]["en-fr"]["source"] = source
    return parse_params(data, "params.yaml")


@pytest.mark.parametrize(
    ("hub_model", "hub_data", "again"),
    [(False, False, set()), (True, False, {"base"}), (True, True, {"base", "corpus"})],
)
def test_only_what_touches_a_network_is_tried_again(hub_model, hub_data, again):
    found = params(hub_model, hub_data)
    tasks = {
        family: as_task(Stage(family, family, item, (), ()), found, lambda: None)
        for family, item in (("corpus", "en-fr"), ("base", None), ("warmup", "en-fr"))
    }
    assert {family for family, task in tasks.items() if task.retries} == again
    for family in again:
        assert tasks[family].retry_delay_seconds == RETRY_DELAYS == [2.0, 10.0]


def test_several_go_on_at_once_and_end_in_any_order():
    first, second = threading.Event(), threading.Event()
    with AtOnce[str, int](2) as work:
        work.start("a", lambda: first.wait(60) and 1)
        work.start("b", lambda: second.wait(60) and 2)
        assert work.full
        second.set()
        ((name, future),) = work.ended()
        assert (name, future.result(), len(work)) == ("b", 2, 1)
        work.start("c", threading.current_thread)
        ((name, future),) = work.ended()
        assert name == "c"
        assert future.result() is not threading.current_thread()
        first.set()
        assert [name for name, _ in work.ended()] == ["a"]


def test_a_single_one_runs_in_the_thread_that_starts_it():
    with AtOnce[str, object](1) as work:
        work.start("a", threading.current_thread)
        assert work.full
        ((_, future),) = work.ended()
        assert future.result() is threading.current_thread()
        work.start("b", lambda: 1 / 0)
        ((_, future),) = work.ended()
        with pytest.raises(ZeroDivisionError):
            future.result()
        with pytest.raises(KeyboardInterrupt):
            work.start("c", interrupted)


def interrupted():
    raise KeyboardInterrupt


@pytest.mark.parametrize(("fault", "stopped"), [(KeyboardInterrupt, True), (ValueError, False)])
def test_a_cancel_stops_the_others_and_a_fault_waits_for_them(fault, stopped):
    seen, release = [], threading.Event()

    def work_on(stop):
        seen.append(stop.wait(60 if stopped else 0.5))
        release.wait(60)
        seen.append("ended")

    def leave() -> None:
        with AtOnce[str, None](2) as work:
            work.start("a", lambda: work_on(work.stop))
            threading.Timer(0.2, release.set).start()
            raise fault

    with pytest.raises(fault):
        leave()
    assert seen == [stopped, "ended"]
