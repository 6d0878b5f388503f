"""How dictionaries are split over processes, and what each process may use."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.errors import UserError
from core.shares import number_of_cell_processes, number_of_processes, slots, split


def test_the_most_expensive_go_first_and_each_goes_to_the_cheapest_share():
    assert split({"a": 5, "b": 4, "c": 3, "d": 3, "e": 3}, 2) == [["a", "d"], ["b", "c", "e"]]  # 8 and 10


def test_there_are_at_most_as_many_shares_as_dictionaries():
    assert split({"a": 1, "b": 9}, 5) == [["b"], ["a"]]


def test_dictionaries_that_share_a_checkpoint_stay_together_or_are_split_among_themselves():
    costs = dict.fromkeys("abcdef", 1.0)
    assert split(costs, 2, begun=["ace", "bdf"]) == [["a", "c", "e"], ["b", "d", "f"]]
    assert split(costs, 1, begun=["ace", "bdf"]) == [["a", "c", "e"], ["b", "d", "f"]]
    assert split(costs, 2, begun=["abcdef"]) == [["a", "c", "e"], ["b", "d", "f"]]
    assert split(costs, 2, begun=["abxy"]) == [["a", "b"], ["c", "d", "e", "f"]]


@given(
    st.dictionaries(st.characters(codec="ascii"), st.integers(1, 100), min_size=1),
    st.integers(1, 6),
    st.lists(st.sets(st.characters(codec="ascii")), max_size=3),
)
def test_every_key_is_in_one_share_and_no_share_is_empty_or_crosses_a_common_checkpoint(costs, n, begun):
    shares = split(costs, n, begun)
    assert sorted(key for share in shares for key in share) == sorted(costs)
    assert all(shares) and len(shares) >= min(n, len(costs))
    if not begun:
        assert len(shares) == min(n, len(costs))
        loads = [sum(costs[key] for key in share) for share in shares]
        assert max(loads) - min(loads) <= max(costs.values())
    for share in shares:
        groups = [set(group) for group in begun if set(group) & set(share)]
        assert not groups or any(set(share) <= group for group in groups)


def test_auto_is_one_process_per_gpu_and_one_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert number_of_processes("auto", "auto") == 1 and number_of_processes(3, "auto") == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert number_of_processes("auto", "auto") == 4 and number_of_processes("auto", "cpu") == 1


@pytest.mark.parametrize("setting", [0, -1, "two", 1.5, True, None])
def test_a_wrong_number_of_processes_is_an_error_that_names_the_setting(setting):
    with pytest.raises(UserError, match=r"trainer\.processes"):
        number_of_processes(setting, "auto")
    with pytest.raises(UserError, match=r"trainer\.cell_processes"):
        number_of_cell_processes(setting, 3)


def test_there_is_one_cell_process_per_core_and_at_most_one_per_cell(monkeypatch):
    monkeypatch.setattr("core.shares._n_cores", lambda: 4)
    assert number_of_cell_processes("auto", 10) == 4 and number_of_cell_processes("auto", 3) == 3
    assert number_of_cell_processes(6, 10) == 6


def test_every_process_gets_one_of_the_visible_gpus_and_an_equal_share_of_the_threads(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    environments = slots(3, "auto")
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in environments] == ["5", "GPU-7", "5"]
    assert all(environment["OMP_NUM_THREADS"] == "2" for environment in environments)
    assert all("CUDA_VISIBLE_DEVICES" not in environment for environment in slots(3, "cpu"))
