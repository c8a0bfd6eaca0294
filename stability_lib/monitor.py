"""A monitor for the training loop of anybody's PyTorch model, and its alarms.

    monitor = StabilityMonitor(model, every=50, log=wandb.log)
    for batch in batches:
        loss = loss_of(model(batch))
        loss.backward()
        monitor.step(loss)      # before optimizer.step()
        optimizer.step()

The trajectory stays what it is, bit for bit. `trainer_callback` and `lightning_callback` do the same in their loops.

Readings are named `<quantity>/<layer>`, of attention logits also `<quantity>/<layer>/head<i>`:
- from the forward pass, as `probes.watch` defines them: `attention_logit_max`, `attention_entropy`, `logit_mean`,
  `log_z`, `output_rms`; `output_kurtosis`, the fourth standardised moment of a layer's output (3 of a Gaussian);
  `router_load_max` and `router_load_min`, the load of the most and the least used expert over an even share;
- of each weight matrix: `parameter_rms`, `gradient_rms` (as the optimizer gets it), `update_rms`,
  `update_over_parameter`, and `gradient_over_eps`, in units of the optimizer's eps;
- at every step: `loss` and `gradient_norm`.
"""

import collections
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import probes
from .alarms import ALARMS, Alarm, Raised, StabilityStop, Watch
from .attention import CHUNK, Reader, module_names
from .config import unknown
from .stream import stacks, stream_states, unwrapped

_COMPILED_LATER = ("the model was compiled after its monitor was made, or inside of something compiled: make the "
                   "monitor of what torch.compile returned, or after model.compile()")
_REPLICA = ("a monitor sees nothing in the threads of DataParallel: train with DistributedDataParallel, one monitor a "
            "process, or on one device")


