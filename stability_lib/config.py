"""One training run as data: `RunConfig`, grids of configs, canonical JSON and the run key.

A field of `RunConfig` is what can determine the result of a run, and therefore enters its key. What cannot
(device, host, labels) is recorded beside the result by `runs` and never hashed.
"""

import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
import math
import numbers
import types
import typing
from collections.abc import Iterable, Mapping

SCHEMA = 1
"""Raise it when the same config starts to mean another computation; old keys then no longer match."""

TEXTS = ("shakespeare", "wikitext103", "openwebtext", "c4")
MADE_UP = ("recall", "synthetic_lm")


@dataclasses.dataclass(frozen=True)
class Images:
    """Square images of ten classes: their side, and per channel what to subtract from a value and to divide it by."""

    side: int
    centre: tuple[float, ...]
    spread: tuple[float, ...]

    @property
    def channels(self) -> int:
        return len(self.centre)


IMAGES = {"digits": Images(8, (0.0,), (16.0,)), "mnist": Images(28, (33.3,), (78.6,)),
          "cifar10": Images(32, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7))}
"""`digits` are brought to [0, 1], the others to mean 0 and standard deviation 1 over their full training sets."""
CLASSES = 10
SYNTHETIC_IDS, SYNTHETIC_RUN = 10, (5, 15)
"""The synthetic language (paper K, App. D.2) uses no id below the first; the shortest and the longest run of ids."""
SOURCES = (*TEXTS, *MADE_UP, *IMAGES)
"""The values of `data` that are names; any other is the path of a user's own text."""

SIGNALS = ("loss_spike", "gradient_norm", "gradient_cusum", "attention_logit_max", "logit_growth", "attention_collapse",
           "output_kurtosis", "kurtosis_jump", "update_rms", "log_z")
"""What an alarm can be on, see `signals.derive`."""

CHOICES = {
    "norm": ("pre_ln", "rmsnorm", "post_ln", "deepnorm", "deepnorm_pre", "subln", "no_norm"),
    "positions": ("rotary", "learned"),
    "init": ("fan_in", "gpt2", "pytorch", "xavier"),
    "qk_norm": ("none", "head", "model", "head_fixed"),
    "mixer": ("attention", "mamba"),
    "mlp": ("gelu", "moe", "kan"),
    "attention": ("softmax", "squared_relu"),
    "attention_scale": ("parametrization", "1/sqrt(d_h)", "1/d_h"),
    "parametrization": ("standard", "mup_simple", "mup_intermediate", "mup_full"),
    "optimizer": ("adamw", "lion", "lamb", "muon"),
    "qk_lr": ("own", "other_norm"),
    "decay": ("independent", "pytorch", "scaled"),
    "tokenizer": ("bytes", "bpe"),
    "pooling": ("mean", "class_token"),
    "precision": ("fp32", "bf16"),
    "residual": ("plain", "scaled", "rezero"),
    "reparametrization": ("none", "spectral_norm", "weight_norm", "sigma_reparam"),
    "shaping": ("none", "kss", "unstable", "near_unit", "random_l2", "residual_norm", "activation_variance",
                "jacobian"),
    "shaping_dmd": ("pod", "random", "whitened", "pod_moving"),
    "shaping_gradient": ("both", "input", "output"),
    "shaping_reduction": ("sum", "mean"),
    "alarm": ("none", "step", *SIGNALS),
    "on_alarm": ("halve_lr", "qk_clip", "roll_back"),
}
_MAY_BE_ZERO = {"seed", "warmup_steps", "weight_decay", "z_loss", "lr_final", "n_layers",
                "probe_every", "attention_maps", "beta1", "beta2", "spectra_every", "gradient_penalty", "sam_rho",
                "shaping_alpha", "shaping_beta", "load_balance", "signals_every", "sharpness_every", "alarm_above"}
_AT_MOST = {"d_model": 2**20, "base_width": 2**20, "n_layers": 10_000, "steps": 10**8, "lr": 1e30,
            "weight_decay": 100.0, "spline_order": 20, "state_size": 2**16, "conv_width": 2**16, "expansion": 2**16}
