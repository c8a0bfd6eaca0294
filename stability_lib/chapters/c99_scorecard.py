"""Chapter 99, the scorecard: what we think of each paper, in ten sentences. It has no runs and makes no claims.

Templates of `scorecard.sentences`: no number and no verdict is typed. `says` has words for what a verdict may become; a
verdict without words makes rendering fail, and the sentence wants rewriting.
"""

STUDIES = ()


PAPER_P = (
    'Of {{ tally("paper P", "any") }} claims of paper P {{ tally("paper P", "reproduced") }} hold in models a '
    'thousand times smaller than its own, {{ tally("paper P", "contradicted") }} do not, and of {{ tally("paper '
    'P", "undecided") }} our runs cannot tell.',

    'Runs that fail {{ says("P9.failing-above-1e4", "10**", reproduced="do have attention logits above ten '
    'thousand", contradicted="do not have attention logits above ten thousand", undecided="may have logits above '
    'ten thousand") }}, and of runs that pass it {{ says("P9.above-1e4-fails", "%", reproduced="nearly all fail", '
    'contradicted="many train on", undecided="we cannot say how many fail") }}.',

    'qk-norm {{ says("P1.instability", "nats", reproduced="rescues the highest learning rate", '
    'contradicted="saves little at the highest learning rate", undecided="may or may not rescue the highest '
    'learning rate") }}, and with it {{ says("P1.qk-norm-trains", "%", reproduced="models train over the whole '
    'range", contradicted="many runs fail all the same", undecided="we cannot tell how many runs train") }}.',

    'Logits are a cause and not only a sign {{ says("P10.worsens", "nats", reproduced="if forcing them up counts '
    'as a test: it raises the loss", contradicted="only if one believes it: forcing them up costs little", '
    'undecided="perhaps: forcing them up costs an amount we cannot tell from nothing") }}.',

    'LR sensitivity is a useful number with a catch, that slow learning at low rates counts like failing at high '
    'ones: {{ says("P1.sensitivity-falls", "nats", reproduced="it falls with qk-norm", contradicted="it does not '
    'fall with qk-norm", undecided="whether it falls with qk-norm is open") }}, and {{ '
    'says("P1.sensitivity-grows", "nats", reproduced="it grows with size", contradicted="it does not grow with '
    'size", undecided="whether it grows with size is open") }}.',

    'Of the output logits {{ says("P4.drift", contradicted="we see another story than the paper: in short runs log Z '
    'does not sink", reproduced="we see the drift that the paper describes in log Z", undecided="we cannot say that '
    'they drift") }}; z-loss {{ says("P4.near-zero", reproduced="does hold log Z near zero", contradicted="does '
    'not hold log Z near zero", undecided="may hold log Z near zero") }}, and {{ says("P3.harm", "exp", '
    'undecided="whether doing without it costs a twentieth at a high rate is open, by the factor in loss", '
    'reproduced="the drift harms", '
    'contradicted="the drift does no '
    'harm") }}.',

    'muParam in its simple form {{ says("P8.mup-steadier", reproduced="does slow the fall of the best learning '
    'rate with width, by decades per decade", contradicted="does not slow the fall of the best learning rate with '
    'width", undecided="may slow the fall of the best learning rate with width") }}, and {{ says("P8.sensitivity", '
    '"nats", reproduced="as the paper says, it does not lower LR sensitivity", contradicted="against the paper, '
    'it lowers LR sensitivity", undecided="whether it lowers LR sensitivity is open") }}.',

    'A longer warm-up {{ says("P5.loss", "nats", reproduced="lowers the loss", contradicted="does not lower the '
    'loss", undecided="may lower the loss") }}; independent weight decay {{ says("P6.long-sensitivity", "nats", '
    'contradicted="raises LR sensitivity here, by low rates", reproduced="lowers LR sensitivity", '
    'undecided="has no effect on LR sensitivity that we can tell") }}; and {{ says("P7.depth-faster", "nats", '
    'undecided="whether depth raises it more than width is open", reproduced="depth raises it more than width, '
    'mostly by the lowest rate", '
    'contradicted="depth does not raise it more than width") }}.',

    'Of AdamW\'s eps: with ten times the parameters gradients {{ says("P11.falls-with-n", "10**", '
    'reproduced="shrink to a part of their size", contradicted="do not shrink", undecided="may shrink") }}, and '
    'where they fall under eps {{ says("P13.update-shrinks", "10**", reproduced="updates shrink with them", '
    'contradicted="updates stay as they are", undecided="updates may shrink") }}.',

    'All in all {{ overall("paper P") }}.',
)

