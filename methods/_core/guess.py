"""A row for a class that has none, from two watched steps of a user's pipeline, and the proofs it passes there.

`study` sees which modules call the attention product and with what, and names the parts of the blocks by that. The rest is
measured: what moves when the latent does is the image, what equals the scheduler's sample is the latent. A guess is worth what
its proofs say, on the pipeline and the size it was made with.
"""
from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from methods._core.context import Rows, experts, split_target
from methods._core.denoiser import Block, Denoiser, describe
from methods._core.families import Axis, Blocks, Family, clocks, families, find
from methods._core.families.grids import Grid, Listed, Marked, Named, Packed, Shapes, Unknown
from methods._core.patch import Patch
from methods._core.reduction import Reduction, reduce_all
from methods._core.tokens import join_plan

Run = Callable[[], Any]
CLOSE = 1e-5
CLOCKS = (clocks.scheduler_time, clocks.share, clocks.share_done, clocks.sigma_ratio)


class Unclear(ValueError):
    """Why a model has no guess."""


@dataclass(frozen=True)
class Guess:
    """What two steps of a pipeline showed of the class `model_class`.

    `row` is None where there is none, for the `reason`. `proofs`: name -> (passed, in words).
    """

    model_class: str
    row: Family | None = None
    reason: str = ""
    proofs: dict[str, tuple[bool, str]] = field(default_factory=dict)

    @property
    def proved(self) -> bool:
        """Whether everything was proved, the span of the image's tokens too."""
        return self.row is not None and all(passed for passed, _ in self.proofs.values())

    def text(self) -> str:
        """What was found, proof by proof, and the row to add."""
        lines = [f"{self.model_class}: " + ("a guess from two steps" if self.row else f"no row. {self.reason}")]
        lines += [f"  {name:12s} {'passed' if passed else 'FAILED'}: {words}" for name, (passed, words) in self.proofs.items()]
        if self.row is not None:
            lines.append(f"  row          {source(self.row)}")
        return "\n".join(lines)


def source(value: Any) -> str:
    """A row, or a part of it, as Python: what differs from the defaults."""
    if dataclasses.is_dataclass(value):
        made = [(each.name, getattr(value, each.name), each.default if each.default_factory is dataclasses.MISSING
                 else each.default_factory()) for each in dataclasses.fields(value)]
        return f"{type(value).__name__}({', '.join(f'{name}={source(it)}' for name, it, usual in made if it != usual)})"
    if isinstance(value, tuple):
        return f"({', '.join(map(source, value))}{',' * (len(value) == 1)})"
    return value.__name__ if callable(value) else repr(value).replace("'", '"')


# ---- proofs of a row ------------------------------------------------------------------------------------------------------


def _zero(module: nn.Module, args: Any, out: Any) -> Any:
    return tuple(map(torch.zeros_like, out)) if isinstance(out, tuple) else torch.zeros_like(out)


def silent(models: Iterable[nn.Module], run: Run) -> float:
    """The most that a block of `models` changes its streams in `run()` while its branches give zeros."""
    seen, handles = [], []
    for model in models:
        for block in describe(model).blocks:
            handles += [branch.module.register_forward_hook(_zero) for branch in block.branches]
            if not block.row.alone:                                  # its attention is the branch
                handles.append(block.attn.register_forward_hook(_zero))

            def compare(module, args, kwargs, out, block=block):
                before, after = block.streams(args, kwargs), block.split(out)
                seen.extend(float((y - x).abs().max()) for x, y in zip(before, after, strict=True) if y is not None)
            handles.append(block.module.register_forward_hook(compare, with_kwargs=True))
    with _hooked(handles):
        run()
    return max(seen, default=math.inf)


@contextmanager
def permuted(pipe: Any) -> Iterator[None]:
    """Within it every self-attention over the image gets the image's tokens in another order, and what runs along them."""
    patches: list[Patch] = []
    try:
        for target in experts(pipe):
            patch = Patch(target, "permute")
            blocks = [block for block in patch.denoiser.blocks if block.row.product != "none" and not block.temporal]

            @functools.cache
            def order(n: int) -> Tensor:
                return torch.randperm(n, generator=torch.Generator().manual_seed(n))[None]

            def shuffle(x: Tensor, order=order):
                place = order(x.shape[1]).to(x.device)
                return join_plan(place, place[:, :0], place[:, :0], len(x))

            patches.append(reduce_all(patch, [Reduction(block, shuffle) for block in blocks],
                                      lambda context: lambda layer, grid: 1))
        yield
    finally:
        for patch in patches:
            patch.remove()