"""Beyond it a run takes years, or a product of these leaves the range of fp32."""
_FP32_TINY, _FP32_MAX = 1.2e-38, 3.4e38


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of one run. The defaults are paper P's recipe (Sec. 2.1) at toy width, depth and length.

    Raises `ValueError` or `TypeError` that name the field and the remedy when a value cannot be run.
    """

    seed: int = 0
    """Seeds the initialisation and, separately, the order of the training batches."""

    # data
    data: str = "shakespeare"
    """A name in `SOURCES` or the path of a text, see `data.pin`. Texts are `shakespeare`, `wikitext103`, `openwebtext`
    and `c4`. `recall` (paper K, App. D.1) scores the last symbol of a sequence alone, `synthetic_lm` (App. D.2) all of
    them. The images `digits` (8 x 8), `mnist` (28 x 28) and `cifar10` (32 x 32, three channels) make the model a Vision
    Transformer; they are resized to `seq_len` pixels a channel."""
    data_digest: str | None = None
    """SHA-256 of a user's own text, filled in by `data.pin`; it stands for the path in the run's key."""
    tokenizer: str = "bytes"
    """What a text's symbols are. `bpe`: byte-pair encoding, learned on the training part."""
    vocab_size: int | None = None
    """None: as many symbols as occur in the source (4096 under `bpe`, 256 of `recall`, 10 000 of `synthetic_lm`). With
    bytes a larger value adds symbols that never occur."""
    seq_len: int = 64
    batch_size: int = 32
    recall_pairs: int = 4
    """Key-value pairs in a sequence of `recall`; other sources pay no attention to it."""
    eval_sequences: int = 256
    """Number of fixed validation sequences, spread evenly over the validation part."""

    # model
    d_model: int = 64
    n_layers: int = 3
    n_heads: int = 4
    mlp_ratio: int = 4
    mixer: str = "attention"
    """How positions exchange information. `mamba`: a selective state space (Gu and Dao 2023) in place of attention and
    MLP both, one sublayer a block (paper K, Tables 11 and 17)."""
    state_size: int = 16
    """Numbers of state a channel of `mamba` has; it, too, alone uses the next two."""
    conv_width: int = 4
    """Positions that the causal convolution before the state space sees."""
    expansion: int = 2
    """Channels of the state space are `expansion` times d_model."""
    mlp: str = "gelu"
    """`moe`: a mixture of GELU MLPs (paper K, Tables 11 and 16). `kan`: two Kolmogorov-Arnold layers of B-splines
    (Tables 11 and 18), of 2 mlp_ratio (grid_size + spline_order + 1) D^2 weights: 64 D^2 at the defaults."""
    experts: int = 8
    top_k: int = 2
    """Experts that a token of `moe` is sent to."""
    load_balance: float = 0.01
    """Weight of the loss of `moe` that spreads tokens over experts evenly; at its least that loss is 1."""
    grid_size: int = 4
    """B, intervals of the grid of each spline of `kan`."""
    spline_order: int = 3
    patch_size: int = 2
    """Side of the square patches of an image, in pixels; text pays no attention to it."""
    pooling: str = "mean"
    """What a Vision Transformer classifies by: the mean over patches, or a trained token in front of them (Dosovitskiy
    et al. 2021); text pays no attention to it."""
    norm: str = "pre_ln"
    """What is normalised where (paper K, Sec. 5.1), with f a sublayer: `pre_ln` x + f(LN x); `rmsnorm`
    x + f(RMSNorm x); `post_ln` LN(x + f(x)); `deepnorm` LN(a x + f(x)) and `deepnorm_pre` a x + f(LN x), with
    a = (2 n_layers)^(1/4); `subln` pre_ln with another LN before each sublayer's output projection; `no_norm`
    x + f(x)."""
    residual: str = "plain"
    """`scaled`: sublayers are added times 1/sqrt(2 n_layers); `rezero`: times a trained scalar each, zero at first."""
    positions: str = "rotary"
    """`learned`: an embedding per position, as in GPT-2."""
    biases: bool = False
    """Biases on all linear layers of the blocks and on LayerNorms."""
    init: str = "fan_in"
    """`fan_in`: paper P's. `gpt2`: every weight N(0, 0.02^2). `pytorch`: the modules' own. `xavier`: Xavier-uniform
    linear layers, embeddings N(0, 0.02^2). Biases start at zero except under `pytorch`."""
    reparametrization: str = "none"
    """Of the linear layers of the blocks, by torch's parametrizations: `spectral_norm` divides a weight by its largest
    singular value, `sigma_reparam` does and multiplies it by a trained number, 1 at first (Zhai et al. 2023), and
    `weight_norm` trains the norm and the direction of each row apart."""
    qk_norm: str = "head"
    """`head`: LayerNorm of each head's query and key, weights shared by heads; `model`: over all of
    d_model (Fig. E.8); `head_fixed`: `head` without trained gains; `none`."""
    attention: str = "softmax"
    """`squared_relu`: pointwise relu(z)^2 / sqrt(seq_len) in place of the softmax (Fig. E.11)."""
    attention_scale: str = "parametrization"
    """Factor on <q, k>. `parametrization`: 1/d_h under `mup_full`, else 1/sqrt(d_h)."""
    attention_cap: float | None = None
    """c of soft-capping: the softmax is taken of c tanh(z / c) in place of z (Gemma 2, where c is 50)."""
    attention_gate: bool = False
    """Whether each head's output is multiplied, number by number, by a sigmoid of a linear map of what enters the
    attention (Qiu et al. 2025)."""
    logit_transplant: float | None = None
    """kappa of Fig. 10: q and k pass through g(z) = sqrt(kappa) z / RMS(z)."""
    rope_base: float = 10_000.0
    layernorm_eps: float = 1e-6
    parametrization: str = "standard"
    """muParam variant (Sec. 3.2.4): `mup_simple` scales the LR of linear layers by base fan-in / fan-in,
    `mup_intermediate` also the head's initial std, `mup_full` also the attention scale, with zero queries."""
    base_width: int = 256
    """The d_model at which muParam and the standard parametrization agree, all of `mup_simple` and `mup_intermediate`;
    `mup_full` keeps its attention scale and its zero queries there."""

    # optimizer
    optimizer: str = "adamw"
    """`lion` has no `eps`; `lamb` scales each matrix's step by its own norm; `muon` (Jordan 2024) is torch's for the
    linear layers of the blocks, with its own momentum 0.95, query, key and value projections as matrices of their own
    and the step that AdamW's learning rates fit, and AdamW for all else. Decay acts in all of them alike."""
    qk_lr: str = "own"
    """`other_norm`: of W_Q it is `lr` times the norm of W_K at initialisation over that of now, and the other way
    round, so that a step changes the logits by as much as at first (Anson and Aitchison 2025)."""
    lr: float = 1e-2
    steps: int = 400
    warmup_steps: int = 20
    """Linear warm-up (the paper: 5% of all steps), then a cosine to `lr_final`."""
    lr_final: float = 1e-5
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    eps_late: float | None = None
    """AdamW's eps from half of the steps on; None: `eps` to the end."""
    weight_decay: float = 1e-4
    decay: str = "independent"
    """`independent`: theta -= s_t lambda theta whatever the LR (Sec. 3.2.2); `pytorch`: theta -= s_t lr lambda theta,
    with the layer's own LR: under muParam lr times its multiplier; `scaled`: the same with `lr` alone, whatever the
    multiplier (Kosson et al. 2025)."""
    clip_norm: float | None = 1.0
    qk_clip: float | None = None
    """Threshold of QK-clip: after a step, the query and key weights of a head whose largest logit in the step's batch
    was above it shrink so that it would not have been (Kimi K2, where it is 100)."""
    z_loss: float = 1e-4
    gradient_penalty: float = 0.0
    """Times the squared norm of the loss's gradient, added to the loss."""
    sam_rho: float = 0.0
    """Radius of sharpness-aware minimization around the optimizer's step; 0: without."""
    precision: str = "fp32"
    """`bf16` runs forward and backward under autocast; parameters and optimizer state stay fp32."""

    # Koopman Spectral Shaping and its kin, see shaping.Settings
    shaping: str = "none"
    """Which penalty on the layers' states is added to the loss."""
    shaping_alpha: float = 0.15
    shaping_every: int = 10
    shaping_beta: float = 1.0
    shaping_dmd: str = "pod"
    shaping_gradient: str = "both"
    shaping_reduction: str = "sum"

    # divergence: besides non-finite values, a run ends where it passes one of these (None: never)
    diverge_loss: float | None = None
    diverge_grad_norm: float | None = None

    # probes
    probe_every: int = 20
    """Steps between probes (the first and the last step are always probed); 0: no probes."""
    spectra_every: int = 0
    """Steps between spectral profiles (`koopman`) of the batch; the first and the last step's too; 0: none."""
    spectra_kreiss: bool = False
    """Whether they search the Kreiss constants, which takes longer than all the rest of a profile."""
    attention_maps: int = 0
    """How many snapshots of one attention pattern (block 0, head 0) to keep over the run."""
    signals_every: int = 0
    """Steps between readings of the early-warning signals, each reduced to one number (`signals.reduced`); 0: none."""
    sharpness_every: int = 0
    """Steps between readings of AdamW's preconditioned sharpness on the batch (`probes.sharpness`); 0: none."""

    # an alarm in training, see `response`
    alarm: str = "none"
    """What is held against `alarm_above` whenever the signals are read: one of `SIGNALS`, after its first few readings;
    or the `step` itself, a blind action at a fixed time."""
    alarm_above: float = 0.0
    on_alarm: str = "halve_lr"
    """What is done, once, after the step in which the reading first passed. `halve_lr`: half the LR from then on.
    `qk_clip`: the QK-clip at the threshold `qk_clip` begins. `roll_back`: weights and optimizer state of `roll_back_by`
    steps before, then on with the next batches, the schedule as it is, and half the LR."""
    roll_back_by: int = 20

    def __post_init__(self):
        for name, kind in _field_types().items():
            value = _coerce(name, getattr(self, name), kind)
            object.__setattr__(self, name, value)
            if name in CHOICES and value not in CHOICES[name]:
                raise ValueError(f"{name} {value!r} is unknown: choose {_listed(CHOICES[name])}")
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                if abs(value) == math.inf or value != value:
                    raise ValueError(f"{name} must be finite, got {value}")
                if value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
                    least = "zero or more" if name in _MAY_BE_ZERO else "positive"
                    raise ValueError(f"{name} must be {least}, got {value}")
                if 0 < value < _FP32_TINY and name not in _MAY_BE_ZERO:
                    raise ValueError(f"{name} must be at least {_FP32_TINY}, as it is zero in fp32, got {value}")
                most = _AT_MOST.get(name, 2**63 - 1 if isinstance(value, int) else _FP32_MAX)
                if value > most:
                    raise ValueError(f"{name} must be at most {most}, got {value}")
        self._check_together()

    def _check_together(self) -> None:
        if self.data_digest is not None and self.data in SOURCES:
            raise ValueError(f"data_digest belongs to a text of one's own, and {self.data!r} is none: choose None")
        if self.d_model % 2:
            raise ValueError(f"d_model {self.d_model} is odd: rotary positions turn pairs, choose an even one")
        if self.d_model % (2 * self.n_heads):
            fitting = _listed([h for h in range(1, self.d_model + 1) if self.d_model % (2 * h) == 0])
            what = (f"does not divide d_model {self.d_model}:" if self.d_model % self.n_heads else
                    f"makes the head size d_model / n_heads = {self.d_head} odd: rotary positions turn pairs,")
            raise ValueError(f"n_heads {self.n_heads} {what} choose one of {fitting}")
        if self.attention_maps > (self.steps if self.n_layers else 0):
            raise ValueError(f"attention_maps {self.attention_maps} needs a block to look at and as many steps: "
                             f"choose at most {self.steps if self.n_layers else 0}")
        for name, off in (("shaping", "none"), ("reparametrization", "none"), ("spectra_every", 0)):
            if not self.n_layers and getattr(self, name) != off:
                raise ValueError(f"{name} {getattr(self, name)!r} needs blocks: choose {off!r}, or n_layers 1 or more")
        if not self.causal and self.vocab_size is not None:
            raise ValueError(f"vocab_size {self.vocab_size} is for text and made-up symbols, and {self.data} has "
                             f"{CLASSES} classes: choose None")
        least = SYNTHETIC_IDS + SYNTHETIC_RUN[1]
        if self.data == "synthetic_lm" and (self.vocab_size or least) < least:
            raise ValueError(f"vocab_size {self.vocab_size} has no room for the synthetic language, whose ids start at "
                             f"{SYNTHETIC_IDS} and run on for {SYNTHETIC_RUN[1]}: choose None or at least {least}")
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} exceeds the {self.experts} experts: choose at most {self.experts}")
        for name, other in (("mixer", "attention"), ("mlp", "gelu")):
            for field, plain in (("parametrization", "standard"), ("reparametrization", "none"), ("norm", "pre_ln")):
                if getattr(self, name) != other and getattr(self, field) != plain and (
                        field != "norm" or self.norm == "subln"):
                    raise ValueError(f"{field} {getattr(self, field)!r} is not worked out for {name} "
                                     f"{getattr(self, name)!r}: choose {field} {plain!r}, or {name} {other!r}")
        self._check_remedies()
        if self.mixer == "mamba" and (self.mlp != "gelu" or self.attention_maps or not self.causal):
            raise ValueError("a block of mixer 'mamba' has neither MLP nor attention, and sees only what came before: "
                             "choose mlp 'gelu', attention_maps 0, and no images")
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} exceeds steps {self.steps}: shorten the warm-up")
        if max(self.beta1, self.beta2) >= 1:
            raise ValueError(f"beta1 and beta2 must be below 1, got {self.beta1} and {self.beta2}")
        if self.reparametrization == "weight_norm" and self.parametrization == "mup_full":
            raise ValueError("weight_norm trains directions, and the zero queries of mup_full have none: choose "
                             "parametrization 'mup_intermediate'")
        side = math.isqrt(self.seq_len)
        if not self.causal and (side**2 != self.seq_len or side % self.patch_size):
            raise ValueError(f"seq_len {self.seq_len} pixels are no square image in patches of {self.patch_size} x "
                             f"{self.patch_size}: choose a seq_len that is the square of a multiple of patch_size")

        self._check_readings()

    def _check_readings(self) -> None:
        attention = ("attention_logit_max", "logit_growth", "attention_collapse")
        plain = dict(sam_rho=0.0, qk_lr="own")
        for what, needs in (("sharpness_every", plain | dict(optimizer="adamw", parametrization="standard")),
                            ("on_alarm", plain | dict(optimizer="adamw", shaping="none")),
                            ("eps_late", plain | dict(optimizer="adamw"))):
            used = {"sharpness_every": self.sharpness_every > 0, "eps_late": self.eps_late is not None,
                    "on_alarm": self.alarm != "none" and self.on_alarm == "roll_back"}[what]
            for name, value in needs.items() if used else ():
                if getattr(self, name) != value:
                    raise ValueError(f"{what} {getattr(self, what)!r} is worked out for AdamW's own state alone: "
                                     f"choose {name} {value!r}, or leave {what} out")
        if self.alarm == "none":
            return
        if not self.signals_every and self.alarm != "step":
            raise ValueError(f"alarm {self.alarm!r} is held against readings: choose signals_every 1 or more")
        if self.alarm in attention and (self.mixer != "attention" or not self.n_layers
                                        or (self.alarm == "attention_collapse" and self.attention != "softmax")):
            raise ValueError(f"alarm {self.alarm!r} needs softmax attention to read: choose another alarm")
        if self.alarm in ("output_kurtosis", "kurtosis_jump") and not self.n_layers:
            raise ValueError(f"alarm {self.alarm!r} needs blocks to read: choose another alarm, or n_layers 1 or more")
        if self.on_alarm == "qk_clip" and self.qk_clip is None:
            raise ValueError("on_alarm 'qk_clip' needs a threshold to clip at: choose qk_clip 100, or another on_alarm")

    def _check_remedies(self) -> None:
        """Remedies that came after the papers need what they act on."""
        on = {"qk_clip": self.qk_clip is not None, "attention_cap": self.attention_cap is not None,
              "attention_gate": self.attention_gate, "qk_lr": self.qk_lr != "own",
              "optimizer": self.optimizer == "muon"}
        direct = {"qk_norm": "none", "attention_cap": None, "logit_transplant": None, "reparametrization": "none"}
        softmax = {"mixer": "attention", "attention": "softmax"}
        needs = {"qk_clip": softmax | direct | {"sam_rho": 0.0}, "attention_cap": softmax,
                 "attention_gate": {"mixer": "attention"}, "qk_lr": {"mixer": "attention", "sam_rho": 0.0},
                 "optimizer": {"mixer": "attention", "mlp": "gelu", "sam_rho": 0.0}}
        for name in [name for name, used in on.items() if used]:
            for field, needed in needs[name].items():
                if getattr(self, field) != needed:
                    raise ValueError(f"{name} {getattr(self, name)!r} is not worked out for {field} "
                                     f"{getattr(self, field)!r}: choose {field} {needed!r}, or leave {name} out")
        if on["qk_lr"] and self.parametrization == "mup_full":
            raise ValueError("qk_lr 'other_norm' divides by the norm of W_Q, which is zero at first under mup_full: "
                             "choose parametrization 'mup_intermediate'")

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads

    @property
    def scored_positions(self) -> int:
        """At how many positions, counted from the end of a sequence, the prediction enters the loss."""
        return 1 if self.data == "recall" or not self.causal else self.seq_len

    @property
    def causal(self) -> bool:
        """Whether a position sees only itself and those before it; those of an image see each other."""
        return self.data not in IMAGES

    @property
    def textual(self) -> bool:
        """Whether `data` is a text, cut into sequences."""
        return self.data not in (*MADE_UP, *IMAGES)

    @property
    def length(self) -> int:
        """How many positions the model sees: symbols of a sequence, or patches of an image and a class token."""
        return self.seq_len if self.causal else self.seq_len // self.patch_size**2 + (self.pooling == "class_token")

    @property
    def row(self) -> int:
        """How many integers `data` gives per sequence: T + 1 symbols, or all values of an image and its class."""
        return 1 + (self.seq_len if self.causal else IMAGES[self.data].channels * IMAGES[self.data].side**2)

    @property
    def residual_gain(self) -> float:
        """a, the factor on the residual stream before a sublayer is added: above 1 only for DeepNorm."""
        return (2 * self.n_layers) ** 0.25 if self.norm.startswith("deepnorm") else 1.0

    @property
    def scale(self) -> float:
        """Factor on <q, k> that gives the attention logit."""
        by_head_size = self.attention_scale == "1/d_h" or (
            self.attention_scale == "parametrization" and self.parametrization == "mup_full")
        return 1 / self.d_head if by_head_size else 1 / math.sqrt(self.d_head)