PAPER_K = (
    'Of {{ tally("paper K", "any") }} claims of paper K {{ tally("paper K", "reproduced") }} hold here, {{ '
    'tally("paper K", "contradicted") }} do not, and of {{ tally("paper K", "undecided") }} our runs cannot tell.',

    'The profile is cheap, and leaves open on which rank and states it is taken: {{ says("KT1.near-unit-mass", '
    'reproduced="most near-unit masses of its first table come out, by their mean distance", contradicted="the '
    'near-unit masses of its first table do '
    'not come out", undecided="how well the near-unit masses of its first table come out is open") }}, and {{ '
    'says("KT1.spectral-radius", contradicted="its spectral radii do not, because of one norm alone", '
    'reproduced="so do '
    'its spectral radii", '
    'undecided="of its spectral radii we cannot tell") }}.',

    'As a forecast of divergence, by AUROC, {{ says("KT2.m1-auroc", reproduced="it ranks runs of narrow '
    'models at moderate learning rates well, as the bare name of the norm does", contradicted="it ranks runs worse '
    'than the paper says", '
    'undecided="it may rank runs as the paper says") }}, with wider models among them {{ '
    'says("KT2.m1-auroc-wider", contradicted="worse", reproduced="as well", undecided="perhaps as well") }}, and {{ '
    'says("KT2.across-lrs", contradicted="over all '
    'learning rates it does not", reproduced="it does so over all learning rates too", undecided="over all learning '
    'rates we '
    'cannot tell") }}.',

    'Beside the bare fact whether a model has norms its gain {{ says("KT2.beats-norm-type", undecided="is nothing '
    'that we can tell", reproduced="is real", contradicted="is negative") }}, and among models of one norm {{ '
    'says("KT2.within-norms", undecided="it is not told from guessing", reproduced="it still ranks", '
    'contradicted="it ranks the wrong way round") }}.',

    'As advice, at moderate learning rates, models that its decision flow calls high risk {{ '
    'says("KF7.warnings-right", "%", '
    'contradicted="mostly train in the narrow sweep, and how many diverge depends on the rates tried", '
    'reproduced="mostly diverge", '
    'undecided="diverge we cannot say how often") }}; of the sweep\'s models that it lets go {{ '
    'says("KF7.go-safe", "%", reproduced="hardly any diverges", contradicted="more diverge than it should let", '
    'undecided="we cannot say how many diverge") }}, and of those outside of it {{ says("KF7.go-elsewhere", "%", '
    'contradicted="more diverge than it should let", reproduced="hardly any diverges", undecided="we cannot say how '
    'many diverge") }}.',

    'KSS at the paper\'s dose {{ says("KT3.kss-half", "points", reproduced="prevents at least half as much '
    'divergence as reported", contradicted="prevents less than half of the divergence that is reported", '
    'undecided="may or may not prevent half as much divergence as reported") }}; {{ says("KT3.kss-every-step", '
    '"points", reproduced="at a dose hundreds of times stronger it does prevent it", contradicted="nor does it at a '
    'dose hundreds of times stronger", undecided="of a dose hundreds of times stronger we cannot tell") }}, and {{ '
    'says("KT3.learning", "points", contradicted="in another setting, where nothing diverges, such a dose '
    'delays learning", reproduced="there models learn as well as without", undecided="what that costs in learning is '
    'open") }}. After a short warm-up the paper\'s dose {{ says("KT3.warm-up-100", "points", reproduced="prevents some '
    'divergence", contradicted="prevents none either", undecided="may prevent some divergence") }}.',

    'Against its baselines {{ says("KT4.fair-baselines", "points", undecided="it is not shown to prevent more '
    'than spectral or weight norm", reproduced="it prevents more than spectral and weight norm", contradicted="it '
    'prevents less than the better of spectral and weight norm") }}, and {{ says("KT14.fair-remedies", "points", '
    'undecided="whether it learns more than weight norm is open", reproduced="it learns more than weight norm", '
    'contradicted="it learns less than weight norm") }}.',

    'On text, over three sizes, KSS {{ says("KT8.perplexity", "nats", contradicted="raises the '
    'loss", reproduced="lowers '
    'the loss", undecided="does not move the loss in a way that we can tell") }}, and {{ says("K11.clipping", '
    '"points", contradicted="clipping prevents more divergence than it does", reproduced="it prevents more '
    'divergence than clipping", undecided="whether it prevents more than clipping is open") }}; in a small Vision '
    'Transformer, at every step, {{ says("K12.every-step", reproduced="it raises accuracy, by percentage points", '
    'contradicted="it raises no accuracy", undecided="whether it raises accuracy is open") }}.',

    'In a pretrained model {{ says("KF4.eta-depth", contradicted="nonlinearity does not rise with depth, '
    'by its slope", '
    'reproduced="nonlinearity rises with depth", undecided="whether nonlinearity rises with depth is open") }}, '
    'and {{ says("K13.setting", contradicted="no choice that the paper leaves open gives its numbers in '
    'this other model", reproduced="a choice that the paper leaves open gives its numbers", undecided="whether '
    'its numbers can be '
    'had is open") }}.',

    'All in all {{ overall("paper K") }}.',
)

