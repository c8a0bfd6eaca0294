"""Spectral shaping within the Trainer of Hugging Face: its weight, its steps, interruptions, resumption, its log."""

import copy
import dataclasses
import os

import pytest
import torch
from test_kss import hooks_on, tiny_gpt2
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from stability_lib.shaping import KSS, Settings, trainer_callback


class Scored(nn.Module):
    """A model that takes no number of items: the Trainer divides its loss by the number of micro-batches."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_gpt2()

    def forward(self, input_ids, labels=None):
        return CausalLMOutput(loss=self.inner(input_ids=input_ids, labels=labels).loss)


def rows(n: int = 8) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(40, (n, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def trained(tmp_path, model: nn.Module, settings: Settings | None, batch_size: int = 4, micro_batches: int = 2,
            data: list | None = None, others: tuple = (), resume: str | None = None,
            **changes) -> tuple[list[dict], list, Trainer]:
    """Four steps of the Trainer on all rows each: its log of them, the callbacks and itself."""
    callbacks = [*([trainer_callback(settings)] if settings else []), *others]
    arguments = TrainingArguments(
        str(tmp_path), **{"max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1, "report_to": [], "use_cpu": True,
                          "save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": batch_size,
                          "gradient_accumulation_steps": micro_batches} | changes)
    trainer = Trainer(model=model, args=arguments, train_dataset=data or rows(), eval_dataset=rows(),
                      callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return [entry for entry in trainer.state.log_history if "loss" in entry], callbacks, trainer


STEADY = Settings(penalty="residual_norm", alpha=0.5, every=1, layer_share=1.0)
"""A mean over token states: over a batch the same as the mean over its micro-batches."""


@pytest.mark.parametrize("build", [tiny_gpt2, Scored])
def test_the_trainer_adds_the_penalty_to_the_loss_however_a_batch_is_split(tmp_path, build):
    plain = trained(tmp_path, build(), None)[0]
    whole = trained(tmp_path, build(), STEADY, batch_size=8, micro_batches=1)[0]
    split, (callback,), _ = trained(tmp_path, build(), STEADY)
    for name in ("loss", "grad_norm"):
        assert [entry[name] for entry in split] == pytest.approx([entry[name] for entry in whole], rel=1e-3)
    model, batch = build(), torch.stack([row["input_ids"] for row in rows()])
    with KSS(model, STEADY) as kss:
        model(input_ids=batch, labels=batch)
        penalty = float(kss.penalty().detach())
    assert split[0]["loss"] - plain[0]["loss"] == pytest.approx(penalty, rel=1e-3)
    assert callback.kss.steps == 4 and callback.kss.applied == 4 * 2 * 4


def test_the_trainers_steps_are_counted_and_weight_zero_changes_nothing(tmp_path):
    plain, _, _ = trained(tmp_path, tiny_gpt2(), None)
    off, (callback,), _ = trained(tmp_path, tiny_gpt2(), Settings(alpha=0.0, every=1))
    assert [entry["loss"] for entry in off] == [entry["loss"] for entry in plain]
    assert callback.kss.steps == 4 and callback.kss.applied == 0
    _, (callback,), _ = trained(tmp_path, tiny_gpt2(), Settings(every=3))
    assert callback.kss.applied == 2 * 2 * 2  # steps 0 and 3, two micro-batches, two of four layers


def test_the_trainer_evaluates_without_the_penalty_and_is_left_without_hooks(tmp_path):
    model = tiny_gpt2()
    settings = dataclasses.replace(STEADY, alpha=100.0)
    _, _, trainer = trained(tmp_path, model, settings, eval_strategy="steps", eval_steps=1)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 4 and evaluations[-1] == trainer.evaluate()["eval_loss"]


def test_a_loss_that_the_model_does_not_compute_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the model's output has no loss to add the penalty to: pass labels"):
        trained(tmp_path, tiny_gpt2(), Settings(), label_smoothing_factor=0.1)


# the weight of the penalty

def penalty_of(model: nn.Module, settings: Settings, **batch) -> float:
    twin = copy.deepcopy(model).train()
    with KSS(twin, settings) as kss:
        twin(**batch)
        return float(kss.penalty().detach())


class Stream(torch.utils.data.IterableDataset):
    """Rows whose number nobody knows beforehand."""

    def __iter__(self):
        yield from rows(8)


@pytest.mark.parametrize("build", [tiny_gpt2, Scored])
def test_the_last_micro_batches_of_an_epoch_weigh_as_much_as_the_others(tmp_path, build):
    """Five micro-batches of one row: a step of four and a step of one, twice."""
    data = [rows(1)[0]] * 5
    batch = {name: value[None] for name, value in data[0].items()}
    settings, changes = dataclasses.replace(STEADY, alpha=300.0), dict(learning_rate=0.0, data=data)
    plain = trained(tmp_path, build(), None, 1, 4, **changes)[0]
    shaped = trained(tmp_path, build(), settings, 1, 4, **changes)[0]
    penalty = penalty_of(build(), settings, **batch)
    assert [ours["loss"] - theirs["loss"] for ours, theirs in zip(shaped, plain, strict=True)] == pytest.approx(
        [penalty] * 4, rel=1e-3)


def test_an_epoch_of_unknown_length_has_whole_steps(tmp_path):
    shaped = trained(tmp_path, tiny_gpt2(), STEADY, 1, 4, data=Stream(), max_steps=2)[0]
    assert len(shaped) == 2 and all(entry["penalty"] > 0 for entry in shaped)


def test_the_log_shows_the_task_loss_and_the_penalty_apart(tmp_path, capsys):
    plain = trained(tmp_path, tiny_gpt2(), None, learning_rate=0.0, logging_steps=2)[0]
    capsys.readouterr()
    settings = dataclasses.replace(STEADY, every=4, alpha=100.0)
    shaped = trained(tmp_path, tiny_gpt2(), settings, learning_rate=0.0, logging_steps=2)[0]
    assert [entry["task_loss"] for entry in shaped] == pytest.approx([entry["loss"] for entry in plain], rel=1e-4)
    batch = torch.stack([row["input_ids"] for row in rows()])
    # of steps 0 and 1 it acts in one, of steps 2 and 3 in none
    assert [entry["penalty"] for entry in shaped] == pytest.approx(
        [penalty_of(tiny_gpt2(), settings, input_ids=batch) / 2, 0], rel=1e-3)
    assert all(entry["loss"] == pytest.approx(entry["task_loss"] + entry["penalty"]) for entry in shaped)
    assert capsys.readouterr().out.count("task_loss") == 2


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, **kwargs):
        return model(**inputs).logits.square().mean()


def test_a_trainer_that_minimises_another_loss_is_told_so(tmp_path):
    arguments = TrainingArguments(str(tmp_path), max_steps=3, report_to=[], use_cpu=True, save_strategy="no",
                                  disable_tqdm=True)
    trainer = OwnLoss(tiny_gpt2(), arguments, train_dataset=rows(), callbacks=[trainer_callback(STEADY)])
    with pytest.warns(UserWarning, match="the penalty had no effect: the loss that was minimised is not the") as told:
        trainer.train()
    assert len([warning for warning in told if "no effect" in str(warning.message)]) == 1
    assert hooks_on(trainer.model) == 0


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # of the compiler itself
@pytest.mark.parametrize("how", ["argument", "method"])
def test_a_compiled_model_is_refused_with_the_remedy(tmp_path, how):
    model = tiny_gpt2()
    if how == "method":
        model.compile(backend="eager")
    with pytest.raises(ValueError, match="no layers in a compiled model: train without torch_compile, or in a loop"):
        trained(tmp_path, model, STEADY, **({"torch_compile": True} if how == "argument" else {}))


# interruptions

class Cut(TrainerCallback):
    """Ctrl-C at an event of the third step."""

    def __init__(self, where: str):
        self.where = where

    def stop(self, state):
        if self.where and state.global_step == 2:
            self.where = ""
            raise KeyboardInterrupt

    def on_step_begin(self, args, state, control, model, **kwargs):
        if self.where == "begin":
            self.stop(state)
        if self.where in ("forward", "backward") and state.global_step == 2:
            part = model.transformer.h[2]
            register = part.register_forward_hook if self.where == "forward" else part.register_full_backward_hook

            def interrupt(*_):
                hook.remove()
                self.stop(state)

            hook = register(interrupt)

    def on_substep_end(self, args, state, control, **kwargs):
        if self.where == "substep":
            self.stop(state)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.where == "optimizer":
            self.stop(state)


@pytest.mark.parametrize("where", ["begin", "forward", "backward", "substep", "optimizer"])
def test_an_interrupted_training_leaves_no_penalty_behind(tmp_path, where):
    model, batch = tiny_gpt2(), torch.stack([row["input_ids"] for row in rows()])
    settings = dataclasses.replace(STEADY, alpha=300.0)
    arguments = TrainingArguments(str(tmp_path), max_steps=4, learning_rate=0.0, logging_steps=1, report_to=[],
                                  use_cpu=True, save_strategy="no", disable_tqdm=True, gradient_accumulation_steps=2,
                                  per_device_train_batch_size=4)
    make = lambda *callbacks: Trainer(model, arguments, train_dataset=rows(), callbacks=[*callbacks])  # noqa: E731
    task = float(model(input_ids=batch, labels=batch).loss.detach())
    plain = trained(tmp_path, tiny_gpt2(), None, learning_rate=0.0)[0][0]["loss"]
    whole = plain + penalty_of(model, settings, input_ids=batch)
    interrupted = make(trainer_callback(settings), Cut(where))
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    assert float(model.train()(input_ids=batch, labels=batch).loss.detach()) == pytest.approx(task)
    assert hooks_on(model) == 0
    for trainer in (make(trainer_callback(settings)), interrupted):  # a fresh callback, and the same once more
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses == pytest.approx([whole] * len(losses), rel=1e-3)
        assert hooks_on(model) == 0


def test_two_callbacks_of_one_training_both_count(tmp_path):
    batch = torch.stack([row["input_ids"] for row in rows()])
    one, two = dataclasses.replace(STEADY, alpha=300.0), dataclasses.replace(STEADY, alpha=50.0)
    model = tiny_gpt2()
    penalties = [penalty_of(model, settings, input_ids=batch) for settings in (one, two)]
    plain = trained(tmp_path, tiny_gpt2(), None, learning_rate=0.0)[0]
    both = trained(tmp_path, model, one, others=(trainer_callback(two),), learning_rate=0.0)[0]
    assert both[0]["loss"] - plain[0]["loss"] == pytest.approx(sum(penalties), rel=1e-3)


@pytest.mark.parametrize("at", [3, 5])
def test_a_resumed_training_goes_on_as_one_that_was_not_interrupted(tmp_path, at):
    """Also in the middle of an epoch, whose last step has one micro-batch of three rows."""
    settings = Settings(penalty="residual_norm", alpha=300.0, every=4, snapshots=20)
    changes = dict(max_steps=10, save_strategy="steps", save_steps=1, data=rows(15))
    unbroken = trained(tmp_path, tiny_gpt2(), settings, 3, 2, **changes)[0]
    assert [i for i, entry in enumerate(unbroken) if entry["penalty"]] == [0, 4, 8]
    resumed = trained(tmp_path, tiny_gpt2(), settings, 3, 2, resume=os.path.join(tmp_path, f"checkpoint-{at}"),
                      **changes)[0]
    for name in ("loss", "penalty", "grad_norm"):
        assert [entry[name] for entry in resumed[at:]] == pytest.approx([entry[name] for entry in unbroken[at:]])
