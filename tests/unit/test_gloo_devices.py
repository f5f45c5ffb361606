"""Groups share the devices of the first one of their process, unless they come with options of their own."""

from __future__ import annotations

import os
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.patches import gloo_devices


class Group:
    """Makes devices where it is given none, as torch's does."""

    made = 0
    _Options = SimpleNamespace

    def __init__(
        self, store: Any, rank: int, size: int, how: Any = None, timeout: Any = None, options: Any = None
    ) -> None:
        given = options if options is not None else how
        self.timeout = timeout or how
        if isinstance(given, SimpleNamespace):
            self.options, self.timeout = given, getattr(given, "_timeout", None)
        else:
            Group.made += 1
            self.options = SimpleNamespace(_devices=[f"device {Group.made}"])


def patched(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(Group, "made", 0)
    monkeypatch.setattr(Group, "__init__", gloo_devices._on_same_devices(Group))
    return Group


def test_all_groups_have_the_devices_of_the_first_and_timeouts_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    group, minute = patched(monkeypatch), timedelta(minutes=1)
    groups = [group("store", 0, 2, timeout=2 * minute), group("store", 0, 2, minute), group("store", 0, 2)]
    assert [one.options._devices for one in groups] == [["device 1"]] * 3
    assert [one.timeout for one in groups] == [2 * minute, minute, None]
    assert groups[1].options._threads == 2


def test_options_of_the_callers_own_are_let_be(monkeypatch: pytest.MonkeyPatch) -> None:
    group = patched(monkeypatch)
    own = SimpleNamespace(_devices=["own"])
    assert group("store", 0, 2, own).options is own
    group("store", 0, 2)
    assert group("store", 0, 2, options=own).options is own
    assert group("store", 0, 2).options._devices == ["device 1"]
    with pytest.raises(TypeError):
        group("store", 0, 2, tiemout=3)


def test_a_fork_makes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    group = patched(monkeypatch)
    group("store", 0, 2)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert [group("store", 0, 2).options._devices for _ in range(2)] == [["device 2"]] * 2


def test_where_groups_do_not_tell_their_devices_each_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    group = patched(monkeypatch)
    monkeypatch.setattr(Group, "options", property(lambda _: None, lambda *_: None), raising=False)
    group("store", 0, 2)
    group("store", 0, 2)
    assert Group.made == 2
