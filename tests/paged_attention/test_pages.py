import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged_attention.pages import HBMPageManager
from tests.paged_attention.harness import make_engine


def manager(num_pages: int = 6, page_size: int = 4) -> HBMPageManager:
    return HBMPageManager(make_engine(num_pages=num_pages, page_size=page_size).metadata)


def test_an_allocation_is_exactly_n_pages_or_nothing():
    pages = manager(num_pages=6)
    assert pages.alloc_hbm_pages(3) == [1, 2, 3]
    assert pages.alloc_hbm_pages(3) == []
    assert pages.free_pages == [4, 5]
    assert pages.alloc_hbm_pages(2) == [4, 5]


def test_an_allocation_of_zero_pages_is_empty_and_of_fewer_an_error():
    pages = manager()
    assert pages.alloc_hbm_pages(0) == []
    with pytest.raises(ValueError, match="cannot allocate -1 pages"):
        pages.alloc_hbm_pages(-1)


@given(length=st.integers(0, 40), page_size=st.integers(1, 7))
def test_a_prompt_takes_the_pages_that_hold_it_and_no_more(length: int, page_size: int):
    pages = manager(num_pages=50, page_size=page_size)
    taken = len(pages.alloc_prefill_hbm_pages(length))
    assert taken * page_size >= length
    assert (taken - 1) * page_size < length


def test_seed_19_the_dummy_page_is_never_handed_out_and_ignored_when_freed():
    pages = manager(num_pages=4)
    assert pages.current_page_index == 0
    assert pages.alloc_hbm_pages(3) == [1, 2, 3]
    pages.free_hbm_pages([0, 2])
    assert pages.free_pages == [2]


@pytest.mark.parametrize(
    ("freed", "message"),
    [
        ([1, 4], "page 4: it is already free"),
        ([1, 6], "page 6: pages are 1 .. 5"),
        ([1, -1], "page -1: pages are 1 .. 5"),
        ([2, 1, 2], r"pages \[2\] twice"),
    ],
)
def test_seed_19_a_wrong_free_raises_and_changes_nothing(freed: list[int], message: str):
    pages = manager(num_pages=6)
    pages.alloc_hbm_pages(3)
    with pytest.raises(ValueError, match=message):
        pages.free_hbm_pages(freed)
    assert pages.free_pages == [4, 5]
    pages.free_hbm_pages([1, 2, 3])
    assert pages.free_pages == [4, 5, 1, 2, 3]


@given(st.lists(st.integers(1, 4), max_size=30))
def test_seed_30_pages_come_back_in_the_order_in_which_they_were_freed(sizes: list[int]):
    pages = manager(num_pages=8)
    expected = list(range(1, 8))
    held: list[list[int]] = []
    for nth, size in enumerate(sizes):
        # A prompt of size pages, every other time.
        taken = pages.alloc_prefill_hbm_pages(4 * size - nth % 4) if nth % 2 else pages.alloc_hbm_pages(size)
        if size <= len(expected):
            assert taken == expected[:size]
            expected = expected[size:]
            held.append(taken)
        else:
            assert taken == []
            freed = held.pop(0)
            pages.free_hbm_pages(freed)
            expected += freed
        assert pages.free_pages == expected


@given(order=st.permutations(range(1, 6)))
def test_free_pages_are_handed_out_in_the_order_that_is_asked_for(order: list[int]):
    pages = manager(num_pages=6)
    pages.order_free_pages(order)
    assert pages.alloc_hbm_pages(5) == order


@pytest.mark.parametrize("order", [[1, 2, 3, 4], [0, 1, 2, 3, 4], [1, 2, 3, 4, 4], [1, 2, 3, 4, 6]])
def test_an_order_names_each_free_page_once(order: list[int]):
    pages = manager(num_pages=6)
    with pytest.raises(ValueError, match="each of the 5 free pages once"):
        pages.order_free_pages(order)
    assert pages.free_pages == [1, 2, 3, 4, 5]
