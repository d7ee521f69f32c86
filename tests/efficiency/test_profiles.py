"""Cards by name, and how each can be had on a machine."""

from __future__ import annotations

import pytest

from kvbench.efficiency import profiles
from kvbench.efficiency.nvml import Card
from kvbench.efficiency.profiles import PROFILES, choose_profile
from kvbench.errors import UserError

GIB = 1 << 30
H100 = Card("NVIDIA H100 80GB HBM3", round(79.6 * GIB))
UNKNOWN = Card("NVIDIA GB900", 500 * GIB)


def on(monkeypatch: pytest.MonkeyPatch, card: Card | None) -> None:
    monkeypatch.setattr(profiles, "visible_device", lambda: card)


@pytest.mark.parametrize(
    ("name", "card", "device", "limit"),
    [
        ("v100", None, None, 64 * GIB),
        ("v100", H100, H100.name, 64 * GIB),
        ("h100", H100, H100.name, None),
        ("a100_80", H100, None, 80 * GIB),  # a little more than this card has
        ("h200", H100, None, 140 * GIB),
        ("h200", UNKNOWN, UNKNOWN.name, 140 * GIB),
        ("auto", H100, H100.name, None),
        ("auto", UNKNOWN, UNKNOWN.name, None),
    ],
)
def test_how_a_card_can_be_had(
    monkeypatch: pytest.MonkeyPatch, name: str, card: Card | None, device, limit
) -> None:
    on(monkeypatch, card)
    target = choose_profile(name)
    assert (target.profile.name, target.device, target.limit) == (name, device, limit)


def test_this_card_has_its_own_memory_and_its_data_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, H100)
    profile, sheet = choose_profile("auto").profile, PROFILES["h100"]
    assert (profile.label, profile.memory) == (H100.name, H100.memory)
    assert (profile.bandwidth, profile.fp16_rate) == (sheet.bandwidth, sheet.fp16_rate)
    on(monkeypatch, UNKNOWN)
    assert choose_profile("auto").profile.bandwidth is None


@pytest.mark.parametrize(
    ("name", "part"), [("auto", "no GPU here: name one"), ("h1000", "did you mean h100")]
)
def test_names_that_are_no_card(monkeypatch: pytest.MonkeyPatch, name: str, part: str) -> None:
    on(monkeypatch, None)
    with pytest.raises(UserError, match=part):
        choose_profile(name)


def test_each_device_name_means_one_profile() -> None:
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-40GB",
             "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090"]  # fmt: skip
    for name in names:
        assert sum(bool(p.device) and p.device in name for p in PROFILES.values()) == 1
