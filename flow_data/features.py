"""The columns of a flow data set, and one decoded sample.

`OpticalFlow` is a column type of `datasets`, as `datasets.Image` is for images: rows hold a path or the bytes of a
flow file, which is decoded only when it is accessed. A program that does not import this module cannot read a data
set whose published schema names it, so publish plain `{"bytes": binary, "path": string}` columns and
`cast_column("flow", OpticalFlow())` after loading.
"""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from datasets import Features, Image, Value
from datasets.features.features import register_feature

from flow_data.file_names import find_path
from flow_data.flow_io import decode_flow, describe_loss, encode_flow, encode_with_loss, read_flow
from flow_data.formats.masks import decode_mask, encode_mask
from flow_data.images import read_pair
from flow_data.sample import FlowSample


@dataclass
class OpticalFlow:
    """Column of flow files, decoded lazily.

    Args:
        decode: give `{"flow", "valid"}` arrays; False gives the stored `{"bytes", "path"}`.
        stride: keep every so many rows and columns of a field that is finer than its frames, as Spring's; the vectors
            are in pixels of the frames already. Arrays have the size of the frames, and are stored at the finer size.
    """

    decode: bool = True
    stride: int = 1
    id: str | None = field(default=None, repr=False)
    dtype: ClassVar[str] = "dict"
    pa_type: ClassVar[Any] = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    _type: str = field(default="OpticalFlow", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        return self.pa_type

    def encode_example(self, value: str | os.PathLike[str] | Mapping[str, Any] | tuple) -> dict[str, Any]:
        """Bring one value into the form that is stored.

        Args:
            value: path of a flow file; its `{"bytes", "path"}`, where the path's suffix is the format and `.flo` is
                assumed without a path; or the flow itself, as `(flow, valid)` or `{"flow", "valid"}` with
                `(H, W, 2)` float32 pixels and `(H, W)` bool or None.

        Returns:
            `{"bytes", "path"}`; arrays become the bytes of a `.flo` file. Flow that is not finite is unknown; where
            `valid` says otherwise, a warning reports its share.

        Raises:
            ValueError: none of these, arrays of wrong shape or type, or flow that is finite in no valid pixel.
        """
        if isinstance(value, str):
            return {"bytes": None, "path": value}
        if isinstance(value, os.PathLike):
            return {"bytes": None, "path": os.path.abspath(value)}
        if isinstance(value, tuple) and len(value) == 2:
            return {"bytes": self._encode_arrays(*value), "path": None}
        if isinstance(value, Mapping) and "flow" in value:
            return {"bytes": self._encode_arrays(value["flow"], value.get("valid")), "path": None}
        if isinstance(value, Mapping) and not (value.get("bytes") is None and value.get("path") is None):
            return {"bytes": value.get("bytes"), "path": value.get("path")}
        raise ValueError(f"a flow must be a path, a dict with 'bytes' or 'path', or (flow, valid); got {value!r:.200}")

    def decode_example(
        self, value: Mapping[str, Any], token_per_repo_id: dict[str, str | bool | None] | None = None
    ) -> dict[str, np.ndarray]:
        """Decode one stored value.

        Args:
            value: `{"bytes", "path"}`. Bytes win; a path is a local file.
            token_per_repo_id: part of the interface of `datasets`, not used.

        Returns:
            `{"flow": (H, W, 2) float32, "valid": (H, W) bool}` in pixels, flow 0 where it is unknown.

        Raises:
            RuntimeError: decoding is switched off.
            ValueError: neither bytes nor path, or a damaged file.
            OSError: the file cannot be read.
        """
        if not self.decode:
            raise RuntimeError("decoding is switched off: cast the column to OpticalFlow(decode=True)")
        if "flow" in value:
            return dict(value)  # idempotent, as datasets.Image is
        data, path = value["bytes"], value["path"]
        if data is None and path is None:
            raise ValueError("a flow must have 'bytes' or 'path'; got neither")
        flow, valid = read_flow(path) if data is None else decode_flow(data, path or "bytes.flo")
        if self.stride > 1:  # copied, for what does not like views
            flow, valid = (array[:: self.stride, :: self.stride].copy() for array in (flow, valid))
        return {"flow": flow, "valid": valid}

    def cast_storage(self, storage: pa.Array) -> pa.StructArray:
        """Cast an Arrow column to the stored form.

        Args:
            storage: paths (string), structs with "bytes", "path" or both, or structs of nested lists "flow" and
                "valid" (what `Dataset.map` makes of decoded values; `encode_example` in its function is faster).

        Returns:
            Structs `{"bytes": binary, "path": string}`; null stays null.
        """
        if pa.types.is_struct(storage.type) and storage.type.get_field_index("flow") >= 0:
            storage = pa.array([None if row is None else self._encode_lists(**row) for row in storage.to_pylist()])
        return _cast_files(storage)

    def embed_storage(self, storage: pa.StructArray, **options: Any) -> pa.StructArray:
        """Read the files into the column, so that Parquet is self-contained; of a path the base name remains.

        Args:
            storage: structs `{"bytes", "path"}`.
            options: `token_per_repo_id`, `local_files`, `remote_files`, as for `datasets.Image`.

        Returns:
            Structs `{"bytes", "path"}`.

        Raises:
            OSError: a file cannot be read.
        """
        return Image().embed_storage(storage, **options)

    def flatten(self) -> "OpticalFlow | dict[str, Value]":
        """The feature itself, or its stored columns when decoding is switched off."""
        return self if self.decode else {"bytes": Value("binary"), "path": Value("string")}

    def _encode_arrays(self, flow: np.ndarray, valid: np.ndarray | None) -> bytes:
        if self.stride > 1 and isinstance(flow, np.ndarray):
            flow = flow.repeat(self.stride, 0).repeat(self.stride, 1)
        if self.stride > 1 and isinstance(valid, np.ndarray):
            valid = valid.repeat(self.stride, 0).repeat(self.stride, 1)
        if valid is None:
            return encode_flow(flow, None, ".flo")
        data, lost = encode_with_loss(flow, valid, ".flo")
        if lost:
            warnings.warn(f"{describe_loss(lost, '.flo')}: they are stored as unknown", stacklevel=2)
        return data

    def _encode_lists(self, flow: list, valid: list | None = None) -> dict[str, Any]:
        mask = None if valid is None else np.array(valid, bool)
        return self.encode_example((np.array(flow, np.float32), mask))


@dataclass
class ValidMask:
    """Column of masks of known flow, decoded lazily; null where there is none.

    Args:
        decode: give `(H, W)` bool arrays; False gives the stored `{"bytes", "path"}`.
        zero_is_valid: the files count reasons against a pixel, as TartanAir's: 0 is valid. Else 0 is not.
    """

    decode: bool = True
    zero_is_valid: bool = False
    id: str | None = field(default=None, repr=False)
    dtype: ClassVar[str] = "numpy.ndarray"
    pa_type: ClassVar[Any] = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    _type: str = field(default="ValidMask", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        return self.pa_type

    def encode_example(self, value: str | os.PathLike[str] | Mapping[str, Any] | np.ndarray) -> dict[str, Any]:
        """Bring one value into the form that is stored.

        Args:
            value: path of a mask file, its `{"bytes", "path"}`, or `(H, W)` bool, True where flow is known.

        Returns:
            `{"bytes", "path"}`; an array becomes the bytes of a PNG.

        Raises:
            ValueError: none of these.
        """
        if isinstance(value, (str, os.PathLike)):
            return {"bytes": None, "path": value if isinstance(value, str) else os.path.abspath(value)}
        if isinstance(value, Mapping) and not (value.get("bytes") is None and value.get("path") is None):
            return {"bytes": value.get("bytes"), "path": value.get("path")}
        if isinstance(value, np.ndarray):
            return {"bytes": encode_mask(~value if self.zero_is_valid else value), "path": None}
        raise ValueError(f"a mask must be a path, a dict with 'bytes' or 'path', or an array; got {value!r:.200}")

    def decode_example(
        self, value: Mapping[str, Any] | np.ndarray, token_per_repo_id: dict[str, str | bool | None] | None = None
    ) -> np.ndarray | None:
        """Decode one stored value.

        Args:
            value: `{"bytes", "path"}`. Bytes win; a path is a local file.
            token_per_repo_id: part of the interface of `datasets`, not used.

        Returns:
            `(H, W)` bool, True where flow is known; None with neither bytes nor path.

        Raises:
            RuntimeError: decoding is switched off.
            ValueError: a damaged file.
            OSError: the file cannot be read.
        """
        if not self.decode:
            raise RuntimeError("decoding is switched off: cast the column to ValidMask(decode=True)")
        if isinstance(value, np.ndarray):
            return value  # idempotent, as datasets.Image is
        data, path = value["bytes"], value["path"]
        if data is None and path is None:  # what other programs may write for null
            return None
        mask = decode_mask(Path(find_path(path)).read_bytes() if data is None else data, path or "bytes.png")
        return ~mask if self.zero_is_valid else mask

    def cast_storage(self, storage: pa.Array) -> pa.StructArray:
        """Cast an Arrow column to the stored form, as `OpticalFlow.cast_storage` does, here from lists of bool."""
        if pa.types.is_list(storage.type) or pa.types.is_large_list(storage.type):
            rows = (None if row is None else np.array(row, bool) for row in storage.to_pylist())
            storage = pa.array([None if row is None else self.encode_example(row) for row in rows], self.pa_type)
        return _cast_files(storage)

    def embed_storage(self, storage: pa.StructArray, **options: Any) -> pa.StructArray:
        """Read the files into the column, as `OpticalFlow.embed_storage` does."""
        return Image().embed_storage(storage, **options)

    def flatten(self) -> "ValidMask | dict[str, Value]":
        """The feature itself, or its stored columns when decoding is switched off."""
        return self if self.decode else {"bytes": Value("binary"), "path": Value("string")}


def _cast_files(storage: pa.Array) -> pa.StructArray:
    """Paths, or structs with "bytes" or "path", as structs with both."""
    if pa.types.is_struct(storage.type):
        names = {storage.type.field(i).name for i in range(storage.type.num_fields)}
        if not names & {"bytes", "path"}:
            raise ValueError(f"a column must have 'bytes' or 'path'; got one with {sorted(names)}")
    elif not any(kind(storage.type) for kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)):
        raise ValueError(f"a column must be of paths or of 'bytes' and 'path'; got {storage.type}")
    return Image().cast_storage(storage)  # the stored form is the same


with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # datasets calls register_feature experimental, on every import
    register_feature(OpticalFlow, "OpticalFlow")
    register_feature(ValidMask, "ValidMask")

FLOW_FEATURES = Features(
    {"id": Value("string"), "image1": Image(), "image2": Image(), "flow": OpticalFlow(), "valid": ValidMask()}
)


def to_sample(row: Mapping[str, Any], needs_flow: bool = True) -> FlowSample:
    """Turn a decoded row of a data set into arrays.

    Args:
        row: `id`; `image1` and `image2`, as PIL images or as stored (`{"bytes", "path"}`); `flow` as `OpticalFlow`
            decodes it; `valid`, which may be None or absent, as `ValidMask` does.
        needs_flow: False allows a row without ground truth, whose `flow` is None or absent.

    Returns:
        The sample; its `flow` and `valid` are None where the row has no ground truth. Its images are as
        `flow_data.images.read_pair` gives them.

    Raises:
        ValueError: no ground truth (a test split) although it is required, images that cannot be decoded, or sizes
            that differ. The message names the row's id.
    """
    name = row["id"]
    ground_truth = row.get("flow")
    if ground_truth is None and needs_flow:
        raise ValueError(f"{name}: there must be ground-truth flow; got none (is this a test split?)")
    image1, image2 = read_pair(row)
    flow: Any = None if ground_truth is None else ground_truth["flow"]
    valid: Any = None if ground_truth is None else ground_truth["valid"]
    mask = None if ground_truth is None else row.get("valid")
    height, width = image1.shape[:2]
    for key, array in (("image2", image2), ("flow", flow), ("valid", mask)):
        if array is not None and array.shape[:2] != (height, width):
            size = f"{array.shape[0]} x {array.shape[1]}"
            raise ValueError(f"{name}: {key} must be of image1's size {height} x {width} (h x w); got {size}")
    if mask is not None:
        valid = mask if valid is None else valid & mask
        flow = np.where(valid[..., None], flow, np.float32(0))
    return FlowSample(image1, image2, flow, valid)


def to_occlusion(row: Mapping[str, Any]) -> np.ndarray | None:
    """Decode the mask of occluded pixels: a row's column `occlusion`, which Sintel has.

    Args:
        row: of a source; `occlusion` as a PIL image or as stored (`{"bytes", "path"}`), None or absent.

    Returns:
        `(H, W)` bool, True where the pixel of frame 1 is occluded in frame 2; None where there is no mask.

    Raises:
        ValueError: a damaged file.
        OSError: the file cannot be read.
    """
    value = row.get("occlusion")
    if value is None:
        return None
    return ValidMask().decode_example(value) if isinstance(value, Mapping) else np.asarray(value) != 0
