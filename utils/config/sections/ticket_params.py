"""Options of the section ``ticket_params``: masks and weights that level 0 takes from another run or a file."""

from utils.config.checkers import Choice, Int
from utils.config.options import PLACE, Option
from utils.config.path_checkers import FilePath

MASKS = ("same", "shuffle_layer", "shuffle_global", "none")
WEIGHTS = ("auto", "init", "rewind", "final", "reinit", "init_signs", "final_signs")

OPTIONS = {
    "source": Option(
        FilePath(optional=True),
        default="",
        role=PLACE,
        meaning='run (its name in base_dir, or its directory) or file of weights that level 0 starts from; "" = none: '
        "a fresh network",
    ),
    "level": Option(
        Int(-1), default=-1, unit="level", meaning="level of the source run whose mask is taken; -1 = the last finished"
    ),
    "step": Option(
        Int(-1),
        default=-1,
        unit="steps",
        meaning="with weights rewind: step of the source's level 0 to start at, one of its save_steps; -1 = its "
        "rewind point, of training_type wr",
    ),
    "mask": Option(
        Choice(MASKS),
        default="same",
        meaning="mask: same (a file without masks: where its weights are not zero), permuted within each layer, "
        "permuted over all layers, or none = dense",
    ),
    "weights": Option(
        Choice(WEIGHTS),
        default="auto",
        meaning="weights: init = as the source run began, rewind = of its rewind point or step, final = of the end of "
        "the level, reinit = drawn anew, init_signs = drawn anew with the signs of init, final_signs = init with the "
        "signs of final; auto = init of a run, final of a file",
    ),
}
