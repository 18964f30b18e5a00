"""What moves the weights: the rate, the average, one optimiser's step, and the means of what it logs."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from umm.rng import PictureRNG
from umm.settings import OptimSettings
from umm.tasks.base import Group, Turn

Plan = list[list[int]]  # picture numbers of each micro-batch


def learning_rate(optim: OptimSettings, images: int, total: int) -> float:
    """The rate after `images` pictures: linear warm-up from zero, a constant part, then the decay to `final_lr`.

    `total` is the length of the run in images, the end of the decay unless `decay_images` says otherwise.
    """
    if images < optim.warmup:
        return optim.lr * images / optim.warmup
    start, end = optim.warmup + optim.constant, optim.decay_images or total
    if optim.decay == "constant" or images <= start:
        return optim.lr
    done = min((images - start) / max(end - start, 1), 1.0)
    rest = 1 - done if optim.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return optim.final_lr + (optim.lr - optim.final_lr) * rest


class EMA:
    """ema <- d * ema + (1 - d) * weights after every step; buffers are copied.

    d = min(decay, (1 + n) / (10 + n)) after n steps, so that a short run is not judged by its initial weights.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.steps = decay, 0
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)
        for mine, theirs in zip(self.module.buffers(), module.buffers()):
            mine.copy_(theirs)


class Learner:
    """An optimiser with its module, its average, and the tasks whose gradients it follows.

    A shared module (`Group.shared`) takes one step on the sum of its tasks' gradients, each clipped by itself, so that
    a task which moves nothing of another's leaves it exactly as it would have been alone.
    """

    def __init__(self, group: Group, accelerator: Accelerator, total: int, compiled: bool):
        self.group, self.accelerator, self.total = group, accelerator, total
        self.key, self.phase = group.name, group.phase
        phase, optim = self.phase, self.phase.optim
        phase.module.to(accelerator.device)
        self.ema = EMA(phase.module, phase.ema) if phase.ema is not None else None
        alone = group.shared is None
        if compiled:
            for module in [phase.module] if alone else phase.module.children():
                module.compile()
        trainable = [p for p in phase.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trainable, optim.lr, tuple(optim.betas), optim.eps, optim.weight_decay, fused=True
        )
        self.wrapped = accelerator.prepare_model(phase.module) if alone else None
        if alone:
            phase.forward = self.wrapped

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self.optimizer.param_groups[0]["params"]

    def step(self, batches: dict[str, list[dict]], plans: dict[str, Plan], images: int) -> dict[str, Tensor | float]:
        """One optimiser step; {logged name: value, still on the device}.

        Args:
            batches, plans: {task: its micro-batches, the picture numbers of each}; tasks that are not there rest.
            images: pictures trained on before this step.
        """
        turns = [turn for turn in self.group.turns if any(name in batches for name in turn.reads)]
        start, stop = self.span(turns)
        done = images + sum(map(len, next(iter(plans.values())))) * self.accelerator.num_processes
        rate = learning_rate(self.phase.optim, done - start, stop - start)
        logs: dict[str, Tensor | float] = {}
        gradients: list[list[Tensor | None]] = []
        for turn in turns:
            seen = [name for name in turn.reads if name in batches]
            terms = self.gradients_of(turn, joined(batches, seen), joined(plans, seen), images)
            norm = self.clip(turn)
            if turn.lends is not None:
                turn.lends.take(turn.task.name)
            logs |= {f"{turn.key}.{term}": value for term, value in (terms | {"lr": rate, "grad_norm": norm}).items()}
            if self.group.shared is not None:
                gradients.append(self.taken())
        if self.group.shared is not None:
            logs |= {f"{self.key}.{term}": value for term, value in self.meet(turns, gradients).items()}
        self.update(rate)
        return logs

    def span(self, turns: list[Turn]) -> tuple[int, int]:
        """Images between which the present schedule runs: the phase's, or the window of the tasks at work."""
        start = max([self.phase.start, *(turn.task.window[0] for turn in turns)])
        return start, min([self.total, *(turn.task.window[1] or self.total for turn in turns)])

    def gradients_of(self, turn: Turn, micro_batches: list[dict], plan: Plan, images: int) -> dict[str, Tensor]:
        """A turn's gradients, averaged over the processes, but for those it stops; returns its terms."""
        if turn.borrows is None:
            terms = self.backward(turn, micro_batches, plan, images)
        else:
            turn.borrows.repay(turn.task.name)
            terms = {}
        if self.wrapped is None:
            self.reduce()
        for parameter in turn.stopped:
            parameter.grad = None
        return terms

    def backward(self, turn: Turn, micro_batches: list[dict], plan: Plan, images: int) -> dict[str, Tensor]:
        """Adds up the gradients of the mean loss over all micro-batches; returns the mean terms."""
        total: dict[str, Tensor] = {}
        turn.task.begin(turn.phase)
        for i, (batch, counters) in enumerate(zip(micro_batches, plan)):
            rng = PictureRNG(counters, turn.task.seed, turn.key, device=self.accelerator.device)
            with self.around(last=i == len(plan) - 1):
                terms = turn.task.loss(turn.phase, batch, rng, images)
                (terms["loss"] / len(plan)).backward()
            for name, value in terms.items():
                total[name] = total.get(name, 0.0) + value.detach() / len(plan)
        turn.task.end(turn.phase, lambda x: self.accelerator.reduce(x, "mean"))
        return total

    def around(self, last: bool):
        """A wrapped module synchronises in the last micro-batch and casts by itself; a shared one does neither."""
        if self.wrapped is None:
            return self.accelerator.autocast()
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    def reduce(self) -> None:
        """Average the gradients over the processes, for a module that no wrapper does it for."""
        there = [p for p in self.parameters if p.grad is not None]
        if self.accelerator.num_processes > 1 and there:
            flat = self.accelerator.reduce(torch.cat([p.grad.flatten() for p in there]), "mean")
            for parameter, gradient in zip(there, flat.split([p.numel() for p in there])):
                parameter.grad.copy_(gradient.view_as(parameter))

    def clip(self, turn: Turn) -> Tensor:
        """Returns the norm before clipping."""
        return torch.nn.utils.clip_grad_norm_(self.parameters, turn.clip if turn.clip > 0 else math.inf)

    def taken(self) -> list[Tensor | None]:
        """The gradients, removed from the parameters."""
        found = [p.grad for p in self.parameters]
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def meet(self, turns: list[Turn], gradients: list[list[Tensor | None]]) -> dict[str, Tensor]:
        """Give the parameters the weighted sum of the tasks' gradients; returns how those agree where they meet."""
        index = {id(parameter): i for i, parameter in enumerate(self.parameters)}
        common = [index[id(parameter)] for parameter in self.group.shared]
        weights: list[Tensor | float] = [turn.weight for turn in turns]
        tasks = [i for i, turn in enumerate(turns) if not turn.guests]
        parts = [as_vector([gradients[i][j] for j in common], self.group.shared) for i in tasks]
        logs = {}
        if len(parts) > 1 and all(part is not None for part in parts):
            norms = [part.norm() for part in parts]
            logs["cosine"] = cosine(parts[0], parts[1])
            logs["norm_share"] = norms[1] / (norms[0] + norms[1]).clamp_min(1e-30)  # the second task's
            for i, norm in zip(tasks[1:], norms[1:]) if self.group.balance else ():
                weights[i] = weights[i] * norms[0] / norm.clamp_min(1e-30)
        there = [(turns[i].task.name, part) for i, part in zip(tasks, parts) if part is not None]
        for (one, first), (other, second) in combinations(there, 2) if len(tasks) > 2 else ():
            logs[f"cosine_{one}_{other}"] = cosine(first, second)
        for parameter, mine in zip(self.parameters, zip(*gradients)):
            there = [(weight, gradient) for weight, gradient in zip(weights, mine) if gradient is not None]
            parameter.grad = sum_of(there)
        return logs

    def update(self, rate: float) -> None:
        """Step and average."""
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.phase.module)

    @property
    def averaged(self) -> nn.Module:
        """The weights that are judged: the average where there is one, else the weights themselves."""
        return self.ema.module if self.ema else self.phase.module