class _Reached(Exception):
    pass


def entering(denoiser: Denoiser, block: Block, inputs: dict[str, Any]) -> Tensor:
    """What enters a block for these inputs of the model, (B, N, C)."""
    seen = []

    def reach(module, args, kwargs):
        x = args[0] if args else next(iter(kwargs.values()))
        seen.append(x.movedim(block.row.sequence_axis, 1).clone())
        raise _Reached

    with _hooked([block.norm.register_forward_pre_hook(reach, with_kwargs=True)]):
        try:
            denoiser.model(**_own(inputs))
        except _Reached:
            pass
    return seen[0]


def misplaced(denoiser: Denoiser, inputs: dict[str, Any]) -> str:
    """Which of three corners of the latent does not move its token of the first block, and what moves; "" if all do.

    Where the model mixes the image's tokens before its first block, all that moves must be theirs.
    """
    block = denoiser.blocks[0]
    denoiser.note(denoiser.behind(inputs))
    grid = denoiser.row.grid
    frames, height, width = denoiser.grid(inputs, block)
    tokens = frames * height * width
    base = entering(denoiser, block, inputs)
    start = block.start(base.shape[1], tokens) if block.stream == "fused" else 0
    if start < 0 or (block.stream != "fused" and tokens + block.behind != base.shape[1]):
        return f"{tokens} tokens cannot be the image's among {base.shape[1]}"
    sample, patch = denoiser.sample(inputs), grid.patch(denoiser.model)
    for row, column in ((0, 0), (0, width - 1), (height - 1, width - 1)):
        moved = sample.clone()
        at: list[Any] = [slice(None)] * sample.ndim
        if sample.ndim == 3:
            at[1] = sample.shape[1] - block.behind - tokens + row * width + column
        else:
            axis = grid.height % sample.ndim
            at[axis], at[axis + 1] = row * patch[1], column * patch[2]
            if grid.frames is not None and sample.ndim > 4:
                at[grid.frames] = 0
        moved[tuple(at)] += 1.0
        found = _moved(entering(denoiser, block, inputs | denoiser.as_input(moved)), base)
        token = start + row * width + column
        if token not in found or (len(found) > 1 and not start <= min(found) <= max(found) < start + tokens):
            return f"({row}, {column}) should move token {token} and moves {_range(found)}"
    return ""


def _moved(x: Tensor, base: Tensor) -> list[int]:
    """Positions of (B, N, C) that differ."""
    return ((x - base).abs().amax((0, 2)) > 1e-6).nonzero().flatten().tolist()


def _range(found: list[int]) -> str:
    return "none" if not found else str(found[0]) if len(found) == 1 else f"{len(found)} from {min(found)} to {max(found)}"


def _output(out: Any) -> Tensor:
    """What a model gave, as one tensor."""
    out = out if torch.is_tensor(out) else out[0]
    return torch.stack(list(out)) if isinstance(out, (list, tuple)) else out


def _own(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: dict(value) if isinstance(value, dict) else value for name, value in inputs.items()}    # models pop from them


@contextmanager
def _hooked(handles: list) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---- watching -------------------------------------------------------------------------------------------------------------


def _named(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(list(inspect.signature(type(module).forward).parameters)[1:], args, strict=False)), **kwargs}


def _tensors(value: Any) -> list[Tensor]:
    return [value] if torch.is_tensor(value) else [x for x in value if torch.is_tensor(x)] \
        if isinstance(value, (list, tuple)) else []


@dataclass(frozen=True)
class _Step:
    """A step of the scheduler, with the `calls` [(inputs, output)] of the model before it."""

    t: float
    sigma: float | None
    output: Tensor
    sample: Tensor
    calls: list[tuple[dict[str, Any], Tensor]]


