"""Options of the section ``model_params``: the network."""

from utils.config.checkers import Bool, Choice, Word
from utils.config.options import IMPLIED, Option

OPTIONS = {
    "model_name": Option(
        Word(), default="lenet_300_100", meaning="name in utils/models.py, or of a torchvision classification model"
    ),
    "conv_type": Option(Choice(["ConvMask"]), default="ConvMask", role=IMPLIED, meaning="kept for older config files"),
    "blurpool": Option(Bool(), default=False, meaning="ResNets blur before each strided layer (Zhang 2019)"),
}