class StabilityMonitor:
    """Reads `model` at every `every`-th step and raises `alarms`; see the module for what it reads.

    Args:
        model: as it is called in the loop; one that is compiled, after that. A compiled model takes one more forward
            pass at a step that is read, in eager mode, and then runs as it would have.
        log: a function of the readings, a dict of floats, and the step, called once they are complete.
        logits: takes the output logits [..., V] from the model's output; None: its `logits`, or the tensor (of several
            the first) that it is, where it has none of these names.
        heads: log the logits of each head, not only the largest of each layer.

    `step` counts from 0; `steps` may be set where training is resumed. Weights are copied at a step that is read, for
    their update. A context manager; `close` takes all hooks off. Raises `ValueError` under `DataParallel`.
    """

    def __init__(self, model: nn.Module, *, every: int = 50, log: Callable[[dict, int], object] | None = None,
                 alarms: Sequence[Alarm] = ALARMS, logits: Callable | None = None, heads: bool = True):
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise ValueError(_REPLICA)
        if every < 1:
            raise ValueError(f"every must be 1 or more steps, got {every}")
        self.every, self.log, self.heads, self.steps, self._watch = every, log, heads, 0, Watch(alarms)
        self.head_maxima: dict[str, Tensor] = {}
        """Of the last step, if it was read, the largest attention logit of each head [H] by layer."""
        self._model, self._inner, self._logits_of = model, unwrapped(model), logits
        self._rows: list[tuple[int, tuple[str, ...], np.ndarray]] = []
        self._told, self._hooks, self._part_hooks = set(), [], []
        self._reader: Reader | None = None
        self._reading = self._closed = False
        self._pending: tuple | None = None
        self._on_late_stop: Callable[[StabilityStop], None] | None = None
        self._clear()
        self._attach()
        weakref.finalize(self, probes.unhook, self._hooks)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Finish the last row and take all hooks off."""
        self._finish_late(stepping=False)
        self._end_reading()
        probes.unhook(self._hooks)
        self._closed = True

    def step(self, loss: Tensor | float | None = None) -> dict[str, float]:
        """Read what the step did so far; call it between `backward` and `optimizer.step()`.

        `loss` is only reported, and watched; None: the `loss` in the model's output. With a `GradScaler`, call its
        `unscale_` first. Returns the readings, to which the optimizer's step adds. Raises `StabilityStop` where an
        alarm says so.
        """
        if self._closed:
            raise RuntimeError("the monitor is closed: make a new one")
        self._finish()
        self._end_reading()
        self.head_maxima = {}
        found = self._all_steps(loss)
        if due := self.due:
            found |= self._read_step()
        device = next((value.device for value in found.values()), None)
        row = probes.fetch({name: value.detach().to(device) for name, value in found.items()})
        step, self.steps = self.steps, self.steps + 1
        self._clear()
        if not due:
            self._keep(step, row)
            self._watch.judge(row, step)
            return row
        before = {name: weight.detach().clone() for name, weight in self._matrices() if weight.grad is not None}
        self._pending = (step, row, before, {})
        try:
            self._watch.judge(row, step)
        except BaseException:
            self._pending = (step, row, {}, {})
            self._finish()
            raise
        return row

    @property
    def due(self) -> bool:
        """Whether the step that comes next, or is under way, will be read."""
        return self.steps % self.every == 0

    @property
    def raised(self) -> list[Raised]:
        """The alarms that went off."""
        return self._watch.raised

    def table(self) -> pd.DataFrame:
        """All readings, one a row: step, quantity, layer, head (-1: all of the layer), value."""
        steps = np.repeat([step for step, _, _ in self._rows], [len(names) for _, names, _ in self._rows])
        names = pd.Series([name for _, names, _ in self._rows for name in names], dtype=str)
        parts = names.str.extract(r"^([^/]+)/?(.*?)(?:/head(\d+))?$")
        values = np.concatenate([np.empty(0), *(values for _, _, values in self._rows)])
        return pd.DataFrame({"step": steps.astype(int), "quantity": parts[0], "layer": parts[1],
                             "head": parts[2].fillna("-1").astype(int), "value": values})

    def plot(self, *quantities: str):
        """A figure of `quantities` by layer over steps; none named: of all, loss and gradient norm among them."""
        table = self.table()
        for quantity in quantities:
            if quantity not in (known := table["quantity"].unique()):
                raise ValueError(unknown("quantity", quantity, known))
        return draw(table[table["quantity"].isin(quantities)] if quantities else table, self.raised)

    # forward passes

    def _attach(self) -> None:
        self._whole = self._model._compiled_call_impl is not None
        if self._whole:  # hooks on it would be compiled, so the call as a whole is taken instead
            self._hooks.append(_Around(self._model, weakref.WeakMethod(self._enter), weakref.WeakMethod(self._leave)))
        else:
            self._hooks += [
                self._model.register_forward_pre_hook(probes.weak_hook(self._enter, _COMPILED_LATER), with_kwargs=True),
                self._model.register_forward_hook(probes.weak_hook(self._leave, _COMPILED_LATER), with_kwargs=True,
                                                  always_call=True)]
        self._hooks.append(register_optimizer_step_post_hook(probes.weak_hook(self._stepped)))

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if getattr(module, "_is_replica", False):
            raise ValueError(_REPLICA)
        if module is not self._model or self._reading or not torch.is_grad_enabled():
            return
        frames = _frames()
        if not self._whole and not hasattr(self._model, "_orig_mod") and any(
                f.f_code.co_filename.endswith("_dynamo/eval_frame.py") and f.f_code.co_name == "compile_wrapper"
                for f in frames):
            raise ValueError(_COMPILED_LATER)
        self._end_reading(keep=False)
        self._passes += 1
        if not self.due:
            return
        if probes.compiled(self._model):
            self._read_apart(args, kwargs)
        else:
            self._begin_reading(next(f for f in frames if f.f_code.co_name == "_call_impl"))
            self._reader.__enter__()

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        if module is not self._model or self._reading or not torch.is_grad_enabled():
            return
        reader = self._reader
        self._end_reading(keep=output is not None)  # none where the forward pass raised
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses.append(loss.detach())
            self._summed = kwargs.get("num_items_in_batch") is not None
        if reader is not None and output is not None:
            self._read_output(output)

    def _begin_reading(self, frame) -> None:
        names = module_names(self._inner)
        self._reader = Reader(names, frame)
        for stack in stacks(self._inner).values():
            self._part_hooks += [layer.register_forward_hook(self._activations(names[id(layer)])) for layer in stack]

    def _end_reading(self, keep: bool = True) -> None:
        probes.unhook(self._part_hooks)
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.frame = None
            if torch.overrides._get_current_function_mode() is reader:
                reader.__exit__(None, None, None)
            self._failed += reader.failed
            for key, values in reader.found.items() if keep else ():
                self._found[key] += values

    @torch.no_grad()
    def _read_apart(self, args: tuple, kwargs: dict) -> None:
        """One more forward pass, of the same random numbers, that leaves random state and buffers as they were."""
        model = getattr(self._model, "_orig_mod", self._model)
        buffers = [(part, name, buffer, buffer.clone()) for part in model.modules()
                   for name, buffer in part._buffers.items() if buffer is not None]
        devices = {p.device for p in model.parameters()} - {torch.device("cpu")}
        kind = next((device.type for device in devices), "cuda")
        args, kwargs = probes.apart((args, kwargs))
        self._reading = True
        try:
            with (torch.random.fork_rng(devices=list(devices), device_type=kind),
                  torch.compiler.set_stance("force_eager")):
                self._begin_reading(sys._getframe())
                with self._reader:
                    output = model._call_impl(*args, **kwargs)
                self._read_output(output)
        except Exception as error:
            raise RuntimeError("the monitor reads a compiled model in a forward pass in eager mode, and that failed: "
                               f"{type(error).__name__}: {error}") from error
        finally:
            self._reading = False
            self._end_reading()
            torch.clear_autocast_cache()  # weights cast without gradients
            for part, name, buffer, before in buffers:
                part._buffers[name] = buffer
                if not torch.equal(buffer, before):
                    buffer.copy_(before)

    def _activations(self, layer: str) -> Callable:
        @torch.no_grad()
        def hook(module, inputs, output):
            states = stream_states(output)
            if states is not None:
                states = states.detach().float()
                self._found[f"output_rms/{layer}"].append(probes.rms(states))
                self._found[f"output_kurtosis/{layer}"].append(probes.kurtosis(states))
        return hook

    @torch.no_grad()
    def _read_output(self, output) -> None:
        logits = (self._logits_of or _logits)(output)
        if logits is None or logits.ndim < 2:
            return
        logits = logits.detach().flatten(0, -2)
        parts = logits.split(max(1, CHUNK // logits.shape[-1]))
        found = [probes.of_logits(part) for part in parts]
        weights = torch.tensor([len(part) / len(logits) for part in parts], device=logits.device)
        for name in found[0]:
            self._found[name].append((torch.stack([part[name] for part in found]) * weights).sum())

    # weights, and the rows of readings

    def _matrices(self):
        return ((name.replace("_orig_mod.", "").removesuffix(".weight"), weight)
                for name, weight in self._inner.named_parameters() if weight.ndim > 1)

    @torch.no_grad()
    def _all_steps(self, loss: Tensor | float | None) -> probes.Readings:
        gradients = [weight.grad for weight in self._inner.parameters() if weight.grad is not None]
        if not gradients:
            raise RuntimeError("no weight has a gradient: call step() after backward() and before zero_grad()")
        dense = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
        found = {"gradient_norm": nn.utils.get_total_norm(dense)}
        if loss is None and self._losses:
            losses = torch.stack(self._losses).float()
            loss = losses.sum() if self._summed else losses.mean()
        if loss is not None:
            found["loss"] = torch.as_tensor(loss).float().mean()
        return found

    @torch.no_grad()
    def _read_step(self) -> probes.Readings:
        self._tell_gaps()
        found = {}
        for name, values in self._found.items():
            if name.startswith("attention_logit_max/"):
                heads = torch.stack(values).amax(0)
                self.head_maxima[name.partition("/")[2]] = heads
                found[name] = heads.amax()
                if self.heads:
                    found |= {f"{name}/head{i}": value for i, value in enumerate(heads)}
            else:
                found[name] = torch.stack(values).mean()
        weights = dict(self._matrices())
        gradients = {name: weight.grad.coalesce().values() if weight.grad.is_sparse else weight.grad
                     for name, weight in weights.items() if weight.grad is not None}
        return (found | probes.rms_of("parameter_rms", {name: weight.detach() for name, weight in weights.items()})
                | probes.rms_of("gradient_rms", {name: g for name, g in gradients.items() if g.numel()}))

    def _tell_gaps(self) -> None:
        for text in self._failed:
            self._tell(text)
        kind, seen = type(self._inner).__name__, {name.partition("/")[0] for name in self._found}
        if not self._passes:
            self._tell(f"no forward pass of {kind} was seen before this step: give the monitor the module that the "
                       "loop calls. Its activations and logits are left out")
            return
        if "attention_logit_max" not in seen:
            self._tell(f"no attention was seen in {kind}: if it has some, let it call scaled_dot_product_attention or "
                       "a softmax (attn_implementation='sdpa' or 'eager'), not a kernel of its own. Attention logits "
                       "are left out")
        if "output_rms" not in seen:
            self._tell(f"{kind} has no stack of layers (ModuleList) that ran: activations are left out")
        if "log_z" not in seen:
            self._tell(f"no output logits were found in what {kind} returns: pass logits=, a function of its output. "
                       "log_z and logit_mean are left out")

    @torch.no_grad()
    def _stepped(self, optimizer, *_) -> None:
        if self._pending is None:
            return
        _, row, before, updates = self._pending
        if not before:
            return
        eps = {id(weight): group.get("eps") for group in optimizer.param_groups for weight in group["params"]}
        owned = {name: weight for name, weight in self._matrices() if name in before and id(weight) in eps}
        moved = {name: weight.detach() - before.pop(name) for name, weight in owned.items()}
        found = probes.rms_of("update_rms", moved)
        device = next((value.device for value in found.values()), None)
        updates |= probes.fetch({name: value.to(device) for name, value in found.items()})
        for name, weight in owned.items():
            parameter = row[f"parameter_rms/{name}"]
            if parameter:
                updates[f"update_over_parameter/{name}"] = updates[f"update_rms/{name}"] / parameter
            if eps[id(weight)] and f"gradient_rms/{name}" in row:
                updates[f"gradient_over_eps/{name}"] = row[f"gradient_rms/{name}"] / eps[id(weight)]
        if not before:
            self._finish_late()

    def _finish_late(self, stepping: bool = True) -> None:
        """`_finish` where an exception would leave the optimizer's step, or the end of training."""
        try:
            self._finish(stepping)
        except StabilityStop as stop:
            if self._on_late_stop is None:
                raise
            self._on_late_stop(stop)

    def _finish(self, stepping: bool = True) -> None:
        """Keep and log the pending row; where the loop goes on it should have its updates."""
        if self._pending is None:
            return
        (step, row, before, updates), self._pending = self._pending, None
        row |= updates
        self._keep(step, row)
        if self.log is not None:
            try:
                self.log(dict(row), step)
            except Exception as error:
                self._tell(f"log raised {type(error).__name__}: {error}. Training goes on, and table() has the "
                           "readings")
        if before and stepping:
            self._tell(f"no step of a torch optimizer on {next(iter(before))} followed step(): its update is left out")
        self._watch.judge(updates, step)

    def _keep(self, step: int, row: dict[str, float]) -> None:
        names = tuple(row)
        same = next((kept for _, kept, _ in reversed(self._rows[-2 * self.every:]) if kept == names), names)
        self._rows.append((step, same, np.fromiter(row.values(), float, len(row))))

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            warnings.warn(text, stacklevel=4)

    def _clear(self) -> None:
        self._found: dict[str, list[Tensor]] = collections.defaultdict(list)
        self._losses: list[Tensor] = []
        self._failed: list[str] = []
        self._summed, self._passes = False, 0


