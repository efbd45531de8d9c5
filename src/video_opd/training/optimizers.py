"""AdamW, on float32 weights (torch's), or on bfloat16 weights and with moments in 8 bits (torchao's formula).

A step at lr 1e-6 is far below the rounding step of a bfloat16 weight: rounded to the nearest, the weight
would never move. Stochastic rounding goes up or down with probabilities that make the mean exact, so many
steps add up to what float32 would have done. Moments in 8 bits are blocks of 256 numbers with a scale each
(Dettmers et al., arXiv 2110.02861). Of the second moment the root is held: it spans as many orders of
magnitude as the first. The square of a gradient below 1/2480 of its block's largest would be held as 0, and
the first moment, divided by next to nothing, could move the weight by a thousand learning rates (Li et al.,
arXiv 2309.01507, call this the zero-point problem).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from video_opd.config import Dtype, OptimConfig
from video_opd.errors import UserError
from video_opd.models.chunk_sizes import MOMENTS_A_SCALE, WEIGHTS_A_CHUNK
from video_opd.models.torchao import check_torchao
from video_opd.seeds import derive_seed

SMALLEST = 4096  # a tensor with fewer numbers keeps float32 moments, as in bitsandbytes and torchao
MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names
# In 8 bits: the name of what is held of each moment.
HELD = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq_root"}


def make_optimizer(
    parameters: Sequence[torch.nn.Parameter], optim: OptimConfig, weights: Dtype = "float32", seed: int = 0
) -> torch.optim.Optimizer:
    """AdamW. Weight decay leaves out vectors (biases, norms), as is usual.

    ``weights`` is ``model.weights``, and ``seed`` that of stochastic rounding.
    """
    held = {parameter.dtype for parameter in parameters}
    assert held == {getattr(torch, weights)}, "a bfloat16 weight loses updates, unless model.weights says so"
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if weights == "float32" and optim.moments == "float32":
        fused = optim.offload or None  # on a CPU the other ways read the memory several times
        return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused)
    return LowPrecisionAdamW(groups, optim, seed)


class LowPrecisionAdamW(torch.optim.Optimizer):
    """AdamW by torchao's formula, for bfloat16 weights, 8-bit moments, or both.

    It runs ``torchao.optim.adam.single_param_adam``, which ``torchao.optim.AdamW8bit`` compiles: here it runs
    as it is, slice by slice of each tensor, so that no compiler is needed and its float32 temporaries stay
    small. Three things differ from ``AdamW8bit``. The root of the second moment is held, where it is in 8
    bits. Moments that are not in 8 bits are float32: in the weight's bfloat16 a second moment would stop
    growing. And moments are plain tensors in ``state`` (codes and scales), so they are saved and loaded like
    any others.

    The draws of stochastic rounding are a function of (seed, number of the weight, its step), so a resume
    makes the same ones. bfloat16 weights accumulate their gradients in float32.
    """

    def __init__(self, groups: list[dict[str, Any]], optim: OptimConfig, seed: int) -> None:
        check_torchao("optim.moments int8" if optim.moments == "int8" else "model.weights bfloat16")
        settings = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
        super().__init__(groups, settings)
        self.eight_bits, self.seed = optim.moments == "int8", seed
        for parameter in self.weights():
            if parameter.dtype == torch.bfloat16:
                accumulate_in_float32(parameter)

    def weights(self) -> Iterator[torch.nn.Parameter]:
        return (parameter for group in self.param_groups for parameter in group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        assert closure is None, "the loop computes gradients before it steps"
        numbers = {id(parameter): number for number, parameter in enumerate(self.weights())}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, numbers[id(parameter)], group)
        return None

    def _update(self, parameter: torch.nn.Parameter, number: int, group: Mapping[str, Any]) -> None:
        from torchao.optim.adam import single_param_adam

        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            for name in MOMENTS:
                state |= self._zeros(parameter, name)
        state["step"] += 1
        weight, gradient = parameter.detach().view(-1), parameter.grad.reshape(-1)  # type: ignore[union-attr]
        lr = torch.tensor(float(group["lr"]))
        devices = [parameter.device] if parameter.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # torchao draws from the global generator
            torch.manual_seed(derive_seed(self.seed, "rounding", number, int(state["step"])))
            for start in range(0, weight.numel(), WEIGHTS_A_CHUNK):
                part = slice(start, start + WEIGHTS_A_CHUNK)
                with ExitStack() as held:
                    single_param_adam(
                        weight[part],
                        gradient[part],
                        state["step"],
                        *(held.enter_context(_in_float32(state, name, part)) for name in MOMENTS),
                        None,  # no AMSGrad
                        lr,
                        *group["betas"],
                        group["weight_decay"],
                        group["eps"],
                        True,  # the decay is AdamW's
                        parameter.dtype == torch.bfloat16,
                    )

    def _zeros(self, parameter: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
        if not self.eight_bits or parameter.numel() < SMALLEST or parameter.numel() % MOMENTS_A_SCALE:
            return {name: torch.zeros_like(parameter, dtype=torch.float32)}
        scales = torch.zeros(parameter.numel() // MOMENTS_A_SCALE, device=parameter.device)
        codes = torch.zeros_like(parameter, dtype=torch.uint8)
        return {HELD[name]: codes, f"{HELD[name]}_scale": scales}

    def named_state(self, names: Mapping[torch.Tensor, str]) -> dict[str, Any]:
        """The state by the weights' names, on the CPU; :meth:`load_named_state` reads it.

        ``Optimizer.load_state_dict`` would cast the moments to the type of the weights.
        """
        return {
            "state": {
                names[parameter]: {key: value.detach().cpu().clone() for key, value in state.items()}
                for parameter, state in self.state.items()
            },
            "param_groups": [
                {**group, "params": [names[parameter] for parameter in group["params"]]}
                for group in self.param_groups
            ],
        }

    def load_named_state(self, names: Mapping[torch.Tensor, str], saved: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` for a state that was made with other moments, or by a version that held the
        second moment itself in 8 bits."""
        for parameter in self.weights():
            held = saved["state"].get(names[parameter])
            if held is None:  # it has had no gradient yet
                self.state.pop(parameter, None)
                continue
            fresh = {key: value for name in MOMENTS for key, value in self._zeros(parameter, name).items()}
            if held.keys() - {"step"} != fresh.keys() or any(
                held[key].dtype != value.dtype or held[key].shape != value.shape
                for key, value in fresh.items()
            ):
                kinds = [", ".join(sorted(keys)) for keys in (held.keys() - {"step"}, fresh)]
                raise ValueError(
                    f"the moments of {names[parameter]} are not those of optim.moments, as this version "
                    f"holds them: {kinds[0]} in place of {kinds[1]}"
                )
            self.state[parameter] = {
                "step": held["step"].clone(),
                **{key: value.copy_(held[key]) for key, value in fresh.items()},
            }