def _steps(pipe: Any, models: list[nn.Module], run: Run) -> list[_Step]:
    scheduler, calls, steps = pipe.scheduler, [], []
    plain = type(scheduler)

    @functools.wraps(plain.step)
    def watched(self, output, t, sample, *args, **kwargs):
        if self is scheduler:                                         # and not a copy of it, for sound
            sigmas = getattr(scheduler, "sigmas", None)
            sigma = None if sigmas is None else float(sigmas[len(steps)])
            steps.append(_Step(float(t), sigma, output, sample.clone(), calls[:]))
            calls.clear()
        return plain.step(self, output, t, sample, *args, **kwargs)

    def seen(module, args, kwargs, out):
        calls.append((_named(module, args, kwargs), _output(out)))

    scheduler.__class__ = type(plain.__name__, (plain,), {"step": watched})
    try:
        with _hooked([model.register_forward_hook(seen, with_kwargs=True) for model in models]):
            run()
    finally:
        scheduler.__class__ = plain
    if len(steps) != 2 or not all(each.calls for each in steps):
        raise Unclear("the run must be two steps of the pipeline's scheduler, each with a call of the model; it made "
                      f"{len(steps)}")
    return steps


class _Products(TorchFunctionMode):
    """Tells `see(q, k)` of every scaled dot product."""

    def __init__(self, see: Callable[[Tensor, Tensor], None]):
        super().__init__()
        self.see = see

    def __torch_function__(self, called, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if called is F.scaled_dot_product_attention:
            self.see(*(args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key"))))
        return called(*args, **kwargs)


@dataclass
class _Seen:
    """One call of the model: modules in the order in which they were called, the first call of each (arguments, output), how
    often, and of each module that calls the product by itself the first queries and the number of products."""

    order: list[nn.Module] = field(default_factory=list)
    first: dict[nn.Module, tuple[dict[str, Any], Any]] = field(default_factory=dict)
    times: dict[nn.Module, int] = field(default_factory=dict)
    queries: dict[nn.Module, Tensor] = field(default_factory=dict)
    products: dict[nn.Module, int] = field(default_factory=dict)


def _watch(model: nn.Module, inputs: dict[str, Any], kept: set[nn.Module]) -> _Seen:
    """Call the model; the arguments of the modules in `kept` are remembered."""
    seen, stack, handles = _Seen(), [], []

    def enter(module, args, kwargs):
        stack.append(module)
        seen.order.append(module)
        seen.times[module] = seen.times.get(module, 0) + 1
        if module in kept and module not in seen.first:
            seen.first[module] = _named(module, args, kwargs), None

    def leave(module, args, kwargs, out):
        stack.pop()
        if module in kept and seen.first[module][1] is None:
            seen.first[module] = seen.first[module][0], out

    def product(q, k):
        seen.queries.setdefault(stack[-1], q if stack[-1] in kept else q[:0])
        seen.products[stack[-1]] = seen.products.get(stack[-1], 0) + 1

    for module in model.modules():
        handles += [module.register_forward_pre_hook(enter, with_kwargs=True),
                    module.register_forward_hook(leave, with_kwargs=True)]
    with _hooked(handles), _Products(product):
        model(**_own(inputs))
    return seen


# ---- naming ---------------------------------------------------------------------------------------------------------------


def _lists(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Path of each list of equal modules -> what stands in for a block: the item, or the only thing in it."""
    found = {}
    for name, items in model.named_modules():
        if isinstance(items, nn.ModuleList) and len(items) and len({type(item) for item in items}) == 1:
            path, blocks = name, list(items)
            while len(inside := [part for part, _ in blocks[0].named_children()]) == 1:
                path = f"{path}{'' if '*' in path else '.*'}.{inside[0]}"
                blocks = [getattr(block, inside[0]) for block in blocks]
            found[path] = blocks
    return found


def _first_tensor(given: dict[str, Any]) -> Tensor | None:
    return next((value for value in given.values() if torch.is_tensor(value)), None)


def _along(given: dict[str, Any], lengths: set[int]) -> dict[str, Axis]:
    """Arguments with an axis of one of these lengths -> the axis. The last of a table of numbers holds channels."""
    def axis(name: str, x: Any) -> Axis | None:
        if isinstance(x, (tuple, list)):
            found = {axis(name, each) for each in x} - {None}
            return found.pop() if len(found) == 1 else None
        if not torch.is_tensor(x):
            return None
        mask = "mask" in name
        places = mask or x.dtype in (torch.int32, torch.int64)
        axes = [i for i in range(x.ndim if places else x.ndim - 1) if x.shape[i] in lengths and x.shape[i] > 1]
        if not mask:
            return axes[0] if axes else None
        axes = [i - x.ndim for i in axes if i or x.ndim == 1]                      # the first axis is the batch
        return (tuple(axes) if len(axes) > 1 else axes[0]) if axes else None

    found: dict[str, Axis] = {}
    for name, value in given.items():
        if isinstance(value, (tuple, list)):
            axes = [axis(name, x) for x in value]
            if axes and None not in axes and len(set(axes)) == 1:
                found[name] = axes[0]
            else:
                found |= {f"{name}.{i}": each for i, each in enumerate(axes) if each is not None}
        elif (each := axis(name, value)) is not None:
            found[name] = each
    return found


def _blocks(path: str, block: nn.Module, seen: _Seen, tokens: int, text_first: bool) -> Blocks:
    """The row of a list, by what the first block of it called."""
    parts = {name: part for name, part in block.named_children() if part in seen.first}
    called = sorted(parts, key=lambda name: seen.order.index(parts[name]))
    mine, other, cross = [], [], []
    for name in called:
        if parts[name] in seen.queries:
            given, out = seen.first[parts[name]]
            x = _first_tensor(given)
            words = next((v for k, v in given.items() if k.endswith("encoder_hidden_states") and torch.is_tensor(v)), None)
            words = None if words is x else words
            (cross if words is not None and not isinstance(out, tuple) else mine).append((name, x, words))
    if not mine:
        raise Unclear(f"{path}: no self-attention by a scaled dot product")
    (attn, x, words), *other = mine
    given, out = seen.first[block]
    if x is None or x.ndim != 3 or _first_tensor(given) is None:
        raise Unclear(f"{path}: its attention is not called with (B, tokens, C)")
    length, rest = x.shape[1], x.shape[1] - tokens
    if words is None and rest < 0 or words is not None and rest:
        raise Unclear(f"{path}: its attention is called with {length} tokens, and the image has {tokens}")
    count = words.shape[1] if words is not None else rest
    if count == tokens:
        raise Unclear(f"there are as many words as tokens of the image, {tokens}: run another size")
    before = called[:called.index(attn)]
    norm = next((name for name in before if (y := _first_tensor(seen.first[parts[name]][0])) is not None
                 and parts[name] not in seen.queries and y.ndim == 3 and y.shape[::2] == x.shape[::2]
                 and y.shape[1] in (length, length if text_first else length + count)), None)
    if norm is None:
        raise Unclear(f"{path}: no module is called with the tokens before {attn}")

    feeds: dict[int, list[str]] = {}
    linear = []
    for name in called:
        y, z = _first_tensor(seen.first[parts[name]][0]), seen.first[parts[name]][1]
        if name == norm or parts[name] in seen.queries or y is None or not torch.is_tensor(z) or z.ndim != 3 or y.ndim != 3:
            continue
        if isinstance(parts[name], nn.Linear):
            linear.append(name)
        elif y.shape == z.shape and sum(isinstance(each, nn.Linear) for each in parts[name].modules()) > 1:
            feeds.setdefault(z.shape[1], []).append(name)
    ff = feeds.pop(length, []) or feeds.pop(length + count, [])
    ff_text = feeds.pop(count, []) if count else []
    total = () if ff or not linear else (linear[-1], attn, *linear[:-1])
    text = "apart" if words is not None else "within" if rest else None
    returns: tuple[str, ...] = ("image",)
    if isinstance(out, tuple):
        lengths = {tokens: "image", count: "text"}
        if len(out) > 2 or any(y.shape[1] not in lengths for y in _tensors(out)) or len(_tensors(out)) < len(out):
            raise Unclear(f"{path}: gives {len(out)} things that are not the image and the words")
        returns = tuple(lengths[y.shape[1]] for y in out)
    second = next((name for name, value in given.items() if torch.is_tensor(value) and value.ndim == 3
                   and value.shape[1] == count), "encoder_hidden_states")
    more = tuple(name for name, *_ in (*other, *cross[1:])) + tuple(ff[1:])
    attended = {k: v for k, v in seen.first[parts[attn]][0].items() if not any(v is each for each in (x, words))}
    return Blocks(path, attn, norm, cross[0][0] if cross else None, ff[0] if ff else None, ff_text[0] if ff_text else None,
                  more, total, text, text_first if text else True, _along(attended, {length, tokens + count}), returns,
                  second if "text" in returns else "encoder_hidden_states", alone=bool(ff or total),
                  product="one" if seen.products[parts[attn]] == seen.times[parts[attn]] else "each",
                  shared=bool(ff and text == "apart" and not ff_text and seen.times[parts[ff[0]]] > 1))


def _structure(model: nn.Module, inputs: dict[str, Any], latent: str) -> tuple[dict[str, Any], int]:
    """(the lists of blocks, whether they take turns and are chained, which inputs are lists; how many tokens the image has)"""
    if hasattr(model, "down_blocks") and hasattr(model, "up_blocks"):
        raise Unclear("a UNet, whose stages are not guessed")
    lists = _lists(model)
    kept = {each for blocks in lists.values() for each in (*blocks, *blocks[0].children())}
    value = inputs[latent]
    noise = torch.Generator().manual_seed(0)
    moved = [x + torch.randn(x.shape, generator=noise).to(x) for x in (value if isinstance(value, list) else [value])]
    base = _watch(model, inputs, kept)
    other = _watch(model, inputs | {latent: moved if isinstance(value, list) else moved[0]}, set(base.queries))
    attending = {path: next(part for part in blocks[0].children() if part in base.queries) for path, blocks in lists.items()
                 if any(part in base.queries for part in blocks[0].children())}
    if not attending:
        raise Unclear("no list of equal blocks has a self-attention of its own that calls the scaled dot product")
    rows, tokens, text_first = [], 0, True
    for path in sorted(attending, key=lambda path: base.order.index(attending[path])):
        attn = attending[path]
        x, y = (_first_tensor(each.first[attn][0]) for each in (base, other))
        if x is None or x.ndim != 3 or len(found := _moved(x, y)) == 0:
            continue                                                            # a list of the words alone
        if found != list(range(found[0], found[-1] + 1)):
            raise Unclear(f"{path}: what moves with the latent is not in one piece")
        tokens = tokens or len(found)
        if len(found) < x.shape[1]:
            text_first = found[0] > 0
        elif base.queries[attn].shape[2] > x.shape[1] and not rows:             # a second stream joins at the product
            text_first = 0 not in _moved(*(each.queries[attn].transpose(1, 2).flatten(2) for each in (base, other)))
        rows.append(_blocks(path, lists[path][0], base, tokens, text_first))
    if not rows:
        raise Unclear("no block moves with the latent")
    ran = [module for module in base.order if any(module in lists[row.at] for row in rows)]
    owner = [next(i for i, row in enumerate(rows) if module in lists[row.at]) for module in ran]
    if len(ran) != len(set(ran)) or set(ran) != {block for row in rows for block in lists[row.at]}:
        raise Unclear("some block runs more than once, or not at all, in a call of the model")
    turns = len(rows) > 1 and owner == list(range(len(rows))) * (len(ran) // len(rows))
    if not turns and owner != sorted(owner):
        raise Unclear("the lists of blocks run in an order that is neither one by one nor in turns")
    listed = tuple(name for name, each in inputs.items() if isinstance(each, list) and len(_tensors(each)) == len(value)) \
        if isinstance(value, list) else ()
    return {"lists": tuple(rows), "interleaved": turns, "listed": listed, "chained": _chained(ran, base)}, tokens


def _chained(ran: list[nn.Module], seen: _Seen) -> bool:
    """Whether each block was given, as its first argument, something that the one before it gave, or all of it in a row."""
    def gave(block: nn.Module) -> list[Tensor]:
        out = _tensors(seen.first[block][1])
        return [*out, torch.cat(out, 1), torch.cat(out[::-1], 1)] if len(out) > 1 else out

    given = {block: _first_tensor(seen.first[block][0]) for block in ran}
    return all(any(x.shape == y.shape and torch.equal(x, y) for y in gave(before))
               for before, block in zip(ran, ran[1:], strict=False) if (x := given[block]) is not None)


def _latent(steps: list[_Step], scaled: bool) -> tuple[str, bool]:
    """The input that holds the latent, and whether in both steps it is the scheduler's sample."""
    def is_sample(value: Any, sample: Tensor) -> bool:
        x = torch.stack(value) if isinstance(value, list) and _tensors(value) else value
        if not torch.is_tensor(x) or x.ndim < 3 or x.numel() < sample.numel():
            return False
        if sample.ndim != x.ndim:
            if sample[0].numel() != x[0].numel():
                return False
            sample = sample.reshape(len(sample), *x.shape[1:])
        own = x[(slice(len(sample)), *(slice(n) for n in sample.shape[1:]))]
        return own.shape == sample.shape and torch.allclose(own.float(), sample.to(x).float(), rtol=1e-4, atol=1e-4)

    inputs = steps[0].calls[0][0]
    for name in inputs:
        if all(is_sample(given.get(name), step.sample) for step in steps for given, _ in step.calls):
            return name, not scaled
    for name, value in inputs.items():
        if (found := _tensors(value)) and found[0].ndim >= 3 and found[0].is_floating_point():
            return name, False
    raise Unclear("none of the model's inputs looks like a latent")


def _time(steps: list[_Step], train: int) -> tuple[str, Callable[..., float]]:
    """The input that holds the time, and the clock that it follows."""
    for name in sorted(steps[0].calls[0][0], key=lambda name: not name.startswith("t")):
        for clock in CLOCKS:
            if all(_tells(given.get(name), clock, step, train) for step in steps for given, _ in step.calls):
                return name, clock
    raise Unclear(f"none of the model's inputs follows a clock that is known: {', '.join(c.__name__ for c in CLOCKS)}")


def _tells(value: Any, clock: Callable[..., float], step: _Step, train: int) -> bool:
    if not torch.is_tensor(value) and not isinstance(value, (int, float)) or torch.is_tensor(value) and not value.numel():
        return False
    if step.sigma is None and clock is clocks.sigma_ratio:
        return False
    return math.isclose(float(torch.as_tensor(value).double().max()), clock(step.t, step.sigma, train), rel_tol=1e-3,
                        abs_tol=1e-3)


def _guidance(step: _Step, latent: str) -> tuple[bool, bool | None, str]:
    """Whether guidance doubles the batch; whether its first half is the conditional one, None where that is not shown."""
    inputs, out = step.calls[0]
    x = torch.stack(inputs[latent]) if isinstance(inputs[latent], list) else inputs[latent]
    samples, calls = len(step.sample), len(step.calls)
    if len(x) == samples and samples % 2 == 0 and torch.equal(*x.chunk(2)):           # the sample is doubled itself
        samples //= 2
    times = len(x) // samples
    if times == 1:
        return False, False, f"{calls} call{'s' * (calls > 1)} a step, each of one branch"
    if times != 2 or len(out) % 2:
        return True, None, f"a batch of {times} times the samples"
    channels = step.output.shape[1] if out.ndim == step.output.ndim else out.shape[1]     # a model may learn the variance
    a, b = (half.flatten(1).double() for half in out[:, :channels].chunk(2))
    for sign in (1, -1):
        made = sign * step.output[:samples].flatten(1).double()
        if made.shape == a.shape:
            scale = float(((made - a) * (b - a)).sum() / (b - a).square().sum())
            if float((a + scale * (b - a) - made).norm()) < 1e-3 * float(made.norm()) and not 0 <= scale <= 1:
                place = "first" if scale < 0 else "last"
                return True, scale < 0, f"one call a step with both branches, the conditional one {place}"
    return True, None, "one call a step with both branches, in an order that its output does not show: guide by more than 1"


def _by_sample(model: nn.Module, inputs: dict[str, Any], out: Tensor) -> bool:
    """Whether each half of a batch gives alone what it gives in it."""
    halves = Rows(("null", "cond"), len(out) // 2)
    for part in halves.parts:
        try:
            alone = _output(model(**_own({name: halves.take(value, part) for name, value in inputs.items()})))
        except Exception:                                          # an input that is not laid out by samples
            return False
        there = halves.take(out, part)
        if alone.shape != there.shape or float((alone - there).norm() / there.norm()) > CLOSE:
            return False
    return True


def _grids(inputs: dict[str, Any], latent: str) -> list[Grid]:
    x = inputs[latent]
    if isinstance(x, list):
        return [Listed()]
    if x.ndim == 4:
        return [Grid(), Grid(height=1)]
    if x.ndim == 5:
        return [Grid(frames=2), Grid(frames=1), Grid(frames=1, height=2)]
    found: list[Grid] = [Named()] if {"num_frames", "height", "width"} <= inputs.keys() else []
    found += [Marked()] if {"indicator", "position_ids"} <= inputs.keys() else []
    found += [Packed(ids=name) for name, value in inputs.items() if torch.is_tensor(value) and value.ndim in (2, 3)
              and value.shape[-1] in (3, 4) and value.shape[-2] >= x.shape[1] and name != latent]
    return found + [Shapes(name=name) for name, value in inputs.items() if isinstance(value, list) and not _tensors(value)]


# ---- the guess ------------------------------------------------------------------------------------------------------------


@contextmanager
def _known(row: Family) -> Iterator[None]:
    """Within it the classes of the row have it."""
    before = {name: families().get(name) for name in row.classes}
    families().update(dict.fromkeys(row.classes, row))
    try:
        yield
    finally:
        for name, old in before.items():
            if old is None:
                del families()[name]
            else:
                families()[name] = old


@torch.no_grad()
def study(pipe: Any, run: Run, name: str = "guessed", say: Callable[[str], None] = lambda words: None) -> Guess:
    """Describe the denoiser of `pipe` from `run()`, which samples two steps with it, and prove what was found.

    `run` is called three times, or four where there are several denoisers, and must do the same each time: it seeds its
    generator. Guidance must be on, if there is any. What is being done is told to `say`. Nothing is left on the pipeline or in
    the table of families.

    Raises:
        TypeError: `pipe` is no pipeline with a denoiser.
    """
    targets = experts(pipe)
    _, model = split_target(targets[0])
    if not hasattr(pipe, "scheduler"):
        raise TypeError(f"a guess follows the steps of a pipeline, not a bare {type(model).__name__}")
    models = [split_target(target)[1] for target in targets]
    kind = type(model).__name__
    try:
        if any(type(each) is not type(model) for each in models):
            raise Unclear("the pipeline has denoisers of several classes")
        say("two steps")
        steps = _steps(pipe, models, run)
        latent, plain = _latent(steps, hasattr(pipe.scheduler, "is_scale_input_called"))
        time, clock = _time(steps, pipe.scheduler.config.num_train_timesteps)
        batched, cond_first, guidance = _guidance(steps[0], latent)
        inputs = steps[0].calls[0][0]
        say("blocks")
        first = model if len(models) == 1 else next(each for each in models if _called_first(each, models, run))
        facts, tokens = _structure(first, inputs, latent)
    except Unclear as reason:
        return Guess(kind, reason=str(reason))
    # calls of one sample, or lists of one length, do not show whether others would be padded or packed together
    apart = batched and not facts["listed"] and _by_sample(first, *steps[0].calls[0])
    guidance += ", each of which gives the same alone" if apart else "; whether samples depend on each other is not shown"
    row = Family(name, (kind,), grid=Unknown(), latent=latent, time=time, clock=clock, batched=batched,
                 cond_first=bool(cond_first), plain=plain, by_sample=apart, **facts)
    proofs = {"clock": (True, f"{time} is {clock.__name__}, {latent} is {'' if plain else 'not '}the scheduler's sample"),
              "guidance": (cond_first is not None, guidance)}
    plain_outputs = [out for step in steps for _, out in step.calls]

    say("the run again, with silent branches")
    with _known(row):
        try:
            change = silent(models, run)
            passed, words = change < CLOSE, f"without its branches a block changes its streams by {change:.0e}"
        except Exception as error:
            passed, words = False, f"a block cannot run without its branches: {error}"
    proofs["silent"] = passed, words
    if not passed or cond_first is None:
        return Guess(kind, reason="a proof failed that no cache can do without", proofs=proofs)

    say("the grid")
    found, words = _find_grid(row, first, inputs, tokens)
    proofs["span"] = found is not None, words
    if found is not None:
        say("the run again, with its tokens in another order")
        proofs["permutation"] = _permutation(found, pipe, models, run, plain_outputs)
        row = found if proofs["permutation"][0] else row
    return Guess(kind, row, proofs=proofs)


def _called_first(model: nn.Module, models: list[nn.Module], run: Run) -> bool:
    called: list[nn.Module] = []
    with _hooked([each.register_forward_pre_hook(lambda module, args: called.append(module)) for each in models]):
        run()
    return called[0] is model


def _find_grid(row: Family, model: nn.Module, inputs: dict[str, Any], tokens: int) -> tuple[Family | None, str]:
    """The row with the first grid under which a place of the latent moves its token."""
    said = "no grid is known for such a latent"
    for grid in _grids(inputs, row.latent):
        tried = dataclasses.replace(row, grid=grid)
        with _known(tried):
            denoiser = describe(model)
            try:
                sides = denoiser.grid(inputs, denoiser.blocks[0])
                if (count := math.prod(sides) + denoiser.behind(inputs)) != tokens:
                    said = f"{source(grid)} has {count} tokens, and {tokens} move with the latent"
                    continue
                wrong = misplaced(denoiser, inputs)
            except Exception as error:
                said = f"{source(grid)} does not fit: {error}"
                continue
        if not wrong:
            frames, height, width = sides
            return tried, f"{frames} x {height} x {width} of {tokens} tokens; three corners of the latent move theirs"
        said = f"{source(grid)}: {wrong}"
    return None, said


def _permutation(row: Family, pipe: Any, models: list[nn.Module], run: Run, plain: list[Tensor]) -> tuple[bool, str]:
    if plain[0].dtype != torch.float32:
        return False, f"rounding in {plain[0].dtype} would hide a wrong axis: let the model run in float32"
    outputs: list[Tensor] = []
    watching = [model.register_forward_hook(lambda module, args, out: outputs.append(_output(out))) for model in models]
    with _known(row), _hooked(watching):
        try:
            with permuted(pipe):
                run()
        except Exception as error:
            return False, f"the run cannot take its tokens in another order: {error}"
    change = max(float((x - y).norm() / y.norm()) for x, y in zip(outputs, plain, strict=True))
    return change < CLOSE, f"tokens in another order change the model's output by {change:.0e}"


def guess(pipe: Any, run: Run) -> Guess:
    """Let methods be applied to a pipeline whose denoiser has no row, on a row guessed from `run()` and proved there.

    The row holds in this process, for the model's class, and is never looked for by itself. Where only the blocks and their
    branches were proved, methods that cache these can be applied; those that need to know which tokens are the image's refuse.
    A proof is one of the size, the pipeline and the settings of `run`: compare pictures before you rely on it.

    `run()` samples two steps with guidance on and seeds its generator, such as `lambda: pipe("a cat", num_inference_steps=2,
    generator=torch.Generator().manual_seed(0))`. -> what was found; print its `text()`

    Raises:
        TypeError: `pipe` is no pipeline with a denoiser.
        ValueError: its class has a row; or none was found that passed, in which case the message says why.
    """
    _, model = split_target(experts(pipe)[0])
    if find(type(model)) is not None:
        raise ValueError(f"{type(model).__name__} has a row: apply the method as it is")
    found = study(pipe, run)
    if found.row is None:
        raise ValueError(found.text())
    families().update(dict.fromkeys(found.row.classes, found.row))
    return found
