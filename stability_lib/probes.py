"""What happens inside a model while it trains, read from outside through hooks that leave nothing behind.

`watch` reads a forward pass, `gradients`, `parameters` and `updates` the weights. All return tensors on the
model's device under names such as `attention_logit_max/block0`, so that one transfer fetches them all.
Root mean square throughout: RMS(x) = sqrt(mean(x_i^2)) (paper P, Sec. 2).

Dimensions: B batch, T position, H heads, E head size, V vocabulary.
"""

import contextlib
import copy
import functools
import importlib
import math
import threading
import weakref
from collections.abc import Callable, Iterator

import scipy.linalg
import torch
from torch import Tensor, nn

Readings = dict[str, Tensor]


@contextlib.contextmanager
def watch(model: nn.Module) -> Iterator[Readings]:
    """Fill the yielded dict during the forward passes inside the `with`; a later pass overwrites an earlier one.
    A compiled model runs as it was written meanwhile, as hooks see nothing else. Raises `RuntimeError` at the end where
    there was no pass.

    Per block: `attention_logit_max` (over batch, heads and visible pairs, before a soft cap), `attention_entropy`
    (nats, mean over queries, of the weights after it; softmax attention only), `q_rms`, `k_rms`, `qk_cosine` (mean over
    visible pairs), `qk_cosine_at_max` (of the pair with the largest logit), `output_rms`,
    `output_kurtosis`. Of a mixture of experts also
    `router_entropy` (nats, mean over tokens, of the softmax over all experts), `expert_load_max`, the largest share of
    an expert of all tokens' choices (1 / experts where even, 1 / top_k where all tokens choose alike), and
    `experts_used`, the share of the experts that any token chose. For the head: `logit_mean` (over tokens and
    vocabulary) and `log_z` (mean over tokens), log Z = logsumexp of the output logits.
    """
    readings: Readings = {}
    hooks = [model.head.register_forward_hook(_read_head(readings))]
    for i, block in enumerate(model.blocks):
        if "attention" in block.sublayers:
            hooks.append(block.attention.core.register_forward_hook(_read_attention(readings, f"block{i}")))
        if router := getattr(getattr(block, "mlp", None), "router", None):
            hooks.append(router.register_forward_hook(_read_router(readings, f"block{i}")))
        hooks.append(block.register_forward_hook(_read_output(readings, f"block{i}")))
    try:
        with _eager(model):
            yield readings
        _require(readings)
    finally:
        unhook(hooks)


@contextlib.contextmanager
def watch_heads(model: nn.Module) -> Iterator[Readings]:
    """Fill the yielded dict with the largest logit of each head over batch and visible pairs, [H], by the name of the
    attention layer: what QK-clip goes by."""
    largest: Readings = {}

    def reader(name: str):
        @torch.no_grad()
        def hook(core, inputs, output):
            q, k = (x.detach().float() for x in inputs[:2])
            with full_precision(q.device.type):
                z_BxHxTxT = core.logits(q, k)
            largest[name] = largest_logits(z_BxHxTxT, ~core.visible(z_BxHxTxT))[0].amax((0, 2))
        return hook

    hooks = [block.attention.core.register_forward_hook(reader(f"blocks.{i}.attention"))
             for i, block in enumerate(model.blocks)]
    try:
        yield largest
    finally:
        unhook(hooks)


@contextlib.contextmanager
def watch_pattern(model: nn.Module, block: int = 0, head: int = 0) -> Iterator[list[Tensor]]:
    """Collect the attention pattern [T, T] of one head on the first sequence of each forward pass."""
    patterns: list[Tensor] = []

    @torch.no_grad()
    def hook(core, inputs, output):
        q, k, _ = (x[:1, head:head + 1] for x in inputs)
        with full_precision(q.device.type):
            patterns.append(core.weights(core.logits(q.float(), k.float()))[0, 0])

    handle = model.blocks[block].attention.core.register_forward_hook(hook)
    try:
        with _eager(model):
            yield patterns
        _require(patterns)
    finally:
        handle.remove()


def parameters(model: nn.Module) -> Readings:
    """`parameter_rms/<layer>` of every weight matrix."""
    return rms_of("parameter_rms", model.named_weights(Tensor.detach))


def gradients(model: nn.Module) -> Readings:
    """`gradient_rms/<layer>` of every weight matrix that has a gradient, as frozen ones have none; call after
    `backward` and before clipping. Raises `RuntimeError` where none has one."""
    found = model.named_weights(lambda weight: weight.new_empty(len(weight), 0) if weight.grad is None else weight.grad)
    found = {name: gradient for name, gradient in found.items() if gradient.numel()}
    if not found:
        raise RuntimeError("no weight matrix has a gradient: read them after backward() and before zero_grad(), of a "
                           "model that is not frozen")
    return rms_of("gradient_rms", found)


@contextlib.contextmanager
def updates(model: nn.Module) -> Iterator[Readings]:
    """`update_rms/<layer>`, the change of every weight matrix inside the `with`, filled at its end."""
    before = model.named_weights(lambda weight: weight.detach().clone())
    readings: Readings = {}
    yield readings
    after = model.named_weights(Tensor.detach)
    readings.update(rms_of("update_rms", {name: after[name] - before[name] for name in before}))


