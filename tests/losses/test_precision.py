from __future__ import annotations

import torch

from pcka.losses.precision import without_autocast


@without_autocast
def product(student, teacher, *, factor=1.0):
    """A product."""
    return factor * student @ teacher


def test_autocast_is_off_inside_and_on_again_after(draw):
    x, y = draw(0, 4, 4).float(), draw(1, 4, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = product(x, y, factor=2.0)
        after = x @ y
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, 2 * x @ y, rtol=0, atol=0)
    assert after.dtype == torch.bfloat16


def test_the_function_keeps_its_name():
    assert (product.__name__, product.__doc__) == ("product", "A product.")
