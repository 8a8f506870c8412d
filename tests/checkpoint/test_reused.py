"""Memory is lent again only when nobody has it any more, and let go of when another size is wanted."""

import weakref

import torch

from stackgrow.growth.reused import Reused


def test_memory_in_use_is_nobody_elses() -> None:
    memory = Reused()
    first = memory.empty((3, 4), torch.float32).fill_(1)
    second = memory.empty((3, 4), torch.float32).fill_(2)
    row = first[1]  # a view holds the memory when its tensor is gone
    del first
    third = memory.empty((4, 3), torch.float32).fill_(3)
    assert row.tolist() == [1] * 4
    assert second.unique().tolist() == [2]
    assert third.unique().tolist() == [3]


def test_free_memory_of_the_same_size_is_lent_again() -> None:
    memory = Reused()
    place = memory.empty((3, 4), torch.float32).data_ptr()
    again = memory.empty((2, 3), torch.float64)
    assert (again.data_ptr(), again.shape, again.dtype) == (
        place,
        (2, 3),
        torch.float64,
    )


def test_free_memory_of_another_size_is_let_go() -> None:
    memory = Reused()
    memory.empty((3, 4), torch.float32)
    kept = weakref.ref(memory.lent[0][0])
    memory.empty((5,), torch.float32)
    assert kept() is None
    assert len(memory.lent) == 1
