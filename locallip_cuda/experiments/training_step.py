"""One training step, eager or as a CUDA graph: nothing in it waits for the device or copies to it from the host."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from ..nn import project_thresholds_

# Calls before a capture: as many as torch's documentation makes, for what libraries and autograd set up when first met.
WARM_UP_CALLS = 3


def adam(parameters: Iterable[nn.Parameter], learning_rate: float, *, capture: bool) -> torch.optim.Adam:
    """Adam. With ``capture`` its learning rate and its count of steps are tensors on the parameters' device."""
    parameters = list(parameters)
    optimiser = torch.optim.Adam(parameters, lr=learning_rate, capturable=capture)
    if capture:
        for group in optimiser.param_groups:
            group["lr"] = torch.full((), learning_rate, device=parameters[0].device)
    return optimiser


class Replayed:
    """``function`` as a CUDA graph: its first calls run it, the next one captures it, from then on it is replayed.

    All that ``function`` reads has to stay where it is in memory. The result of a call holds until the next one.

    Args:
        stream: for the first calls and the capture.
    """

    def __init__(self, function: Callable[[], Tensor], stream: torch.cuda.Stream) -> None:
        self._function = function
        self._stream = stream
        self._warm_up_calls = WARM_UP_CALLS
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor

    def __call__(self) -> Tensor:
        if self._warm_up_calls:
            self._warm_up_calls -= 1
            return self._run()
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):  # records, does not run
                self._result = self._function()
            self._graph = graph
        self._graph.replay()
        return self._result

    def _run(self) -> Tensor:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = self._function()
        current.wait_stream(self._stream)
        return result


class TrainingStep:
    """One update of the weights: forward pass with bounds, loss, backward pass, optimiser, projection of thresholds.

    What differs between steps stands in tensors on the device, which are written before the step. So it can be one CUDA
    graph, for kappa = 1, where no bound is computed, and another below, made anew when ``launches`` changes.

    Args:
        objective: module of (x, y, eps, kappa) that returns the loss and a tensor of statistics.
        optimiser: of its parameters; where ``capture``, with all its state on the device, as from :func:`adam`.
        capture: replay CUDA graphs; all batches then have to be of one shape. Otherwise every step runs eagerly.
        launches: what a step with bounds launches, asked before each.
    """

    def __init__(
        self,
        objective: nn.Module,
        optimiser: torch.optim.Optimizer,
        *,
        capture: bool,
        launches: Callable[[], Hashable] = lambda: None,
    ) -> None:
        self._objective = objective
        self._optimiser = optimiser
        self._capture = capture
        self._launches = launches
        device = next(objective.parameters()).device
        # In float64, as the numbers they stand for, so that they round where those would.
        self._eps, self._kappa = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._stream: torch.cuda.Stream
        self._updates: dict[bool, tuple[Hashable, Replayed]] = {}

    def __call__(self, x: Tensor, y: Tensor, eps: float, kappa: float, learning_rate: float) -> Tensor:
        """The statistics of the batch (x, y), before the update; where ``capture``, they hold until the next call.

        ValueError where ``capture`` and the batch is not of the first one's shape.
        """
        self._eps.fill_(eps)
        self._kappa.fill_(kappa)
        for group in self._optimiser.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate
        bounded = kappa < 1
        if not self._capture:
            return self._update(x, y, bounded)
        inputs, launches = self._write_inputs(x, y), self._launches() if bounded else None
        if bounded not in self._updates or self._updates[bounded][0] != launches:
            function = partial(self._update, *inputs, bounded=bounded)
            self._updates[bounded] = launches, Replayed(function, self._stream)
        return self._updates[bounded][1]()

    def _update(self, x: Tensor, y: Tensor, bounded: bool) -> Tensor:
        statistics: Tensor
        loss, statistics = self._objective(x, y, self._eps, self._kappa if bounded else 1.0)
        loss.backward()
        self._optimiser.step()
        project_thresholds_(self._objective)
        # At the end, because a capture has to start without gradients: it allocates its own.
        self._optimiser.zero_grad(set_to_none=True)
        return statistics

    def _write_inputs(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self._inputs is None:
            self._inputs = torch.empty_like(x), torch.empty_like(y)
            self._stream = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call, unused-ignore]
        for name, given, static in zip("xy", (x, y), self._inputs, strict=True):
            if given.shape != static.shape:
                raise ValueError(
                    f"{name}: got shape {tuple(given.shape)}, want the first batch's, {tuple(static.shape)}: "
                    "a captured step takes batches of one shape only"
                )
            static.copy_(given)
        return self._inputs
