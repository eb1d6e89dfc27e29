"""Options of the section ``model_params``: the network."""

from utils.config.checkers import Bool, Choice, List, Pair, Word
from utils.config.options import IMPLIED, Option

TIMM = "timm/"  # names of timm's models start with it

OPTIONS = {
    "model_name": Option(
        Word(), default="lenet_300_100", meaning="name in utils/models.py, of a torchvision model, or timm/NAME"
    ),
    "model_args": Option(
        List(Pair("ARGUMENT", Word()), bracketed=True),
        default=(),
        meaning="arguments of the class of a timm model, such as patch_size:4 (timm/NAME only)",
    ),
    "conv_type": Option(Choice(["ConvMask"]), default="ConvMask", role=IMPLIED, meaning="kept for older config files"),
    "blurpool": Option(Bool(), default=False, meaning="ResNets blur before each strided layer (Zhang 2019)"),
}
