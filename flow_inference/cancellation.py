"""Stop a prediction from another thread, without waiting for the end of the pair that is being estimated."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from modeling_raft import RaftForOpticalFlow


class CancelledError(Exception):
    """A prediction was stopped, as requested."""


@contextmanager
def cancellable(model: RaftForOpticalFlow, stop_requested: Callable[[], bool]) -> Iterator[None]:
    """Check within this context, before every part of the model and every update of the flow, whether to stop.

    Args:
        model: What predicts. It must not be used outside of the context meanwhile.
        stop_requested: Called by the thread that predicts; a true result stops the prediction.

    Raises:
        CancelledError: In the context, `stop_requested` returned true.
    """

    def check(*_: Any) -> None:
        if stop_requested():
            raise CancelledError

    handles = [module.register_forward_pre_hook(check) for module in model.children()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