class _Around:
    """Calls `enter` before and `leave` after a module that `Module.compile` was at; takes itself off like a hook."""

    def __init__(self, model: nn.Module, enter: weakref.WeakMethod, leave: weakref.WeakMethod):
        self.model, self.impl = model, model._compiled_call_impl

        def call(*args, **kwargs):
            if before := enter():
                before(model, args, kwargs)
            output = self.impl(*args, **kwargs)
            if after := leave():
                after(model, args, kwargs, output)
            return output

        self.call = model._compiled_call_impl = call

    def remove(self) -> None:
        if self.model._compiled_call_impl is self.call:
            self.model._compiled_call_impl = self.impl
        self.call = self.impl


def _frames() -> list:
    frame, found = sys._getframe(1), []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def _logits(output) -> Tensor | None:
    """The output logits [..., V] in what a model returns."""
    if isinstance(output, Mapping):
        return output.get("logits")
    named = getattr(output, "logits", None)
    return stream_states(output) if named is None and isinstance(output, (Tensor, tuple, list)) else named


def draw(table: pd.DataFrame, raised: Sequence[Raised] = ()):
    """A panel a quantity over steps, a line a layer (of many the lowest, median and highest); dotted, the steps of
    alarms and their thresholds."""
    import matplotlib.pyplot as plt

    whole = table[table["head"] < 0]
    quantities = [*whole["quantity"].unique()]
    columns = min(3, max(1, len(quantities)))
    rows = max(1, math.ceil(len(quantities) / columns))
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 2.6 * rows), squeeze=False,
                                layout="constrained")
    for ax, quantity in zip(axes.flat, quantities, strict=False):
        lines = whole[whole["quantity"] == quantity].pivot_table(index="step", columns="layer", values="value")
        if lines.shape[1] > 8:
            lines = lines.quantile([0, 0.5, 1], axis=1).T.set_axis(["lowest", "median", "highest"], axis=1)
        for layer, values in lines.items():
            ax.plot(values.index, values, label=layer, marker="." if len(values) < 3 else "")
        if quantity not in ("loss", "logit_mean", "log_z", "attention_entropy") and (lines > 0).any().any():
            ax.set_yscale("log")
        for alarm in (r for r in raised if r.reading.partition("/")[0] == quantity):
            ax.axvline(alarm.step, color="0.5", linestyle=":")
            for limit in filter(math.isfinite, (alarm.alarm.above, alarm.alarm.below)):
                ax.axhline(limit, color="0.5", linestyle=":")
        ax.set(title=quantity, xlabel="step")
        if lines.shape[1] > 1:
            ax.legend(fontsize="x-small")
    for ax in axes.flat[len(quantities):]:
        ax.remove()
    plt.close(figure)  # a notebook shows what a cell returns, and would show an open figure once more
    return figure


def trainer_callback(**settings):
    """A callback of Hugging Face's `Trainer` with a monitor of these settings, as `monitor` while and after it trains.

    "stop" leaves the weights as they were before the step and ends training; for what is known only after it (see
    `Alarm`) it ends training then. With gradients accumulated the loss is
    that of all micro-batches; gradients are read after clipping.
    """
    from .callbacks import MonitorCallback  # transformers takes seconds to import, and only its users have it

    return MonitorCallback(**settings)


def lightning_callback(module: Callable[[nn.Module], nn.Module] | None = None, **settings):
    """The same for Lightning's `Trainer`, with gradients as they are before clipping.

    `module` takes the module whose forward pass is read from the LightningModule; None: itself if it has a `forward`,
    else its only child with weights.
    """
    from .callbacks import lightning_monitor

    return lightning_monitor(module, settings)
