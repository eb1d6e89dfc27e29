"""Options of the section ``prune_params``: which weights are pruned, how many, how often."""

from utils.config.checkers import Bool, Choice, Float, Int, List, Pair, Word
from utils.config.options import EXTENT, RECORD, Option
from utils.pruning.methods import METHODS, NO_METHOD

MOST_LEVELS = 10_000

OPTIONS = {
    "prune_rate": Option(
        Float("(0, 1)"),
        default=0.2,
        unit="fraction",
        needs_several="levels",
        meaning="share of the remaining weights pruned before each level after level 0",
    ),
    "prune_method": Option(
        Choice(METHODS), default="mag", needs_several="levels", meaning="pruning criterion between levels"
    ),
    "num_levels": Option(
        Int(1, MOST_LEVELS), default=12, unit="levels", role=EXTENT, meaning="levels to train, level 0 (dense) included"
    ),
    "target_density": Option(
        Float("[0, 1)"),
        default=0.0,
        unit="fraction",
        role=EXTENT,
        meaning="in place of num_levels: the fewest levels of which the last has at most this density, "
        "d0 * (1 - prune_rate)^(num_levels - 1); 0 = num_levels",
    ),
    "er_method": Option(
        Choice(METHODS, first=[NO_METHOD]),
        default=NO_METHOD,
        meaning=f"pruning criterion at initialization, before level 0; {NO_METHOD} = no pruning there",
    ),
    "er_init": Option(
        Float("(0, 1]"), default=1.0, unit="fraction", meaning="density after pruning at initialization (er_method)"
    ),
    "rewind_epoch": Option(
        Int(0),
        default=10,
        unit="epochs",
        meaning="k: wr rewinds to the state after k epochs of level 0 (wr only); left out, and with 10 "
        "epochs_per_level or fewer, k is a tenth of them, at least 1",
    ),
    "rewind_step": Option(
        Int(0),
        default=0,
        unit="optimizer steps",
        meaning="k in steps: wr rewinds to the state after k steps of level 0 (wr only); 0 = rewind_epoch",
    ),
    "save_steps": Option(
        List(Int(0), bracketed=True),
        default=(),
        unit="optimizer steps",
        role=RECORD,
        meaning="steps of level 0 whose state is kept (model_step_{n}.pt, optimizer_step_{n}.pt); 0 = initialization",
    ),
    "exclude": Option(
        List(Word()), default=(), meaning="layers to leave dense: shell-style patterns of their names, such as fc*"
    ),
    "scope": Option(
        Choice(["global", "layer"]),
        default="global",
        needs_several="levels",
        meaning="what prune_method's scores compete over: all layers together, or each layer alone at its own rate",
    ),
    "layer_rates": Option(
        List(Pair("PATTERN", Float("[0, 1)")), bracketed=True),
        default=(),
        unit="fraction",
        needs_several="levels",
        meaning="prune_rate of layers by shell-style patterns of their names, such as fc3:0.1; the last match counts "
        "(scope layer only)",
    ),
    "invert_scores": Option(
        Bool(),
        default=False,
        meaning="keep the weights of lowest score, an ablation of any criterion that scores weights",
    ),
    "synflow_rounds": Option(
        Int(1), default=100, unit="rounds", meaning="rounds of scoring and pruning each time synflow prunes"
    ),
    "score_batches": Option(
        Int(1), default=1, unit="batches", meaning="training batches that snip and grasp use to score weights"
    ),
    "score_dtype": Option(
        Choice(["float32", "float64"]), default="float32", meaning="number type in which snip and grasp compute scores"
    ),
}