def non_default(config: RunConfig) -> dict:
    """The fields of `config` that differ from their default, as JSON-ready values, sorted by name."""
    fields = sorted(dataclasses.fields(config), key=lambda field: field.name)
    return {f.name: getattr(config, f.name) for f in fields if getattr(config, f.name) != f.default}


def run_key(config: RunConfig) -> str:
    """16 hex digits that identify the computation: a hash of the canonical JSON of schema and non-default fields.

    Because defaults are left out, a field added later with a default keeps every old key. A user's own text enters by
    its digest and not by its path; `ValueError` where it has none.
    """
    fields = non_default(config)
    if config.data not in SOURCES:
        if config.data_digest is None:
            raise ValueError(f"data {config.data!r} is none of {_listed(SOURCES)} and has no data_digest: call "
                             "data.pin(config) first, which reads a text of one's own")
        del fields["data"]
    canonical = json.dumps({"schema": SCHEMA, "config": fields}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def from_dict(values: Mapping) -> RunConfig:
    """A `RunConfig` from a mapping such as `non_default` returns; an unknown name raises `ValueError`."""
    _reject_unknown(values)
    return RunConfig(**values)


def replace(config: RunConfig, **changes) -> RunConfig:
    """`dataclasses.replace` that names an unknown field and the nearest known one."""
    _reject_unknown(changes)
    return dataclasses.replace(config, **changes)


def grid(base: RunConfig, **axes: Iterable) -> list[RunConfig]:
    """Every combination of the axes' values set on `base`; the last axis varies fastest.

    An axis is a field with its values, or any name with dicts of fields that change together:
    `grid(base, size=[dict(d_model=32, n_layers=2), dict(d_model=64, n_layers=3)], lr=[0.01, 0.1])`.
    """
    choices = [[value if isinstance(value, Mapping) else {name: value} for value in values]
               for name, values in axes.items()]
    return [replace(base, **{k: v for part in parts for k, v in part.items()})
            for parts in itertools.product(*choices)]


def unknown(kind: str, name, known: Iterable[str]) -> str:
    """The one wording for a name that is not among the known ones."""
    known = list(known)
    if not known:
        return f"unknown {kind} {name!r}: there is none to choose from"
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"unknown {kind} {name!r}: " + (f"did you mean {near[0]!r}? " if near else "") + f"choose {_listed(known)}"


def _reject_unknown(values: Mapping) -> None:
    for name in values:
        if name not in _field_types():
            raise ValueError(unknown("field", name, _field_types()))


def _listed(names: Iterable) -> str:
    names = [str(name) for name in names]
    return "".join(names) if len(names) < 2 else ", ".join(names[:-1]) + " or " + names[-1]


@functools.cache
def _field_types() -> dict[str, object]:
    return typing.get_type_hints(RunConfig)


def _coerce(name: str, value, kind):
    """`value` as the field's type; ints become floats where a float is meant, NumPy scalars become Python's."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(k for k in kind.__args__ if k is not types.NoneType)
    expected = {str: str, bool: bool, int: numbers.Integral, float: numbers.Real}[kind]
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, expected):
        raise TypeError(f"{name} must be {kind.__name__}, got {type(value).__name__} {value!r}")
    try:
        return kind(value) + 0.0 if kind is float else kind(value)  # + 0.0: -0.0 must not get a key of its own
    except OverflowError:
        raise ValueError(f"{name} must be finite, and the given whole number is beyond all floats") from None