def sharpness(loss: Callable[[], Tensor], weights: list[Tensor], precondition: list[Tensor],
              start: Tensor | None = None, iterations: int = 5) -> tuple[float, Tensor]:
    """About the largest eigenvalue of P^-1 H, H the Hessian of `loss` in the weights and P the diagonal `precondition`,
    by Lanczos on P^-1/2 H P^-1/2, and its vector, flat, to `start` from the next time. Without a start it begins from
    fixed random numbers and takes twice the `iterations`.

    A few iterations give a lower bound, the closer the further the eigenvalue is from the next. For AdamW P is
    `adam_preconditioner`, and its step turns unstable at (2 + 2 beta1) / ((1 - beta1) lr) = 38 / lr (Cohen et al. 2022,
    arXiv 2207.14484, eq. 3).
    """
    gradients = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), weights, create_graph=True)])
    root = torch.cat([p.flatten() for p in precondition]).rsqrt()
    if start is None:
        iterations *= 2
        start = torch.randn(len(root), generator=torch.Generator().manual_seed(0)).to(root)
    basis, diagonal, beside = [start / start.norm()], [], []
    for _ in range(iterations):
        product = torch.autograd.grad(gradients, weights, root * basis[-1], retain_graph=True)
        w = root * torch.cat([part.flatten() for part in product])
        diagonal.append(w @ basis[-1])
        span = torch.stack(basis)
        for _ in range(2):  # against all earlier ones, twice: rounding would bring them back
            w = w - span.T @ (span @ w)
        beside.append(w.norm())
        if not beside[-1] > 1e-6 * diagonal[0].abs():
            break
        basis.append(w / beside[-1])
    diagonal, beside = torch.stack(diagonal).double().cpu(), torch.stack(beside[:len(diagonal) - 1] or [w.norm()])
    n = len(diagonal)
    if not bool(torch.isfinite(diagonal).all()):
        return math.inf, torch.ones_like(root)
    values, vectors = scipy.linalg.eigh_tridiagonal(diagonal.numpy(), beside.double().cpu().numpy()[:n - 1])
    ritz = torch.as_tensor(vectors[:, -1]).to(root) @ torch.stack(basis[:n])
    return float(values[-1]), ritz


def adam_preconditioner(optimizer: torch.optim.Optimizer, weights: list[Tensor]) -> list[Tensor]:
    """P of AdamW after its latest step t: (1 - beta1^t) (sqrt(v / (1 - beta2^t)) + eps), as its step is lr P^-1 m."""
    group_of = {id(weight): group for group in optimizer.param_groups for weight in group["params"]}
    found = []
    for weight in weights:
        group, state = group_of[id(weight)], optimizer.state[weight]
        (beta1, beta2), t = group["betas"], float(state["step"])
        found.append((1 - beta1**t) * ((state["exp_avg_sq"] / (1 - beta2**t)).sqrt() + group["eps"]))
    return found


def fetch(readings: Readings) -> dict[str, float]:
    """The readings as floats, in one transfer from the device."""
    values = torch.stack([value.float() for value in readings.values()]).tolist() if readings else []
    return dict(zip(readings, values, strict=True))


def compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` or `Module.compile` has been at the model or a part of it."""
    return any(part._compiled_call_impl or hasattr(part, "_orig_mod") for part in model.modules())


def _eager(model: nn.Module):
    return torch.compiler.set_stance("force_eager") if compiled(model) else contextlib.nullcontext()


def _require(found: Readings | list) -> None:
    if not found:
        raise RuntimeError("no forward pass was seen: run the model inside the with; of one that was compiled, watch "
                           "what torch.compile returned")


def _read_attention(readings: Readings, block: str):
    @torch.no_grad()
    def hook(core, inputs, output):
        q, k = inputs[0].detach().float(), inputs[1].detach().float()
        with full_precision(q.device.type):
            z_BxHxTxT = core.logits(q, k)
        visible_TxT = core.visible(z_BxHxTxT)
        q_norm, k_norm = q.norm(dim=-1), k.norm(dim=-1)
        largest_BxHxT, key_BxHxT = largest_logits(z_BxHxTxT, ~visible_TxT)
        largest, query = largest_BxHxT.flatten().max(0)
        # <q_i, k_j> at the largest logit over the product of the two norms; clamp: a zero query has no direction
        norms = (q_norm * k_norm.gather(-1, key_BxHxT)).flatten().index_select(0, query.view(1))[0]
        readings[f"attention_logit_max/{block}"] = largest
        readings[f"qk_cosine_at_max/{block}"] = largest / (core.scale * norms).clamp_min(1e-30)
        readings[f"q_rms/{block}"] = rms(q)
        readings[f"k_rms/{block}"] = rms(k)
        # the mean over visible pairs of <q_i/|q_i|, k_j/|k_j|> needs only (running) sums of unit keys
        q_unit, k_unit = (x / n.clamp_min(1e-30).unsqueeze(-1) for x, n in ((q, q_norm), (k, k_norm)))
        k_sums = k_unit.cumsum(-2) if core.causal else k_unit.sum(-2, keepdim=True)
        sums = (q_unit * k_sums).sum((-1, -2)).mean()
        readings[f"qk_cosine/{block}"] = sums / visible_TxT.sum()
        if not core.pointwise:
            readings[f"attention_entropy/{block}"] = entropy(core.weights(z_BxHxTxT)).mean()
    return hook


def largest_logits(z_BxHxTxS: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Of each query the largest logit that is not hidden, and its key, both [B, H, T]."""
    return z_BxHxTxS.masked_fill(hidden, -math.inf).max(-1)


def entropy(p_BxHxTxS: Tensor) -> Tensor:
    """Of each query's attention weights, in nats, [B, H, T]."""
    return torch.special.entr(p_BxHxTxS).sum(-1)


def full_precision(device_type: str):
    """Autocast off: inside the forward pass of a bf16 run it would round the product of fp32 tensors to bf16."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else contextlib.nullcontext()


def _read_output(readings: Readings, block: str):
    @torch.no_grad()
    def hook(module, inputs, output):
        readings[f"output_rms/{block}"] = rms(output.detach().float())
        readings[f"output_kurtosis/{block}"] = kurtosis(output.detach().float())
    return hook


def _read_router(readings: Readings, block: str):
    @torch.no_grad()
    def hook(router, inputs, output):
        p_NxE, _, chosen_NxK = output
        load_E = router.shares(chosen_NxK)
        readings[f"router_entropy/{block}"] = torch.special.entr(p_NxE).sum(-1).mean()
        readings[f"expert_load_max/{block}"] = load_E.max()
        readings[f"experts_used/{block}"] = (load_E > 0).float().mean()
    return hook


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def kurtosis(x: Tensor) -> Tensor:
    """The fourth standardised moment of all numbers in x, 3 of a Gaussian."""
    centred = x - x.mean()
    return (centred / rms(centred).clamp_min(1e-30)).pow(4).mean()


def _read_head(readings: Readings):
    @torch.no_grad()
    def hook(module, inputs, output):
        readings.update(of_logits(output.detach()))
    return hook


def of_logits(logits_BxTxV: Tensor) -> Readings:
    """`logit_mean` over tokens and vocabulary and `log_z`, the mean over tokens, of output logits."""
    logits_BxTxV = logits_BxTxV.float()
    return {"logit_mean": logits_BxTxV.mean(), "log_z": logits_BxTxV.logsumexp(-1).mean()}


@functools.cache
def import_dynamo() -> None:
    """torch imports `torch._dynamo` with the first optimizer or disabled function, for a second or two; cut short by
    Ctrl-C it can never be imported again in that process. In another thread Ctrl-C does not reach it."""
    thread = threading.Thread(target=importlib.import_module, args=["torch._dynamo"])
    thread.start()
    thread.join()


class _WeakHook:
    """Of a saved model nothing is left of it, and a copied model has it as it is."""

    def __init__(self, method: Callable, reason: str | None):
        self._found = weakref.WeakMethod(method)
        self._run = torch.compiler.disable(self._call, reason=reason)

    def __call__(self, *given):
        return self._run(*given)

    def _call(self, *given):
        alive = self._found()
        return alive(*given) if alive else None

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return _no_hook, ()


def _no_hook() -> Callable:
    return _nothing


def _nothing(*_) -> None:
    pass


def weak_hook(method: Callable, reason: str | None = None) -> Callable:
    """A hook that does not keep the method's object alive, and that `torch.compile` runs as it is; a whole graph
    refuses it with this reason."""
    return _WeakHook(method, reason)


def unhook(hooks: list) -> None:
    """Take hooks off their modules and out of the list."""
    while hooks:
        hooks.pop().remove()


def apart(value, made: dict | None = None):
    """A copy that no later change to lists, dicts and objects (a key-value cache) reaches; tensors and modules are
    shared. `made` keeps the copies by the id of what was copied."""
    made = {} if made is None else made
    if id(value) in made:
        return made[id(value)]
    if type(value) in (list, tuple):
        return type(value)(apart(held, made) for held in value)
    plain = not isinstance(value, dict) and not hasattr(value, "__dict__")
    twin = value if plain or isinstance(value, (Tensor, nn.Module, type)) else copy.copy(value)
    if twin is not value:
        made[id(value)] = twin
        for inside in (twin, getattr(twin, "__dict__", {})):
            if isinstance(inside, dict):
                inside.update({name: apart(held, made) for name, held in inside.items()})
    return twin


def rms_of(quantity: str, tensors: dict[str, Tensor]) -> Readings:
    """`<quantity>/<name>` of each tensor; in half precision the sum of squares would overflow."""
    half = (torch.float16, torch.bfloat16)
    return {f"{quantity}/{name}": torch.linalg.vector_norm(
        tensor, dtype=torch.float32 if tensor.dtype in half else None) / math.sqrt(tensor.numel())
        for name, tensor in tensors.items()}
