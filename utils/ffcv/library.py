"""FFCV and what is used of it; the only file that imports it."""

import torch


def _import_ffcv():
    # Importing FFCV sets torch's thread count to 1, for the whole process.
    threads = torch.get_num_threads()
    try:
        from ffcv.fields import IntField, RGBImageField
        from ffcv.libffcv import imdecode
        from ffcv.reader import Reader
    finally:
        torch.set_num_threads(threads)
    return Reader, IntField, RGBImageField, imdecode