def accumulate_in_float32(parameter: torch.nn.Parameter) -> None:
    """Makes autograd add up the gradients of a bfloat16 weight in float32.

    Each backward gives a bfloat16 gradient, as autocast does for a float32 weight. Added up in bfloat16, the
    thirty-second of them would lose most of its digits.
    """
    if not hasattr(parameter, "grad_dtype"):
        raise UserError(
            f"model.weights bfloat16 needs a torch in which gradients have a type of their own, and this is "
            f"{torch.__version__}: install a newer one, or set model.weights to float32"
        )
    parameter.grad_dtype = torch.float32


@contextmanager
def _in_float32(state: Mapping[str, torch.Tensor], name: str, part: slice) -> Iterator[torch.Tensor]:
    """A slice of a moment. What is written to it inside is kept, in 8 bits if it is held so."""
    if f"{HELD[name]}_scale" not in state:
        yield state[name].view(-1)[part]
        return
    from torchao.optim.subclass_8bit import OptimState8bit

    first = name == "exp_avg"
    codes = state[HELD[name]].view(-1)[part]
    scales = state[f"{HELD[name]}_scale"][part.start // MOMENTS_A_SCALE : part.stop // MOMENTS_A_SCALE]
    held = OptimState8bit(codes, scales, _map(first, codes.device), first, torch.float32)
    moment = held.dequantize() if first else held.dequantize().square()
    yield moment
    held.copy_(moment if first else moment.sqrt())


@functools.cache
def _map(signed: bool, device: torch.device) -> torch.Tensor:
    """The number that each of the 256 codes stands for, as a share of the largest of its block."""
    from torchao.optim.quant_utils import create_dynamic_map

    return torch.tensor(create_dynamic_map(signed), device=device)
