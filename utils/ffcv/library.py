"""All that is used of FFCV: the only file that imports it.

Importing FFCV sets torch's thread count to 1 for the whole process; here the count is put back.
"""

import torch
from numba import njit

_threads = torch.get_num_threads()
try:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.libffcv import imdecode as _imdecode
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.reader import Reader
    from ffcv.types import (
        ALLOC_TABLE_TYPE,
        CURRENT_VERSION,
        TYPE_ID_HANDLER,
        FieldDescType,
        HeaderType,
        get_metadata_type,
    )
finally:
    torch.set_num_threads(_threads)

__all__ = [
    "ALLOC_TABLE_TYPE",
    "CURRENT_VERSION",
    "IMAGE_MODES",
    "JPEG_MODE",
    "TYPE_ID_HANDLER",
    "FieldDescType",
    "HeaderType",
    "IntField",
    "MemoryAllocator",
    "RGBImageField",
    "Reader",
    "get_metadata_type",
    "imdecode",
]

JPEG_MODE = 0  # of a stored image: IMAGE_MODES["jpg"], without the seconds that Numba compiles a look-up; 1 is pixels

# Decoder of JPEG bytes, callable from compiled code; a result other than 0 is a failure.
imdecode = njit(nogil=True)(_imdecode)
