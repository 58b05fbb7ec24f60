"""`.flo5`, the flow files of Spring; `hdf5`, which needs h5py, is imported when such a file is read or written."""

import numpy as np

from flow_data.formats.flow_format import FlowFormat, floating_range


def decode(data: bytes, name: str) -> tuple[np.ndarray, None]:
    """Decode the content of a `.flo5` file; see `FlowFormat`."""
    from flow_data.formats.hdf5 import decode_flo5

    return decode_flo5(data, name), None


def encode(flow: np.ndarray, valid: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Encode flow as the content of a `.flo5` file; see `FlowFormat`."""
    from flow_data.formats.hdf5 import encode_flo5

    return encode_flo5(flow), valid


FORMAT = FlowFormat(".flo5", b"\x89HDF", decode, encode, np.nan, floating_range(".flo5"))