def joined(lists: Mapping[str, list], names: Sequence[str]) -> list:
    """The lists of these names one after another."""
    return [entry for name in names for entry in lists[name]]


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Of two vectors."""
    return first @ second / (first.norm() * second.norm()).clamp_min(1e-30)


def as_vector(gradients: list[Tensor | None], like: list[nn.Parameter]) -> Tensor | None:
    """One vector, zeros where there is no gradient; None where there is none at all."""
    if all(gradient is None for gradient in gradients):
        return None
    whole = [torch.zeros_like(p) if gradient is None else gradient for gradient, p in zip(gradients, like)]
    return torch.cat([gradient.flatten() for gradient in whole])


def sum_of(weighted: list[tuple[Tensor | float, Tensor]]) -> Tensor | None:
    """Sum of weight * gradient; a single one of weight 1 stays as it is, bit for bit."""
    total = None
    for weight, gradient in weighted:
        total = gradient * weight if total is None else total + gradient * weight
    return total


class Window:
    """Means of logged terms over some steps; nothing leaves the device before they are asked for.

    A term of two numbers is a sum and a count, whose ratio is logged.
    """

    def __init__(self):
        self.steps, self.sums, self.counts = 0, {}, {}

    def add(self, logs: dict[str, Tensor | float]) -> None:
        self.steps += 1
        for name, value in logs.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self, device: torch.device) -> dict[str, Tensor]:
        return {
            name: torch.as_tensor(total / self.counts[name], device=device, dtype=torch.float32)
            for name, total in self.sums.items()
        }


def finished(means: dict[str, Tensor]) -> dict[str, float]:
    """Means as numbers; a (sum, count) as its ratio, and left out where the count is 0."""
    values = {name: mean.tolist() for name, mean in means.items()}
    pairs = {name: pair for name, pair in values.items() if isinstance(pair, list)}
    ratios = {name: total / count for name, (total, count) in pairs.items() if count}
    return {name: ratios.get(name, value) for name, value in values.items() if name in ratios or name not in pairs}
