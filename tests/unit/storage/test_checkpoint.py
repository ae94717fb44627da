"""The index of a checkpoint, slices of its tensors, and what is said of files that are not as they should be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from lepton_dist.errors import CheckpointError
from lepton_dist.plan.axes import Span
from lepton_dist.storage.index import CheckpointIndex, PackedIndex
from lepton_dist.storage.slices import SliceReader

TENSORS: Mapping[str, torch.Tensor] = {
    "matrix": torch.arange(35, dtype=torch.float32).view(5, 7),
    "vector": torch.arange(9, dtype=torch.float32) / 8,
    "half": torch.arange(24, dtype=torch.float32).view(4, 6).to(torch.bfloat16),
    "cube": torch.arange(24, dtype=torch.float32).view(2, 3, 4),
    "scalar": torch.tensor(2.5),
    "nothing": torch.empty(0, 3),
    "ids": torch.arange(5),
}


@pytest.fixture
def one_file(tmp_path: Path) -> Path:
    save_file(dict(TENSORS), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def two_files(tmp_path: Path) -> Path:
    names = sorted(TENSORS)
    parts = {"model-1.safetensors": names[:3], "model-2.safetensors": names[3:]}
    for file, held in parts.items():
        save_file({name: TENSORS[name] for name in held}, tmp_path / file)
    weight_map = {name: file for file, held in parts.items() for name in held}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save_file({"matrix": torch.zeros(1)}, tmp_path / "stray.safetensors")  # not in the index, so not of the model
    return tmp_path


@pytest.mark.parametrize("fixture", ["one_file", "two_files"])
def test_every_tensor_is_found(fixture: str, request: pytest.FixtureRequest) -> None:
    index = CheckpointIndex.read(request.getfixturevalue(fixture))
    assert set(index.tensors) == set(TENSORS)
    assert index.total_bytes == sum(tensor.nbytes for tensor in TENSORS.values())
    for name, tensor in TENSORS.items():
        stored = index[name]
        assert (stored.shape, stored.num_bytes) == (tuple(tensor.shape), tensor.nbytes)
        assert (getattr(torch, stored.dtype), stored.itemsize) == (tensor.dtype, tensor.dtype.itemsize)
        assert name in index
    assert "absent" not in index
    with pytest.raises(CheckpointError, match="lack the tensor 'absent'"):
        index["absent"]


@pytest.mark.parametrize("rows", [(0, 5), (1, 4), (4, 5)])
@pytest.mark.parametrize("columns", [None, (0, 7), (2, 5), (6, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_slices(rows: tuple[int, int], columns: tuple[int, int] | None, dtype: torch.dtype, one_file: Path) -> None:
    stored = CheckpointIndex.read(one_file)["matrix"]
    first, last = columns or (0, 7)
    expected = TENSORS["matrix"][rows[0] : rows[1], first:last].to(dtype)
    span = None if columns is None else Span(*columns)
    row_bytes = 7 * 4
    for target in (
        torch.full(expected.shape, -1, dtype=dtype),
        torch.full((expected.shape[1], expected.shape[0]), -1, dtype=dtype).t(),  # a transposed view
        torch.full((expected.shape[0], 11), -1, dtype=dtype)[:, 3 : 3 + expected.shape[1]],  # a part of wider rows
    ):
        with SliceReader() as reader:
            reader.read(stored, Span(*rows), span, target)
        assert torch.equal(target, expected)
        assert reader.bytes_read == (rows[1] - rows[0]) * row_bytes  # whole rows, and each once


def test_slices_of_a_vector_and_of_bfloat16(one_file: Path) -> None:
    index = CheckpointIndex.read(one_file)
    vector, half = torch.empty(4), torch.empty(2, 3, dtype=torch.float32)
    with SliceReader() as reader:
        reader.read(index["vector"], Span(3, 7), None, vector)
        reader.read(index["half"], Span(1, 3), Span(2, 5), half)
    assert torch.equal(vector, TENSORS["vector"][3:7])
    assert torch.equal(half, TENSORS["half"][1:3, 2:5].float())


def test_rows_longer_than_the_read_buffer(tmp_path: Path) -> None:
    """A conversion goes through a bounded buffer, several rows or one at a time."""
    wide = torch.arange(2 * 5_000_000, dtype=torch.float32).view(2, -1)  # 20 MB a row, the buffer has 16 MiB
    save_file({"wide": wide, "tall": wide.view(-1, 4).clone()}, tmp_path / "model.safetensors")
    index = CheckpointIndex.read(tmp_path)
    target, tall = torch.empty(2, 3), torch.empty(2_500_000, 2)
    with SliceReader() as reader:
        reader.read(index["wide"], Span(0, 2), Span(4_999_997, 5_000_000), target)
        reader.read(index["tall"], Span(0, 2_500_000), Span(1, 3), tall)
    assert torch.equal(target, wide[:, -3:])
    assert torch.equal(tall, wide.view(-1, 4)[:, 1:3])


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        CheckpointIndex.read(tmp_path / "absent")


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors file$"):
        CheckpointIndex.read(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pickled \.bin weights are never loaded"):
        CheckpointIndex.read(tmp_path)


def test_a_missing_file_of_several(two_files: Path) -> None:
    (two_files / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 weight files are missing: model-2\.safetensors"):
        CheckpointIndex.read(two_files)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 3}', "not json", "\xff"])
def test_an_index_that_is_none(text: str, two_files: Path) -> None:
    (two_files / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"index\.json: "):
        CheckpointIndex.read(two_files)


def test_an_index_of_other_things_than_names(two_files: Path) -> None:
    (two_files / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
    with pytest.raises(CheckpointError, match="weight_map must map tensors to files"):
        CheckpointIndex.read(two_files)


def test_a_single_file_goes_before_strays_and_a_stale_index(one_file: Path) -> None:
    save_file({"matrix": torch.zeros(1)}, one_file / "zzz.safetensors")
    assert CheckpointIndex.read(one_file)["matrix"].shape == (5, 7)
    (one_file / "model.safetensors.index.json").write_text('{"weight_map": {"matrix": "absent.safetensors"}}')
    assert CheckpointIndex.read(one_file)["matrix"].shape == (5, 7)


def test_a_tensor_in_two_files_is_taken_from_the_one_that_the_index_names(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2), "b": torch.zeros(3)}, tmp_path / "m1.safetensors")
    save_file({"a": torch.zeros(5), "c": torch.zeros(4)}, tmp_path / "m2.safetensors")
    index_path = tmp_path / "model.safetensors.index.json"
    for place, shape in (("m1.safetensors", (2,)), ("m2.safetensors", (5,))):
        index_path.write_text(json.dumps({"weight_map": {"a": place, "b": "m1.safetensors", "c": "m2.safetensors"}}))
        index = CheckpointIndex.read(tmp_path)
        assert (index["a"].shape, index["a"].file.name) == (shape, place)
        assert set(index.tensors) == {"a", "b", "c"}
        again = CheckpointIndex.unpacked(
            tmp_path, msgspec.msgpack.decode(msgspec.msgpack.encode(index.packed()), type=PackedIndex)
        )
        assert again.tensors == index.tensors
    index_path.unlink()
    with pytest.raises(CheckpointError, match=r"'a' is in m1\.safetensors and in m2\.safetensors: remove one"):
        CheckpointIndex.read(tmp_path)


def test_the_dtype_that_most_of_the_weights_are_in(tmp_path: Path) -> None:
    tensors = {"norm": torch.zeros(9), "matrix": torch.zeros(9, 9, dtype=torch.bfloat16), "ids": torch.zeros(99).long()}
    save_file(tensors, tmp_path / "model.safetensors")
    index = CheckpointIndex.read(tmp_path)
    assert index.main_dtype(("float32", "bfloat16", "float16")) == "bfloat16"
    assert index.main_dtype(("float16",)) is None


def test_an_index_that_points_elsewhere(two_files: Path) -> None:
    text = json.dumps({"weight_map": {"a": "../secret.safetensors"}})
    (two_files / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="outside its directory"):
        CheckpointIndex.read(two_files)


@pytest.mark.parametrize("kept", [0, 5, 8, 60])
def test_a_header_cut_off(kept: int, one_file: Path) -> None:
    path = one_file / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: is truncated .*{kept} bytes"):
        CheckpointIndex.read(one_file)


def test_data_cut_off(one_file: Path) -> None:
    path = one_file / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"is truncated: '\w+' ends at byte {size}, the file has {size - 1}"):
        CheckpointIndex.read(one_file)


def test_a_file_that_shrinks_while_it_is_read(one_file: Path) -> None:
    path = one_file / "model.safetensors"
    stored = max(CheckpointIndex.read(one_file).tensors.values(), key=lambda tensor: tensor.offset)
    path.write_bytes(path.read_bytes()[:-2])
    rows = Span(0, stored.shape[0])
    columns = Span(0, stored.shape[1]) if len(stored.shape) > 1 else None
    target = torch.empty(stored.shape)
    with pytest.raises(CheckpointError, match=rf"'{stored.name}' ends 2 bytes early"), SliceReader() as reader:
        reader.read(stored, rows, columns, target)


def header_file(folder: Path, header: Any, data: bytes = bytes(8)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"{not json", "header is not JSON"),
        ([1, 2], "header is not a mapping"),
        ({"a": 3}, "'a' is malformed"),
        ({"a": {**GOOD, "dtype": "F3"}}, "'a' is malformed or of an unknown dtype"),
        ({"a": {**GOOD, "dtype": []}}, "'a' is malformed or of an unknown dtype"),
        ({"a": {**GOOD, "data_offsets": [0]}}, "'a' is malformed"),
        ({"a": {**GOOD, "shape": [3]}}, r"shape \[3\] needs 12 bytes, its header says 8"),
        ({"a": {**GOOD, "shape": [-2]}}, "'a' is malformed"),
        ({"a": {**GOOD, "shape": [-1, -2]}}, "'a' is malformed"),
        ({"a": {**GOOD, "data_offsets": [-8, 0]}}, "'a'"),
        ({"a": {**GOOD, "data_offsets": [4, 12]}}, "'a' leaves a hole before it: it begins at byte 74, not at 70"),
        ({"a": GOOD, "b": GOOD}, "'b' overlaps the one before it"),
        ({"a": {**GOOD, "shape": [1], "data_offsets": [0, 4]}}, "but its tensors end at byte"),
        ({"a": {**GOOD, "shape": "2"}}, "'a' is malformed"),
        ({"a": {**GOOD, "shape": [True, 2]}}, "'a' is malformed"),
        ({"a": {**GOOD, "shape": [2.0]}}, "'a' is malformed"),
        ({"__metadata__": {"format": 1}, "a": GOOD}, "__metadata__ must map names to strings"),
        (b'{"a": {}, "a": {}}', "a name stands twice"),
        (b"[" * 100_000, "nests too deep"),
        (b'{"a": NaN}', "NaN is no JSON"),
        (b'{"\xff": 1}', "header is not JSON"),
    ],
)
def test_headers_that_are_wrong(header: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        CheckpointIndex.read(header_file(tmp_path, header))


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-5, 70),
        st.floats(),
        st.sampled_from(["F32", "BF16", "X", "", "__metadata__"]),
        st.just(2**70),
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(data=st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_the_reference_library_refuses_is_refused(data: st.DataObject, tmp_path: Path) -> None:
    """A sound header with something changed in it: what is accepted, the reference library reads too, and alike."""
    header: dict[str, Any] = {
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c": {"dtype": "U8", "shape": [], "data_offsets": [32, 33]},
    }
    for _ in range(data.draw(st.integers(0, 2))):
        name = data.draw(st.sampled_from([*header, "d", "__metadata__"]))
        key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", None]))
        if key is None or not isinstance(header.get(name), dict):
            header[name] = data.draw(VALUES)
        elif key == "data_offsets" and data.draw(st.booleans()):
            header[name][key] = [data.draw(st.integers(-1, 40)) for _ in range(2)]
        else:
            header[name][key] = data.draw(VALUES)
    header_file(tmp_path, header, bytes(33 + data.draw(st.sampled_from([0, 0, 0, 1, -1]))))
    try:
        found = CheckpointIndex.read(tmp_path).tensors
    except CheckpointError:
        return
    with safe_open(tmp_path / "model.safetensors", "pt") as reference:
        assert set(found) == set(reference.keys())
        for name in reference.keys():  # noqa: SIM118 (no mapping)
            assert list(found[name].shape) == list(reference.get_slice(name).get_shape())


def test_a_header_that_claims_to_be_enormous(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + bytes(64))
    with pytest.raises(CheckpointError, match=f"72 bytes, header of {2**62} bytes"):
        CheckpointIndex.read(tmp_path)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write((17 << 20).to_bytes(8, "little"))
        file.truncate(18 << 20)
    with pytest.raises(CheckpointError, match="header of 17825792 bytes; 16777216 are read at most"):
        CheckpointIndex.read(tmp_path)