FINDINGS = (
    'Without qk-norm models fail at high learning rates, {{ limit("smallest") }}, {{ limit("largest") }}; in '
    'failing runs of a coarse grid {{ says("P9.failing-above-1e4", "10**", reproduced="attention logits pass ten '
    'thousand", contradicted="attention logits stay below ten thousand", undecided="attention logits may pass '
    'ten thousand") }}. With qk-norm {{ says("P1.qk-norm-trains", "%", reproduced="runs train at every rate", '
    'contradicted="many '
    'runs fail all the same", undecided="we cannot tell how many runs train") }}.',

    'Among narrow models, at moderate rates, near-unit mass at initialization {{ says("KT2.m1-auroc", '
    'reproduced="ranks runs by whether they diverge, by AUROC", contradicted="ranks runs by whether they diverge '
    'worse than claimed, by AUROC", undecided="may rank runs by whether they diverge, by AUROC") }}, but with wider '
    'models among them its gain over the bare fact whether a model has norms {{ says("KT2.beats-norm-type", '
    'undecided="is nothing that we can tell", reproduced="is real", contradicted="is negative") }}.',

    'After a long warm-up, where models learn recall (to name the value that a key had), KSS at its paper\'s dose {{ '
    'says("KT3.fair", '
    '"points", '
    'reproduced="lowers the share of runs that diverge by at least half of what is reported", contradicted="changes '
    'the share of runs that diverge by less than half of the fall that is reported", undecided="may or may not lower '
    'the share of runs that diverge by half of what is reported") }}; reported is {{ reported("KT3.fair") }}. In '
    'models as wide as the paper\'s {{ says("KT3.fair", "points", "gpu", reproduced="it does so", contradicted="it '
    'does no better", undecided="we cannot tell") }}. Without KSS, where little is learned, of models '
    'without norms {{ diverged("no control") }} diverge, with Pre-LN {{ diverged("Pre-LN") }}.',

    'Of the remedies that came later {{ says("L17.muonclip-helps", "nats", reproduced="QK-clip lowers the LR '
    'sensitivity of Muon", contradicted="QK-clip does not lower it", undecided="QK-clip may lower the LR '
    'sensitivity of Muon") }}, and Muon {{ says("L17.muon-better", "nats", reproduced="ends lower than AdamW", '
    'contradicted="does not end lower than AdamW", undecided="may end lower than AdamW") }}; a soft cap on top of '
    'qk-norm {{ says("L17.cap-redundant", "nats", reproduced="changes nothing", contradicted="does change '
    'something", undecided="may change something") }}.',

    'A signal\'s threshold, fitted to some architectures, {{ says("E.in-time", "%", contradicted="warns only a '
    'minority of failing runs of others in time", reproduced="warns most failing runs of others in time", '
    'undecided="warns we cannot say how many failing runs of others in time") }}.',
)
"""What the README says was found."""
